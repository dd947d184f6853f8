"""The kernels of this package in the places of vLLM's: its stacks, its metadata, its call shapes.

The layout is vLLM 0.33.0's, ``vllm/lora/ops/triton_ops``; vLLM itself is not imported. Stacks are lists
with one tensor a slice (three for a fused query/key/value projection): A ``[max_loras, 1, r, K]`` and B
``[max_loras, 1, N, r]`` with r = max_lora_rank, the 1 optional, scaling already in B. They are read in
place. ``*meta_args`` are the seven that ``LoRAKernelMeta.meta_args`` returns:

    token_lora_mapping ``[T]``, token_indices_sorted_by_lora_ids ``[T]``, num_tokens_per_lora
    ``[max_loras + 1]``, lora_token_start_loc ``[max_loras + 2]``, active_lora_ids ``[max_loras + 1]``,
    no_lora_flag_cpu ``[1]``, num_active_loras ``[1]``

The kernels read the first five on the device, so that a step prepares nothing and captures into a CUDA
graph; launches are bounded by T and max_loras alone. Sums are split by the shape of the stacks and added in
order: a token's result does not depend on the rest of the batch, bit for bit, with no atomics.

A server uses them by assignment, for instance ``vllm.lora.punica_wrapper.punica_gpu.lora_shrink =
lora_kernels.integrations.vllm.lora_shrink``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import _dispatch
from .stacks import check_expand, check_shrink, slices_of


def _idle(no_lora_flag_cpu: Tensor) -> bool:
    """No token uses an adapter. A tracer cannot ask; the kernels then find no segment to work on."""
    return not torch.compiler.is_compiling() and bool(no_lora_flag_cpu.item())


def lora_shrink(
    inputs: Tensor,
    lora_a_weights: Sequence[Tensor],
    output_tensor: Tensor,
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    scaling: float,
) -> None:
    """h[s, t] = scaling · x_t A_{s,i}ᵀ with i the token's adapter, zero for a token without one

    Two launches: partial sums of a split K, and their sum in order. :func:`add_lora_linear` needs no more
    for the whole branch.

    Args:
        inputs: x ``[T, K]``, any floating dtype that the backend takes.
        lora_a_weights: the stacks of A, one a slice, all of one shape.
        output_tensor: h ``[slices, T, r]``, contiguous; nothing is written where no token has an adapter.
        token_lora_mapping: see the module, and so for the other metadata.
        token_indices_sorted_by_lora_ids: tokens, those of one adapter together.
        num_tokens_per_lora: how many of them, for each entry of ``lora_ids``.
        lora_token_start_loc: where they begin.
        lora_ids: adapters in use; negative entries are passed over.
        no_lora_flag_cpu: whether no token has an adapter.
        num_active_loras: not used: the grid does not depend on it.
        scaling: a factor of h.

    Raises:
        TypeError: stacks of several dtypes.
        ValueError: a shape or stride does not fit.
    """
    stacks = slices_of("lora_a_weights", lora_a_weights)
    check_shrink(inputs, stacks)
    want = (len(stacks), inputs.shape[0], stacks[0].shape[1])
    if tuple(output_tensor.shape) != want or not output_tensor.is_contiguous():
        raise ValueError(f"output_tensor: expected shape {want}, dense, got {tuple(output_tensor.shape)}")
    if inputs.shape[0] == 0 or _idle(no_lora_flag_cpu):
        return
    segments = (token_indices_sorted_by_lora_ids, lora_token_start_loc, num_tokens_per_lora, lora_ids)
    _dispatch.call(
        "stacked_lora_shrink", inputs, stacks, *segments, token_lora_mapping, float(scaling), output_tensor
    )


def lora_expand(
    inputs: Tensor,
    lora_b_weights: Sequence[Tensor],
    output_tensor: Tensor,
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """y_t[slice s] (+)= h[s, t] B_{s,i}ᵀ; tokens without an adapter and other columns stay as they are

    One launch. The sum is rounded once, after y is added.

    Args:
        inputs: h ``[slices, T, r]``.
        lora_b_weights: the stacks of B, one a slice; their N may differ.
        output_tensor: y ``[T, >= offset_start + ΣN]``.
        token_lora_mapping: the metadata, as for :func:`lora_shrink`.
        token_indices_sorted_by_lora_ids: as there.
        num_tokens_per_lora: as there.
        lora_token_start_loc: as there.
        lora_ids: as there.
        no_lora_flag_cpu: as there.
        num_active_loras: as there.
        offset_start: the first column of the first slice.
        add_inputs: whether y is added to, or replaced.

    Raises:
        TypeError: stacks of several dtypes.
        ValueError: a shape or stride does not fit.
    """
    stacks = slices_of("lora_b_weights", lora_b_weights)
    if inputs.dim() != 3 or inputs.shape[0] != len(stacks):
        raise ValueError(f"inputs: expected shape [{len(stacks)}, tokens, r], got {tuple(inputs.shape)}")
    check_expand(output_tensor, stacks, inputs.shape[2], offset_start)
    if inputs.shape[1] == 0 or _idle(no_lora_flag_cpu):
        return
    segments = (token_indices_sorted_by_lora_ids, lora_token_start_loc, num_tokens_per_lora, lora_ids)
    _dispatch.call("stacked_lora_expand", inputs, stacks, *segments, offset_start, add_inputs, output_tensor)


def add_lora_linear(
    y: Tensor,
    x: Tensor,
    lora_a_weights: Sequence[Tensor],
    lora_b_weights: Sequence[Tensor],
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    scaling: float = 1.0,
    offset_start: int = 0,
    add_inputs: bool = True,
) -> None:
    """y_t[slice s] (+)= scaling · (x_t A_{s,i}ᵀ) B_{s,i}ᵀ: :func:`lora_shrink` and :func:`lora_expand` in one

    Two launches for all slices, with no buffer to clear between them: the expand adds the partial sums of
    the shrink itself.

    Args:
        y: ``[T, >= offset_start + ΣN]``.
        x: ``[T, K]``.
        lora_a_weights: the stacks of A, one a slice.
        lora_b_weights: the stacks of B, one a slice.
        token_lora_mapping: the metadata, as for :func:`lora_shrink`.
        token_indices_sorted_by_lora_ids: as there.
        num_tokens_per_lora: as there.
        lora_token_start_loc: as there.
        lora_ids: as there.
        no_lora_flag_cpu: as there.
        num_active_loras: as there.
        scaling: a factor of the delta; vLLM passes 1.
        offset_start: the first column of the first slice.
        add_inputs: whether y is added to, or replaced.

    Raises:
        TypeError: stacks of several dtypes.
        ValueError: a shape or stride does not fit.
    """
    stacks_a = slices_of("lora_a_weights", lora_a_weights)
    stacks_b = slices_of("lora_b_weights", lora_b_weights)
    check_shrink(x, stacks_a)
    if len(stacks_b) != len(stacks_a):
        raise ValueError(f"lora_b_weights: expected {len(stacks_a)} slices, got {len(stacks_b)}")
    check_expand(y, stacks_b, stacks_a[0].shape[1], offset_start)
    if x.shape[0] == 0 or _idle(no_lora_flag_cpu):
        return
    segments = (token_indices_sorted_by_lora_ids, lora_token_start_loc, num_tokens_per_lora, lora_ids)
    _dispatch.call(
        "stacked_lora_linear",
        *(x, stacks_a, stacks_b, *segments, None, None, float(scaling), offset_start, add_inputs, y),
    )
