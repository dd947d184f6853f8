"""One batch, many adapters: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _dispatch
from ._inputs import autocasts, cast, compute_dtype
from ._multi_function import differentiable
from ._multi_inputs import check, check_target, per_row, slot_ps
from .adapter_stack import AdapterSlices, AdapterStack
from .batch_plan import BatchPlan, plan_batch
from .invariant_linear import invariant_linear


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
    batch_invariant: bool = False,
) -> Tensor:
    """y_m = x_m Wᵀ + b + Σ_j w_mj s_i · (drop_mj(x_m) A_iᵀ) B_iᵀ with i = ids_mj

    Each row of the batch has its own adapter, or k of them with weights (a mixture, Punica, Chen et al.
    2023, arXiv 2310.18547; S-LoRA, Sheng et al. 2023, arXiv 2311.03285). Ranks may differ. The sum over an
    adapter's ranks has an order that depends on that row and adapter alone, so a row's delta is the same,
    bit for bit, whoever else is in the batch, on every backend but the reference (``auto`` has two on a CUDA
    card: small batches get other kernels than large ones). The base product is the vendor's and promises
    nothing. With ``batch_invariant`` both hold, under ``auto`` too.

    Shapes: x ``[..., K]``, weight ``[N, K]`` or ``None`` (the delta alone), adapter_ids ``[...]`` as x's
    rows, or x's first dimension (one a sample), or either with ``k`` after it and weights of the same shape;
    y ``[..., N]``. Pages may have another floating dtype than x. Under autocast x, weight and bias are cast
    to autocast's dtype.

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
        batch_invariant: without gradients, makes all of y the same whoever else is in the batch; see
            :func:`invariant_linear` for the price. The reference then works on one row at a time.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape does not fit, or (on the CPU) an id is not below the number of adapters.
        NotImplementedError: inside ``torch.func``'s transforms or forward-mode differentiation.

    Examples:
        >>> stack = stack_adapters([torch.randn(r, 8) for r in (2, 3)], [torch.randn(4, r) for r in (2, 3)])
        >>> multi_lora_linear(torch.randn(3, 8), torch.randn(4, 8), stack, torch.tensor([0, 1, -1])).shape
        torch.Size([3, 4])
    """
    drops = training and dropout_ps is not None
    if not drops and not batch_invariant and isinstance(adapters, AdapterStack):
        y = _direct(None, x, weight, bias, adapters, adapter_ids, weights, plan)
        if y is not None:
            return y
    if isinstance(x, Tensor) and x.is_floating_point() and autocasts(x):
        # Outside the Function, so that autograd casts the gradients back.
        dtype = compute_dtype(x)
        x, weight, bias = (cast(t, dtype) for t in (x, weight, bias))
    check(x, weight, adapters, adapter_ids, weights, bias)
    ids, weights = per_row(adapter_ids, weights, x)
    plan = _plan_of(ids, len(adapters), plan)
    trained = (x, weight, bias, adapters.a_pages, adapters.b_pages, adapters.scalings, weights)
    if not drops and not _needs_grad(*trained):
        return _infer(x, weight, adapters, weights, bias, plan, batch_invariant)
    ps = slot_ps(dropout_ps, len(adapters), plan) if drops else None
    if weight is None or not batch_invariant:
        return differentiable(x, weight, adapters, weights, bias, ps, plan)
    return invariant_linear(x, weight, bias) + differentiable(x, None, adapters, weights, None, ps, plan)


def _infer(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    weights: Tensor | None,
    bias: Tensor | None,
    plan: BatchPlan,
    batch_invariant: bool,
) -> Tensor:
    if not batch_invariant and x.device.type == "cuda":  # where one launch may do
        factors = (adapters.a_pages, adapters.b_pages, adapters.pages, adapters.spans)
        flat = _flat_weights(weights)
        layout = (*factors, adapters.scalings.float(), flat, *plan[1:], adapters.max_rank)
        y = _dispatch.fused_decode(x, weight, bias, layout)
        if y is not None:
            return y
    y = _base(x, weight, bias, adapters.b_pages.shape[1], batch_invariant)
    _add(y, x, AdapterSlices((adapters,), None), weights, plan, batch_invariant)
    return y


def add_multi_lora_(
    y: Tensor,
    x: Tensor,
    adapters: AdapterStack | AdapterSlices,
    adapter_ids: Tensor,
    weights: Tensor | None = None,
    *,
    plan: BatchPlan | None = None,
) -> Tensor:
    """y_m += Σ_j w_mj s_i · (x_m A_iᵀ) B_iᵀ with i = ids_mj, in place and for inference only

    Shapes: x ``[..., K]``, y ``[..., N]`` of x's dtype with rows that :meth:`Tensor.view` can flatten (they
    may be part of a wider matrix's); with :class:`AdapterSlices` N is the sum of theirs, side by side. All
    else as :func:`multi_lora_linear`, whose delta this adds in two launches; up to 512 rows with one adapter
    each have a CUDA kernel that does four linears in one.

    Returns:
        ``y``.

    Raises:
        RuntimeError: a gradient is wanted.
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape does not fit.

    Examples:
        >>> stack = stack_adapters([torch.randn(2, 8)], [torch.randn(4, 2)])
        >>> y = add_multi_lora_(torch.zeros(3, 4), torch.randn(3, 8), stack, torch.tensor([0, -1, 0]))
        >>> y[1]
        tensor([0., 0., 0., 0.])
    """
    if isinstance(adapters, (AdapterStack, AdapterSlices)):
        done = _direct(y, x, None, None, adapters, adapter_ids, weights, plan)
        if done is not None:
            return done
    slices = AdapterSlices((adapters,), None) if isinstance(adapters, AdapterStack) else adapters
    if not isinstance(slices, AdapterSlices):
        raise TypeError(f"adapters: expected AdapterStack or AdapterSlices, got {type(adapters).__name__}")
    check(x, None, slices.stacks[0], adapter_ids, weights, None)
    check_target(y, x, sum(slices.widths))
    pages = [t for s in slices.stacks for t in (s.a_pages, s.b_pages, s.scalings)]
    if _needs_grad(y, x, weights, *pages):
        raise RuntimeError("add_multi_lora_: it has no gradient; use multi_lora_linear, or torch.no_grad()")
    ids, weights = per_row(adapter_ids, weights, x)
    _add(y, x, slices, weights, _plan_of(ids, len(slices), plan), False)
    return y


def multi_lora_linear_slices(
    x: Tensor,
    base_weights: Sequence[Tensor | None],
    slices: AdapterSlices,
    adapter_ids: Tensor,
    weights: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_ps: Tensor | Sequence[float] | None = None,
    plan: BatchPlan | None = None,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """y_s = multi_lora_linear(x, W_s, stack_s, …) for every linear s that reads x

    Without gradients the deltas of all linears take one pair of launches, or as :func:`add_multi_lora_` one
    for four linears, and the results are views of one matrix ``[..., ΣN_s]``. With gradients, or dropout
    (which each linear draws for itself), each linear is a call of its own, on one plan.

    Args:
        x: the input ``[..., K]``.
        base_weights: W_s ``[N_s, K]`` each, or ``None`` for the deltas alone.
        slices: of :func:`slice_adapters`.
        adapter_ids: as :func:`multi_lora_linear`; so are ``weights``, ``dropout_ps``, ``plan``, ``training``.
        weights: the weight of each of a row's adapters.
        biases: b_s ``[N_s]`` each.
        dropout_ps: a probability for each adapter.
        plan: of :func:`plan_batch`.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape does not fit, or there are not as many weights or biases as linears.

    Examples:
        >>> stack = stack_adapters([torch.randn(2, 8)], [torch.randn(4, 2)])
        >>> weights, slices = [torch.randn(4, 8), None], slice_adapters(stack, stack)
        >>> q, k = multi_lora_linear_slices(torch.randn(3, 8), weights, slices, torch.tensor([0, 0, -1]))
    """
    if not isinstance(slices, AdapterSlices):
        raise TypeError(f"slices: expected AdapterSlices, got {type(slices).__name__}")
    biases = [None] * len(slices.stacks) if biases is None else biases
    for name, many in (("base_weights", base_weights), ("biases", biases)):
        if len(many) != len(slices.stacks):
            raise ValueError(f"{name}: expected {len(slices.stacks)}, got {len(many)}")
    for stack, weight, bias in zip(slices.stacks, base_weights, biases, strict=True):
        check(x, weight, stack, adapter_ids, weights, bias)
    adapter_ids, weights = per_row(adapter_ids, weights, x)
    plan = _plan_of(adapter_ids, len(slices), plan)
    parts = [t for s in slices.stacks for t in (s.a_pages, s.b_pages, s.scalings)]
    if (training and dropout_ps is not None) or _needs_grad(x, weights, *base_weights, *biases, *parts):
        options: dict[str, Any] = {"dropout_ps": dropout_ps, "plan": plan, "training": training}
        return tuple(
            multi_lora_linear(x, weight, stack, adapter_ids, weights, bias, **options)
            for stack, weight, bias in zip(slices.stacks, base_weights, biases, strict=True)
        )
    y = x.new_empty(*x.shape[:-1], sum(slices.widths))
    # Detached, so that each may be written to in place: autograd lets nobody write into what was split.
    views = tuple(view.detach() for view in y.split(slices.widths, -1))
    for view, weight, bias in zip(views, base_weights, biases, strict=True):
        view.copy_(_base(x, weight, bias, view.shape[-1], False))
    if _direct(y, x, None, None, slices, adapter_ids, weights, plan) is None:
        _add(y, x, slices, weights, plan, False)
    return views


def _direct(
    y: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    adapters: AdapterStack | AdapterSlices,
    *batch: Any,
) -> Any:
    """y, or x Wᵀ + b, plus the deltas, by a call of a few microseconds; ``None`` where it cannot be taken."""
    native = _dispatch.short_way("multi_lora")
    return None if native is None else native(y, x, weight, bias, adapters._linears, *batch)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _plan_of(ids: Tensor, adapters: int, plan: BatchPlan | None) -> BatchPlan:
    if plan is None:
        return plan_batch(ids, adapters)
    if plan.ids.shape[0] != ids.numel():
        raise ValueError(f"plan: expected one of {ids.numel()} slots, got {plan.ids.shape[0]}")
    if plan.offsets.shape[0] != adapters + 2:
        raise ValueError(f"plan: expected one of {adapters} adapters, got {plan.offsets.shape[0] - 2}")
    return plan


def _base(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: int, invariant: bool) -> Tensor:
    """What the delta is added to: new memory."""
    if weight is None:
        y = x.new_zeros(*x.shape[:-1], out)
        return y if bias is None else y.add_(bias)
    return invariant_linear(x, weight, bias) if invariant else F.linear(x, weight, bias)


def _add(
    y: Tensor, x: Tensor, slices: AdapterSlices, weights: Tensor | None, plan: BatchPlan, invariant: bool
) -> None:
    target, rows = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    stacks = slices.stacks
    lists = [[getattr(s, name) for s in stacks] for name in ("a_pages", "b_pages", "pages", "spans")]
    lists.append([s.scalings.float() for s in stacks])
    flat = _flat_weights(weights)
    last = (slices.table, slices.max_rank, invariant)
    args = (target, rows, *lists, flat, *plan[1:], *last)
    if not torch.compiler.is_compiling() and not y.is_inference():
        torch.autograd.graph.increment_version(y)  # as torch's own, so that autograd sees the change
    if not invariant or _dispatch.chosen("multi_lora_linear_add", *args) != "reference":
        _dispatch.call("multi_lora_linear_add", *args)
        return
    k = plan.ids.numel() // max(1, len(rows))
    for m in range(len(rows)):
        part = slice(m * k, (m + 1) * k)
        alone = plan_batch(plan.ids[part], len(slices))
        own = None if flat is None else flat[part]
        # A copy starts at an aligned address, as that of any other row does.
        row_args = (target[m : m + 1], rows[m : m + 1].clone(), *lists, own, *alone[1:], *last)
        _dispatch.call("multi_lora_linear_add", *row_args)


def _flat_weights(weights: Tensor | None) -> Tensor | None:
    """One a slot, as kernels read them."""
    return None if weights is None else weights.reshape(-1).float().contiguous()
