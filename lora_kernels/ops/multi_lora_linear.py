"""One batch, many adapters: the public function, what describes adapters and batch, and the autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch

# Slots of one adapter that a Triton program works on.
TILE_SLOTS = 16


@dataclass(frozen=True)
class AdapterStack:
    """Adapters in two matrices: a page is one rank row of an A with its column of B, whatever the rank.

    Adapter i, with ``first, rank = spans[i]``, owns ``pages[first:first + rank]``, in any order and place;
    no page has two owners. Differentiable in ``a_pages``, ``b_pages`` and ``scalings``.

    Args:
        a_pages: ``[P, K]``, rows of every A.
        b_pages: ``[P, N]``, columns of every B.
        pages: int32 ``[T]``.
        spans: int32 ``[D, 2]``.
        scalings: float32 ``[D]``.
        max_rank: the widest rank among the D adapters.
    """

    a_pages: Tensor
    b_pages: Tensor
    pages: Tensor
    spans: Tensor
    scalings: Tensor
    max_rank: int

    def __len__(self) -> int:
        """The number of adapters, D."""
        return self.spans.shape[0]


def stack_adapters(
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scalings: Sequence[float] | Tensor | float = 1.0
) -> AdapterStack:
    """Puts adapters of any ranks side by side; gradients flow back to each A, B and scaling.

    Args:
        lora_as: one ``[r_i, K]`` an adapter; the ranks may differ, and be 0.
        lora_bs: one ``[N, r_i]`` an adapter.
        scalings: s for all, or one an adapter.

    Raises:
        ValueError: no adapter, or shapes that do not fit each other; the message names which.
    """
    ranks = _check_factors(lora_as, lora_bs)
    device = lora_as[0].device
    if not isinstance(scalings, Tensor):
        many = [float(scalings)] * len(ranks) if isinstance(scalings, (int, float)) else list(scalings)
        scalings = torch.tensor(many, dtype=torch.float32, device=device)
    if scalings.shape != (len(ranks),):
        raise ValueError(
            f"scalings: expected one for each of {len(ranks)}, got shape {tuple(scalings.shape)}"
        )
    widths = torch.tensor(ranks, dtype=torch.int32)
    spans = torch.stack([widths.cumsum(0).int() - widths, widths], 1).to(device)
    pages = torch.arange(sum(ranks), dtype=torch.int32, device=device)
    return AdapterStack(
        torch.cat(list(lora_as)), torch.cat([b.T for b in lora_bs]), pages, spans, scalings, max(ranks)
    )


def _check_factors(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> list[int]:
    """The ranks."""
    if not lora_as or len(lora_as) != len(lora_bs):
        raise ValueError(
            f"lora_bs: expected as many as lora_as, at least one, got {len(lora_bs)} for {len(lora_as)}"
        )
    cols, out = lora_as[0].shape[-1], lora_bs[0].shape[0]
    for i, (a, b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        if a.dim() != 2 or a.shape[1] != cols:
            raise ValueError(f"lora_as[{i}]: expected shape [r, {cols}], got {tuple(a.shape)}")
        if b.shape != (out, a.shape[0]):
            raise ValueError(f"lora_bs[{i}]: expected shape {(out, a.shape[0])}, got {tuple(b.shape)}")
    return [a.shape[0] for a in lora_as]


class BatchPlan(NamedTuple):
    """Which slots are whose; a slot is a row, or one of the k adapters of a row.

    ``order`` has the slots sorted by adapter, those without one last as if they were adapter D's; adapter i
    has ``order[offsets[i]:offsets[i + 1]]``. ``tiles`` cuts that into programs: (adapter, first place).
    """

    ids: Tensor
    order: Tensor
    offsets: Tensor
    tiles: Tensor


def plan_batch(adapter_ids: Tensor, adapters: int) -> BatchPlan:
    """The plan of one batch, for every layer of a step.

    Computed on the device of ``adapter_ids``, with no host sync and shapes that depend on the number of
    slots alone, so that a CUDA graph can hold it.

    Args:
        adapter_ids: integers of any shape; what is not in [0, adapters) means no adapter.
        adapters: how many adapters there are.
    """
    flat = adapter_ids.reshape(-1).long()
    ids = torch.where((flat >= 0) & (flat < adapters), flat, adapters)
    ordered, order = ids.sort(stable=True)
    bounds = torch.arange(adapters + 2, device=ids.device)
    offsets = torch.searchsorted(ordered, bounds)
    counts = (offsets.diff() + TILE_SLOTS - 1) // TILE_SLOTS
    ends = counts.cumsum(0)
    place = torch.arange(flat.numel() // TILE_SLOTS + min(adapters + 1, flat.numel()), device=ids.device)
    owner = torch.searchsorted(ends, place, right=True)
    known = owner.clamp(max=adapters)
    first = offsets[known] + (place - (ends - counts)[known]) * TILE_SLOTS
    tiles = torch.stack([torch.where(owner > adapters, -1, owner), first], 1)
    return BatchPlan(ids, order.int(), offsets.int(), tiles.int())


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    adapter_ids: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dropout_ps: Tensor | Sequence[float] | None = None,
    plan: BatchPlan | None = None,
    training: bool = True,
) -> Tensor:
    """y_m = x_m Wᵀ + b + Σ_j w_mj s_i · (drop_mj(x_m) A_iᵀ) B_iᵀ with i = ids_mj

    Each row of the batch has its own adapter, or k of them with weights (a mixture, Punica, Chen et al.
    2023, arXiv 2310.18547; S-LoRA, Sheng et al. 2023, arXiv 2311.03285). Ranks may differ. The sum over an
    adapter's ranks has an order that depends on that row and adapter alone, so a row's delta is the same,
    bit for bit, whoever else is in the batch (the base product is the vendor's and promises nothing).

    Shapes: x ``[..., K]``, weight ``[N, K]`` or ``None`` (the delta alone), adapter_ids ``[...]`` as x's
    rows, or x's first dimension (one a sample), or ``[..., k]`` with weights of the same shape; y
    ``[..., N]``. Pages may have another floating dtype than x.

    Args:
        x: the input.
        weight: the base weight.
        adapters: of :func:`stack_adapters`, or of a pool.
        adapter_ids: which adapter a row uses; -1 for none.
        weights: the weight of each of a row's adapters; differentiable.
        bias: b ``[N]``.
        dropout_ps: a probability in [0, 1) for each adapter; each row and adapter has its own mask.
        plan: :func:`plan_batch` of these ids, where several layers share it.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape does not fit, or (on the CPU) an id is not below the number of adapters.
    """
    _check(x, weight, adapters, adapter_ids, weights, bias)
    ids = _per_row(adapter_ids, x, weights is not None)
    plan = plan_batch(ids, len(adapters)) if plan is None else plan
    if plan.ids.shape[0] != ids.numel():
        raise ValueError(f"plan: expected one of {ids.numel()} slots, got {plan.ids.shape[0]}")
    # One more, for rows without an adapter.
    scalings = torch.cat([adapters.scalings, adapters.scalings.new_zeros(1)])
    coef = scalings[plan.ids]
    coef = coef if weights is None else coef * weights.reshape(-1).to(coef.dtype)
    ps = _slot_ps(dropout_ps, len(adapters), plan) if training and dropout_ps is not None else None
    if ps is None:
        factors = (adapters.a_pages, adapters.b_pages, adapters.pages, adapters.spans)
        layout = (*factors, coef, plan.order, plan.offsets, plan.tiles, adapters.max_rank)
        y = _dispatch.fused_decode(x, weight, bias, layout)
        if y is not None:
            return y
    return _MultiLoRALinear.apply(
        *(x, weight, bias, adapters.a_pages, adapters.b_pages, coef, adapters.pages, adapters.spans),
        *(plan, ps, adapters.max_rank),
    )


def _per_row(ids: Tensor, x: Tensor, many: bool) -> Tensor:
    """The ids as one a slot."""
    lead = x.shape[:-1]
    if many or ids.shape == lead:
        return ids
    return ids.view(-1, *(1,) * (len(lead) - 1)).expand(lead)


def _slot_ps(dropout_ps: Tensor | Sequence[float], count: int, plan: BatchPlan) -> Tensor | None:
    ps = torch.as_tensor(dropout_ps, dtype=torch.float32)
    if ps.shape != (count,):
        raise ValueError(
            f"dropout_ps: expected one for each of {count} adapters, got shape {tuple(ps.shape)}"
        )
    if ps.device.type == "cpu" and bool(((ps < 0) | (ps >= 1)).any()):
        raise ValueError(f"dropout_ps: expected 0 <= p < 1, got {ps.tolist()}")
    if ps.device.type == "cpu" and not ps.any():
        return None
    return torch.cat([ps, ps.new_zeros(1)]).to(plan.ids.device)[plan.ids]


def _check(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    ids: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises what :func:`multi_lora_linear` promises."""
    if not isinstance(adapters, AdapterStack):
        raise TypeError(f"adapters: expected an AdapterStack, got {type(adapters).__name__}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("weights", weights)):
        _check_tensor(name, tensor, x)
    cols, out = adapters.a_pages.shape[1], adapters.b_pages.shape[1]
    if x.shape[-1:] != (cols,):
        raise ValueError(f"x: expected last dimension {cols} (the adapters'), got shape {tuple(x.shape)}")
    if weight is not None and weight.shape != (out, cols):
        raise ValueError(f"weight: expected shape {(out, cols)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias: expected shape {(out,)}, got {tuple(bias.shape)}")
    _check_ids(x, ids, weights, len(adapters))


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    if tensor is None and name != "x":
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or (name in ("weight", "bias") and tensor.dtype != x.dtype):
        want = "a floating dtype" if name in ("x", "weights") else f"{x.dtype} (x's)"
        raise TypeError(f"{name}: expected {want}, got {tensor.dtype}")


def _check_ids(x: Tensor, ids: Tensor, weights: Tensor | None, count: int) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"adapter_ids: expected a Tensor of integers, got {got}")
    lead = tuple(x.shape[:-1])
    if weights is not None and (weights.shape != ids.shape or tuple(ids.shape[:-1]) != lead):
        want = f"{(*lead, 'k')} for both"
        raise ValueError(f"weights: expected {want}, got {tuple(weights.shape)} and {tuple(ids.shape)}")
    if weights is None and tuple(ids.shape) not in (lead, lead[:1]):
        raise ValueError(f"adapter_ids: expected shape {lead} or {lead[:1]}, got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        largest = int(ids.max())
        if largest >= count:
            raise ValueError(f"adapter_ids: expected below {count}, got {largest}")


class _MultiLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a_pages: Tensor,
        b_pages: Tensor,
        coef: Tensor,
        pages: Tensor,
        spans: Tensor,
        plan: BatchPlan,
        ps: Tensor | None,
        max_rank: int,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = keep_scale = None
        if ps is not None:
            mask = _dispatch.call("row_dropout_mask", _dispatch.draw_seed(x), ps, x.shape[-1])
            keep_scale = 1.0 / (1.0 - ps)
        layout = (a_pages, b_pages, pages, spans, coef, plan.order, plan.offsets, plan.tiles)
        needs_x, needs_weight, _, needs_a, needs_b, needs_coef = ctx.needs_input_grad[:6]
        args = (rows, *layout, mask, keep_scale, max_rank, needs_b or needs_coef)
        ctx.backend = _dispatch.chosen("multi_lora_linear", *args)
        delta, h = _dispatch.call("multi_lora_linear", *args, backend=ctx.backend)
        ctx.max_rank = max_rank
        ctx.save_for_backward(
            x if needs_weight or needs_a else None,
            weight if needs_x else None,
            h if needs_b or needs_coef else None,
            *(mask, keep_scale, *layout),
        )
        y = delta if weight is None else delta.addmm_(rows, weight.T)
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("multi_lora_linear: a double backward is not supported")
        x, weight, h, mask, keep_scale, *layout = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_coef = ctx.needs_input_grad[:6]
        dy_rows = dy.reshape(-1, dy.shape[-1])
        x_rows = None if x is None else x.reshape(-1, x.shape[-1])
        needs = [needs_x, needs_a, needs_b, needs_coef]
        given = iter(
            _dispatch.call(
                "multi_lora_linear_backward",
                *(dy_rows, x_rows if needs_a else None, *layout, h, mask, keep_scale, ctx.max_rank, needs),
                backend=ctx.backend,
            )
        )
        dx, da, db, dcoef = (next(given) if needed else None for needed in needs)
        if dx is not None and weight is not None:
            dx.addmm_(dy_rows, weight)
        return (
            None if dx is None else dx.view(*dy.shape[:-1], dx.shape[-1]),
            dy_rows.T @ x_rows if needs_weight else None,
            dy_rows.sum(0) if needs_bias else None,
            *(da, db, dcoef),
            *(None,) * 5,
        )
