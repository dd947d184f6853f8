"""The kernels of this package under SGLang's stacks and batch description.

The layout is SGLang 0.5.23's, ``sglang/srt/lora``; SGLang itself is not imported. A is one stack
``[slots, slices · r_max, K]`` in which an adapter's slices lie one after the other by its own rank r (slice
s at rows s·r to (s+1)·r), B one stack ``[slots, ΣN, r_max]`` with the slices' columns side by side. An
adapter of rank 0 is the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops import _dispatch
from .stacks import check_expand, slices_of


def add_lora_linear(
    base_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    batch_info: Any,
    output_sizes: Sequence[int] | None = None,
) -> Tensor:
    """y_t[slice s] += scaling_i · (x_t A_{s,i}ᵀ) B_{s,i}ᵀ with i the adapter of the token's segment

    Two launches for all slices, at each adapter's own rank: the shrink and the expand of a whole layer.
    Tokens of a rank-0 adapter stay as they are. The batch is described by an object with the fields of
    SGLang's ``LoRABatchInfo``, of which these are read: ``num_segments``, ``seg_indptr`` (``bs`` + 1 or
    more), ``seg_lens`` (``None``: from ``seg_indptr``, one launch more), ``weight_indices``,
    ``permutation`` (``None``: segments are consecutive tokens), ``lora_ranks`` and ``scalings``. That
    serves its ``csgmv`` batches (a segment is a chunk of tokens of one adapter) and its ``triton`` ones
    (a segment is a request).

    Args:
        base_output: y ``[T, ΣN]``, added to in place.
        x: ``[T, K]``.
        lora_a: the stack of A.
        lora_b: the stack of B.
        batch_info: see above.
        output_sizes: N of each slice, in order; one slice by default.

    Returns:
        ``base_output``.

    Raises:
        ValueError: a shape or stride does not fit.
    """
    sizes = [lora_b.shape[1]] if output_sizes is None else list(output_sizes)
    stack_a, stack_b = slices_of("lora_a", [lora_a])[0], slices_of("lora_b", [lora_b])[0]
    if sum(sizes) != stack_b.shape[1]:
        raise ValueError(f"output_sizes: expected a sum of {stack_b.shape[1]} (lora_b's), got {sizes}")
    if stack_a.shape[1] != len(sizes) * stack_b.shape[2]:
        want = f"{len(sizes)} x {stack_b.shape[2]} rows (slices x lora_b's rank)"
        raise ValueError(f"lora_a: expected {want}, got shape {tuple(stack_a.shape)}")
    if x.dim() != 2 or x.shape[1] != stack_a.shape[2]:
        raise ValueError(f"x: expected shape [tokens, {stack_a.shape[2]}], got {tuple(x.shape)}")
    slices = list(stack_b.split(sizes, 1))
    check_expand(base_output, slices, stack_b.shape[2], 0)
    if x.shape[0] == 0:
        return base_output
    _dispatch.call(
        "stacked_lora_linear",
        *(x, [stack_a], slices, *_segments(batch_info), batch_info.lora_ranks, batch_info.scalings),
        *(1.0, 0, True, base_output),
    )
    return base_output


def _segments(batch_info: Any) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(order, starts, counts, adapters); the batch's tensors may be longer than it."""
    count = batch_info.num_segments
    starts = batch_info.seg_indptr
    lens = batch_info.seg_lens
    lens = starts[: count + 1].diff() if lens is None else lens[:count]
    return batch_info.permutation, starts[:count], lens, batch_info.weight_indices[:count]
