"""One batch, many adapters, their factors averaged before they are multiplied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._inputs import autocasts, cast, compute_dtype
from ._lora_function import written
from ._multi_inputs import check, spread_rows
from .adapter_stack import AdapterStack
from .invariant_linear import invariant_linear
from .multi_lora_linear import multi_lora_linear


def multi_lora_fusion(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    adapter_ids: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    batch_invariant: bool = False,
) -> Tensor:
    """y_m = x_m Wᵀ + b + (drop(x_m) Āᵀ) B̄ᵀ with Ā = Σ_j w_mj A_i, B̄ = Σ_j w_mj s_i B_i, i = ids_mj

    What LoraRetriever (Zhao et al., 2024, arXiv 2402.09997) and SAML (Zhao et al., 2024, arXiv 2406.19706)
    call fusion. :func:`multi_lora_linear` with weights is the other way, the mixture: there no factor of an
    adapter meets one of another. Both are one adapter where a row has one with weight 1. An adapter of a
    lower rank counts as one with more ranks of zeros. Differentiable in x, W, b, the factors, s and w.

    Shapes: as :func:`multi_lora_linear` with ``k`` adapters a row ``[..., k]``, or a sample
    ``[samples, k]``. Samples that are long enough have their Ā and B̄ formed; else each adapter maps a row to
    its own ranks, and no factors are. A row's delta is the same, bit for bit, whoever else is in the batch,
    where its sample has the same length.

    Args:
        x: the input ``[..., K]``.
        weight: the base weight ``[N, K]``, or ``None`` for the delta alone.
        adapters: of :func:`stack_adapters`, or of a pool.
        adapter_ids: which adapters; -1 for none.
        weights: w, of the same shape.
        bias: b ``[N]``.
        dropout_p: probability in [0, 1) that an element of the branch's input is dropped; a row has one mask.
        training: ``False`` switches dropout off.
        batch_invariant: as :func:`multi_lora_linear`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape does not fit, or ``dropout_p`` or (on the CPU) an id is out of range.

    Examples:
        >>> a, b = [torch.randn(r, 8) for r in (2, 3)], [torch.randn(4, r) for r in (2, 3)]
        >>> ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
        >>> multi_lora_fusion(torch.randn(1, 8), torch.randn(4, 8), stack_adapters(a, b), ids, weights).shape
        torch.Size([1, 4])
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a Tensor, got {type(weights).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if isinstance(x, Tensor) and x.is_floating_point() and autocasts(x):
        dtype = compute_dtype(x)
        x, weight, bias = (cast(t, dtype) for t in (x, weight, bias))
    check(x, weight, adapters, adapter_ids, weights, bias)
    p = dropout_p if training else 0.0
    if _forms_factors(x, adapter_ids, adapters.max_rank):
        fused = fuse_adapters(adapters, adapter_ids, weights)
        samples = torch.arange(len(fused), device=x.device)
        ps = [p] * len(fused) if p else None
        return multi_lora_linear(
            x, weight, fused, samples, bias=bias, dropout_ps=ps, batch_invariant=batch_invariant
        )
    ids, weights = (spread_rows(t, x, 1) for t in (adapter_ids, weights))
    delta = _by_rows(F.dropout(x, p) if p else x, adapters, ids, weights, batch_invariant)
    if weight is None:
        return delta if bias is None else delta + bias
    base = invariant_linear if batch_invariant else F.linear
    return base(x, weight, bias) + delta


def _forms_factors(x: Tensor, ids: Tensor, rank: int) -> bool:
    """Whether Ā and B̄ take less work and no more memory than the samples themselves."""
    if x.dim() < 3 or ids.dim() != 2 or x.numel() == 0:
        return False
    rows = x.shape[1:-1].numel()
    return rows > ids.shape[1] and rows >= rank


def fuse_adapters(adapters: AdapterStack, ids: Tensor, weights: Tensor) -> AdapterStack:
    """Σ_j w_bj A_i and Σ_j w_bj s_i B_i for each sample b, i = ids_bj: a stack with an adapter for each.

    Args:
        adapters: those there are.
        ids: ``[samples, k]``; -1 for none.
        weights: of the same shape; differentiable, as the factors and scales are.
    """
    _dispatch.refuse_transforms("multi_lora_fusion")
    samples, count, rank = ids.shape[0], len(adapters), adapters.max_rank
    present, places = torch.arange(count, device=ids.device), ids
    if count > ids.numel() and not torch.compiler.is_compiling():  # a pool of many
        present, places = ids.clamp(min=0).unique(return_inverse=True)
    dtype = torch.promote_types(adapters.scalings.dtype, weights.dtype)
    used = torch.where((ids >= 0) & (ids < count), weights.to(dtype), 0)
    shares = used.new_zeros(samples, len(present)).scatter_add(1, places.clamp(0, len(present) - 1), used)
    pages, live = _pages_of(adapters, present, rank)
    scaled = shares * adapters.scalings[present].to(dtype)
    a, b = (
        _sum_factors(share, data[pages] * live[:, None].to(data.dtype), rank)
        for share, data in ((shares, adapters.a_pages), (scaled, adapters.b_pages))
    )
    first = torch.arange(0, samples * rank, rank, dtype=torch.int32, device=ids.device)
    spans = torch.stack([first, torch.full_like(first, rank)], 1)
    own = torch.arange(samples * rank, dtype=torch.int32, device=ids.device)
    return AdapterStack(a, b, own, spans, adapters.scalings.new_ones(samples), rank)


def _pages_of(adapters: AdapterStack, present: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pages of these adapters, ``rank`` of each, and which of them they really have."""
    spans, ranks = adapters.spans[present], torch.arange(rank, device=present.device)
    live = ranks < spans[:, 1:]
    places = torch.where(live, spans[:, :1] + ranks, 0)
    return adapters.pages[places.flatten()].long(), live.flatten()


def _sum_factors(shares: Tensor, data: Tensor, rank: int) -> Tensor:
    """[samples · rank, C] of shares ``[samples, D]`` and the pages ``[D · rank, C]`` of D adapters."""
    flat = data.view(shares.shape[1], rank * data.shape[1])
    total: Any = _WeightedSum.apply(shares.to(data.dtype), flat)
    return total.view(-1, data.shape[1])


class _WeightedSum(torch.autograd.Function):
    """M F, one row of F after the other: each row of the result by itself, in an order of its own."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(shares, rows)
        total = rows.new_zeros(len(shares), rows.shape[1])
        for share, row in zip(shares.unbind(1), rows, strict=True):
            total.addcmul_(share[:, None], row)
        return written(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        shares, rows = ctx.saved_tensors
        needs_shares, needs_rows = ctx.needs_input_grad
        return grad @ rows.T if needs_shares else None, shares.T @ grad if needs_rows else None


def _by_rows(
    x: Tensor, adapters: AdapterStack, ids: Tensor, weights: Tensor, batch_invariant: bool
) -> Tensor:
    """u = Σ_j w_j A_i x, then Σ_j w_j s_i B_i u: two mixtures, whose other factor is the identity."""
    rank, count = adapters.max_rank, len(adapters)
    pages, live = _pages_of(adapters, torch.arange(count, device=x.device), rank)
    unit = torch.zeros(len(adapters.a_pages), rank, dtype=x.dtype, device=x.device)
    ranks = torch.arange(rank, device=x.device).repeat(count)
    unit = unit.index_put((pages, ranks), live.to(x.dtype), accumulate=True)
    table = (adapters.pages, adapters.spans)
    ones = torch.ones_like(adapters.scalings)
    down = AdapterStack(adapters.a_pages, unit, *table, ones, rank)
    up = AdapterStack(unit, adapters.b_pages, *table, adapters.scalings, rank)
    u = multi_lora_linear(x, None, down, ids, weights, batch_invariant=batch_invariant)
    return multi_lora_linear(u, None, up, ids, weights, batch_invariant=batch_invariant)
