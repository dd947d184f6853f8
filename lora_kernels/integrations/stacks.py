"""What the bridges of both servers check, and how their calls reach the ops."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def slices_of(name: str, stacks: Sequence[Tensor]) -> list[Tensor]:
    """The stacks as ``[adapters, *, *]``, one a slice, rows dense.

    Raises:
        TypeError: a stack is no Tensor, or they have several dtypes.
        ValueError: none, another number of dimensions, several numbers of adapters, or a spaced row.
    """
    if isinstance(stacks, Tensor) or not stacks:
        raise ValueError(f"{name}: expected a sequence of stacks, one a slice, got {type(stacks).__name__}")
    for stack in stacks:
        if not isinstance(stack, Tensor) or stack.dtype != stacks[0].dtype:
            raise TypeError(
                f"{name}: expected Tensors of one dtype, got {[type(s).__name__ for s in stacks]}"
            )
    flat = [stack.squeeze(1) if stack.dim() == 4 and stack.shape[1] == 1 else stack for stack in stacks]
    for stack in flat:
        if stack.dim() != 3 or stack.shape[0] != flat[0].shape[0]:
            shapes = [tuple(s.shape) for s in stacks]
            raise ValueError(f"{name}: expected [adapters, *, *] or [adapters, 1, *, *], got {shapes}")
        if stack.shape[2] > 1 and stack.stride(2) != 1:
            raise ValueError(f"{name}: expected rows with unit stride, got strides {stack.stride()}")
    return flat


def check_shrink(x: Tensor, lora_a: Sequence[Tensor]) -> None:
    """Raises ValueError where x and the stacks of A, which must be alike, do not fit."""
    first = lora_a[0]
    if x.dim() != 2 or x.shape[1] != first.shape[2]:
        raise ValueError(f"inputs: expected shape [tokens, {first.shape[2]}], got {tuple(x.shape)}")
    for stack in lora_a:
        if stack.shape != first.shape or stack.stride() != first.stride():
            raise ValueError(
                f"lora_a_weights: expected slices of one shape and stride, got {tuple(stack.shape)} and"
                f" {tuple(first.shape)}"
            )


def check_expand(y: Tensor, lora_b: Sequence[Tensor], rank: int, offset: int) -> None:
    """Raises ValueError where y, the stacks of B and the rank do not fit."""
    for stack in lora_b:
        if stack.shape[2] != rank or (stack.shape[1] > 1 and stack.stride(1) != rank):
            raise ValueError(
                f"lora_b_weights: expected dense [adapters, N, {rank}] (A's rank), got {tuple(stack.shape)}"
                f" with strides {stack.stride()}"
            )
    end = offset + sum(stack.shape[1] for stack in lora_b)
    if y.dim() != 2 or offset < 0 or y.shape[1] < end:
        raise ValueError(f"output: expected at least {end} columns, got shape {tuple(y.shape)}")
    if y.stride(1) != 1:
        raise ValueError(f"output: expected rows with unit stride, got strides {y.stride()}")
