"""Every op's fake kernel: the results as empty tensors, which are what a tracer is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._arguments import (
    DequantizeInputs,
    DoraBackward,
    DoraInputs,
    GroupBackward,
    GroupedBackward,
    GroupedInputs,
    GroupInputs,
    LoraBackward,
    LoraInputs,
    MultiBackward,
    MultiInputs,
    QuantizedInputs,
    flat,
)


def dropout_seed(like: Tensor) -> Tensor:
    return like.new_empty(1, dtype=torch.int64)


def dropout_mask(seed: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    return seed.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8)


@flat(LoraInputs)
def lora_linear(inputs: LoraInputs) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs.x
    rows, cols = inputs.branch.shape
    mask_shape = (0,) if inputs.seed is None else (rows, (cols + 7) // 8)
    return (
        x.new_empty(rows, inputs.lora_b.shape[0]),
        x.new_empty(rows, inputs.lora_a.shape[0]),
        x.new_empty(mask_shape, dtype=torch.uint8),
    )


@flat(LoraBackward)
def lora_linear_backward(saved: LoraBackward) -> list[Tensor]:
    dy, needs = saved.dy, saved.needs
    branch = dy.new_empty(dy.shape[0], saved.lora_a.shape[1])
    dx = branch if saved.weight is None else dy.new_empty(dy.shape[0], saved.weight.shape[1])
    return _empty_like((dx, saved.lora_a, saved.lora_b, saved.gate, branch), needs)


def _empty_like(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(like, memory_format=torch.contiguous_format)
        for like, needed in zip(likes, needs, strict=True)
        if needed and like is not None
    ]


def row_dropout_mask(seed: Tensor, dropout_ps: Tensor, cols: int) -> Tensor:
    return seed.new_empty(dropout_ps.shape[0], (cols + 7) // 8, dtype=torch.uint8)


@flat(MultiInputs)
def multi_lora_linear(inputs: MultiInputs) -> tuple[Tensor, Tensor]:
    x, slots = inputs.x, inputs.order.shape[0] if inputs.keep_h else 0
    return x.new_empty(x.shape[0], inputs.b_pages.shape[1]), x.new_empty(slots, inputs.max_rank)


@flat(MultiBackward)
def multi_lora_linear_backward(saved: MultiBackward) -> list[Tensor]:
    dx = saved.dy.new_empty(saved.dy.shape[0], saved.a_pages.shape[1])
    return _empty_like((dx, saved.a_pages, saved.b_pages, saved.coef), saved.needs)


def low_rank_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))


@flat(DoraInputs)
def dora_linear(inputs: DoraInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, lora_a, lora_b, _, bias, seed, *_ = inputs
    y, h, mask = lora_linear(x, weight, lora_a, lora_b, bias, None, None, seed)
    return y, y.new_empty(x.shape[0] if inputs.keep_z else 0, y.shape[1]), h, mask


@flat(DoraBackward)
def dora_linear_backward(saved: DoraBackward) -> list[Tensor]:
    dx = saved.dy.new_empty(saved.dy.shape[0], saved.lora_a.shape[1])
    return _empty_like((dx, saved.lora_a, saved.lora_b, saved.scale), saved.needs)


@flat(GroupInputs)
def lora_linear_group(inputs: GroupInputs) -> list[Tensor]:
    x = inputs.x
    rows, cols = x.shape
    ys = [x.new_empty(rows, b.shape[0]) for b in inputs.lora_bs]
    hs = [x.new_empty(rows, a.shape[0]) for a in inputs.lora_as]
    dropping = sum(p > 0.0 for p in inputs.dropout_ps)
    return ys + hs + [x.new_empty(rows, (cols + 7) // 8, dtype=torch.uint8) for _ in range(dropping)]


@flat(GroupBackward)
def lora_linear_group_backward(saved: GroupBackward) -> list[Tensor]:
    dx = saved.dys[0].new_empty(saved.dys[0].shape[0], saved.lora_as[0].shape[1])
    members = zip(saved.lora_as, saved.lora_bs, saved.gates, strict=True)
    return _empty_like((dx, *(like for member in members for like in member)), saved.needs)


@flat(GroupedInputs)
def grouped_lora_linear(inputs: GroupedInputs) -> tuple[Tensor, Tensor]:
    x, rows = inputs.x, inputs.x.shape[0]
    return x.new_empty(rows, inputs.weight.shape[1]), x.new_empty(rows, inputs.lora_a.shape[1])


@flat(GroupedBackward)
def grouped_lora_linear_backward(saved: GroupedBackward) -> list[Tensor]:
    dy, weight = saved.dy, saved.weight
    dx, dbias = dy.new_empty(dy.shape[0], weight.shape[2]), dy.new_empty(weight.shape[:2])
    return _empty_like((dx, weight, saved.lora_a, saved.lora_b, dbias), saved.needs)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def glu_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def in_place(*args: object) -> None:
    """Nothing is returned, and what is written keeps its shape."""


@flat(DequantizeInputs)
def dequantize(inputs: DequantizeInputs) -> Tensor:
    return inputs.codes.new_empty(inputs.rows, inputs.cols, dtype=inputs.dtype)


@flat(QuantizedInputs)
def quantized_lora_linear(inputs: QuantizedInputs) -> tuple[Tensor, Tensor, Tensor]:
    return lora_linear(*inputs.over(None))


FAKES: dict[str, Callable[..., object]] = {
    "dropout_seed": dropout_seed,
    "dropout_mask": dropout_mask,
    "low_rank_norm": low_rank_norm,
    "dora_linear": dora_linear,
    "dora_linear_backward": dora_linear_backward,
    "lora_linear": lora_linear,
    "lora_linear_backward": lora_linear_backward,
    "row_dropout_mask": row_dropout_mask,
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_linear_backward": multi_lora_linear_backward,
    "invariant_linear": invariant_linear,
    "lora_linear_group": lora_linear_group,
    "lora_linear_group_backward": lora_linear_group_backward,
    "dequantize": dequantize,
    "quantized_linear": in_place,
    "quantized_lora_linear": quantized_lora_linear,
    "grouped_lora_linear": grouped_lora_linear,
    "grouped_lora_linear_backward": grouped_lora_linear_backward,
    "glu": glu,
    "glu_backward": glu_backward,
    "gate_chain": in_place,
    "gate_chain_backward": in_place,
}
