"""Rows of an embedding that train by themselves: PEFT's ``trainable_token_indices``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import Adapter
from .call import Call
from .site import Site, Start
from .update import Replaced


class Rows(NamedTuple):
    """Which rows of a weight ``[tokens, width]``, and what they share their values by."""

    tokens: tuple[int, ...]
    # Of the modules whose weight is one: the first, whose name is that of the values in a file.
    owner: str


class TokenRows(Adapter):
    """W'[t] = v_t for the chosen tokens t, W'[t] = W[t] for all others

    v ``[chosen, width]`` starts at W's rows and trains. Of an embedding only what was looked up changes, of a
    linear (the output head) only these columns of y: no W' is made but for merging.

    Args:
        site: the layer; of an embedding its weight lies transposed.
        rows: which.
        lookup: whether the layer is an embedding.
    """

    trainable_tokens_delta: nn.Parameter
    method = "lora"
    plain = False

    def __init__(self, site: Site, rows: Rows, lookup: bool) -> None:
        self.rows, self.lookup = rows, lookup
        count = site.in_features if lookup else site.out_features
        if max(rows.tokens) >= count:
            raise ValueError(
                f"trainable_token_indices: expected token numbers below {count}, got {max(rows.tokens)}"
            )
        super().__init__(site)
        self.tied = rows.owner != site.name
        device: Any = None if torch.device(site.device or "cpu").type == "meta" else site.device
        index = torch.tensor(rows.tokens, device=device)
        slots = torch.full((count if lookup else 0,), -1, dtype=torch.int32, device=device)
        if lookup:
            slots[index] = torch.arange(len(rows.tokens), dtype=torch.int32, device=device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def build(self, site: Site) -> Start:
        """The rows of W, one parameter for all modules that share W."""

        def own() -> Tensor:
            weight: Any = site.weight
            index = torch.tensor(self.rows.tokens, device=weight.device)
            values = weight.index_select(1, index).T if self.lookup else weight.index_select(0, index)
            return values.detach().contiguous()  # type: ignore[no-any-return]

        return Start({"trainable_tokens_delta": site.shared(("token rows", *self.rows), own)})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Replaced:
        """The rows' values, and where they belong."""
        return Replaced(self.index, self.trainable_tokens_delta, self.slots)

    def merged(self, weight: Tensor, base: Tensor) -> Tensor:
        """The weight with these rows."""
        values = self.trainable_tokens_delta.to(weight.dtype)
        return weight.index_copy(*((1, self.index, values.T) if self.lookup else (0, self.index, values)))

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """Raises a ValueError: what takes a row's place adds nothing to it."""
        raise ValueError("trainable_token_indices: rows that take W's place have no ΔW that is added to it")

    def extra_repr(self) -> str:
        """How many."""
        return f"{len(self.rows.tokens)} tokens"
