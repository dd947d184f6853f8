"""LaMDA's freezer: B stops learning, column by column."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..optim._common import check_count, check_number, pairs_of
from ._common import site_name
from ._freezing import freeze
from .base import Schedule


class LaMDAFreezer(Schedule):
    """After step i the first ⌊r · i / (η · i_max)⌋ columns of B stay as they are; from η · i_max on all of B

    LaMDA (Azizi et al., 2024, arXiv 2406.12832), whose released program leaves out the r and so freezes three
    columns at most. What the optimiser moves in a frozen column, by momentum or decay, is taken back; B has
    no gradient once all its columns are frozen. Meant for the method ``lamda``, and works on any layer with
    an A and a B.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        max_steps: i_max, the steps of the whole training.
        eta: η, in (0, 1].

    Raises:
        ValueError: no B that trains, or a number is out of range.
    """

    key = "lamda_freezer"
    saved = ("ranks", "columns")

    def __init__(self, model: nn.Module, *, max_steps: int, eta: float = 0.3) -> None:
        super().__init__(model)
        check_count("max_steps", max_steps)
        check_number("eta", eta, above=True)
        if eta > 1:
            raise ValueError(f"eta: expected at most 1, got {eta}")
        self.until = eta * max_steps
        self.pairs = [pair for pair in pairs_of(model) if pair.lora_b.requires_grad]
        if not self.pairs:
            raise ValueError("model: expected layers whose B trains, got none")
        self.ranks = {site_name(pair): pair.lora_b.shape[1] for pair in self.pairs}
        # The frozen columns of each B.
        self.columns: list[Tensor] = [pair.lora_b.detach()[:, :0].clone() for pair in self.pairs]

    def act(self, step: int) -> None:
        """Takes frozen columns back, and freezes those that are due."""
        for i, pair in enumerate(self.pairs):
            columns, lora_b = self.columns[i], pair.lora_b
            lora_b[:, : columns.shape[1]].copy_(columns)
            due = min(lora_b.shape[1], int(lora_b.shape[1] * step / self.until))
            if due > columns.shape[1]:
                self.columns[i] = lora_b.detach()[:, :due].clone()
            if due == lora_b.shape[1]:
                freeze(pair, "lora_B")

    def restored(self) -> None:
        """Freezes what was frozen."""
        for columns, pair in zip(self.columns, self.pairs, strict=True):
            if columns.shape[1] == pair.lora_b.shape[1]:
                freeze(pair, "lora_B")

    def check_state(self, name: str, own: Any, given: Any) -> None:
        """The number of frozen columns may be another, the ranks not."""
        if name != "columns":
            super().check_state(name, own, given)
            if name == "ranks" and dict(given) != own:
                raise ValueError(f"state['ranks']: expected {own}, got {dict(given)}")
        elif not isinstance(given, list) or len(given) != len(self.pairs):
            raise ValueError(
                f"state['columns']: expected {len(self.pairs)} tensors, got {type(given).__name__}"
            )
        else:
            for one, pair in zip(given, self.pairs, strict=True):
                (rows, r), rest = pair.lora_b.shape[:2], pair.lora_b.shape[2:]
                if one.shape[:1] != (rows,) or one.shape[2:] != rest or one.shape[1] > r:
                    raise ValueError(
                        f"state['columns']: {pair.name}: expected at most {r} columns of {rows}, got"
                        f" {tuple(one.shape)}"
                    )
