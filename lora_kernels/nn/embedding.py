"""The drop-in module: an ``nn.Embedding`` with named adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Adapter, Dense, LoRA, LoRAConfig, Replaced, current_call
from ..ops.dora_linear import output_scale
from .adapter_layer import AdapterLayer, own_weight, refuse_reader


class LoRAEmbedding(AdapterLayer, nn.Embedding):
    """y_t = E[t] + Σ_i s_i · (A_i[:, t]ᵀ ⊙ g_i) B_iᵀ over the active adapters i, for each token t

    An ``nn.Embedding`` (it is one: same ``weight`` E) whose adapters change Eᵀ: A is ``[r, num_embeddings]``
    and B ``[embedding_dim, r]``. h is looked up like E itself, with ``padding_idx``, ``max_norm`` (which
    shortens columns of A in place) and ``scale_grad_by_freq``; h Bᵀ is added to what was looked up in place.
    ``sparse`` is E's alone: A is [r, tokens], and torch has no sparse gradient for that. As in PEFT, A
    starts at zero and B is random, and ``lora_dropout`` does nothing. DoRA scales by the norm of each of the
    ``embedding_dim`` rows of Eᵀ + s B A.

    Token numbers are integers of any shape; y is ``[..., embedding_dim]`` of E's dtype. Adapters are
    float32 on a half-precision E.

    Args:
        num_embeddings: rows of E.
        embedding_dim: columns of E.
        r: rank of the first adapter.
        lora_alpha: numerator of its scale.
        method: a name in ``lora_kernels.adapters.METHODS``.
        adapter_name: name of the first adapter.
        padding_idx: as in ``nn.Embedding``; its rows of E and columns of A get no gradient.
        device: of all parameters.
        dtype: of E.
        options: further fields of :class:`LoRAConfig`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """

    base_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        lora_alpha: float = 8,
        method: str = "lora",
        adapter_name: str = "default",
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        config = LoRAConfig(r, lora_alpha, method=method, **options)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._start()
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        config: LoRAConfig | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> LoRAEmbedding:
        """A LoRAEmbedding on the very weight of ``embedding``, which becomes frozen.

        Args:
            embedding: an ``nn.Embedding``; its weight is shared, not copied.
            config: what the adapter is; or its fields as keywords.
            adapter_name: the adapter's name.
            options: fields of :class:`LoRAConfig`, where no config is given.

        Raises:
            TypeError: not a plain ``nn.Embedding``, or both a config and options were given.
        """
        return cls._wrap(embedding, config, adapter_name, options)

    def forward(self, input: Tensor) -> Tensor:
        """y for token numbers of any shape."""
        if not self.enabled:
            return look_up(self, input, self.bare_weight)
        active = self.active if not self.merged else ()
        return embed(self, input, [self.adapters[name].lower(None, current_call()) for name in active])

    def make_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """An adapter that fits this layer; :meth:`add_adapter` adds it."""
        if "rows" in where:
            return super().make_adapter(config, **where)
        refuse_reader(config, "an embedding")
        if config.lora_bias:
            raise ValueError("lora_bias: expected linears and convolutions, got an embedding")
        adapter = super().make_adapter(config, **where)
        _swap_starts(adapter)
        return adapter

    def _draw(self, adapter: Adapter) -> None:
        super()._draw(adapter)
        _swap_starts(adapter)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()


def embed(base: nn.Embedding, input: Tensor, adapters: Iterable[Any]) -> Tensor:
    """What ``base`` looks up, with what each adapter of its transposed weight adds or makes of it."""
    tokens, weight = input.reshape(-1), own_weight(base)
    y = look_up(base, tokens, weight, base.sparse)
    for update in adapters:
        if isinstance(update, Replaced):
            y = _with_rows(base, tokens, y, update)
            continue
        if isinstance(update, Dense):
            y = y + look_up(base, tokens, update.delta.T.to(y.dtype))
            continue
        lora_a, lora_b, scaling, gate, _, magnitude = update.numbered()
        h = look_up(base, tokens, lora_a.T)
        h = h if gate is None else h * gate
        y = y.addmm_(h.to(y.dtype), lora_b.T.to(y.dtype), alpha=scaling)
        if magnitude is not None:
            y = y * output_scale(weight.T, lora_a, lora_b, magnitude, scaling).to(y.dtype)
    return y.view(*input.shape, base.embedding_dim)


def _with_rows(base: nn.Embedding, tokens: Tensor, y: Tensor, update: Replaced) -> Tensor:
    """y with its own values for the tokens that have some."""
    values = update.values.to(y.dtype)
    if base.max_norm is not None or base.scale_grad_by_freq:  # which go by rows of the whole
        return look_up(base, tokens, own_weight(base).index_copy(0, update.at, values))
    slots = update.slots[tokens]
    rows = F.embedding(slots.clamp_min(0), values)
    has = slots >= 0
    if base.padding_idx is not None:
        rows = torch.where((tokens == base.padding_idx)[:, None], rows.detach(), rows)
    return torch.where(has[:, None], rows, y)


def look_up(base: nn.Embedding, tokens: Tensor, weight: Tensor, sparse: bool = False) -> Tensor:
    """Rows of ``weight``, by the options of ``base``."""
    options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, sparse)
    return F.embedding(tokens, weight, *options)


@torch.no_grad()
def _swap_starts(adapter: Adapter) -> None:
    """Zero A and normal B where both train: a token that never came keeps its embedding."""
    plain = isinstance(adapter, LoRA) and adapter.zero_start and not adapter.frozen
    if adapter.init_lora_weights in (True, "gaussian") and plain:
        nn.init.zeros_(adapter.lora_A)
        nn.init.normal_(adapter.lora_B)
