"""Times the ways of the CPU's ops, one example for each class of shapes: what ``tune --cpu`` measures."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _cpu_ways
from .ops.dora_linear import dora_linear
from .ops.lora_linear import lora_linear
from .ops.lora_linear_group import lora_linear_group
from .quant import quantize
from .testing.timers import Sampler, Timer, interleave

MEMBERS = 3
DROPOUT = 0.1
# A forward pass of an op, from its inputs, and what of them gets a gradient.
Call = Callable[[], tuple[Tensor, ...]]


class Example:
    """An op on tensors of one shape: ``forward`` gives its outputs, ``inputs`` get gradients."""

    def __init__(self, op: str, shape: tuple[int, int, int, int]) -> None:
        rows, cols, out, rank = shape
        generator = torch.Generator().manual_seed(0)

        def leaf(*sizes: int, trained: bool = True) -> Tensor:
            return torch.randn(sizes, generator=generator).requires_grad_(trained)

        x, weight = leaf(rows, cols), leaf(out, cols, trained=False)
        a, b = leaf(rank, cols), leaf(out, rank)
        self.inputs = (x, a, b)
        self.forward: Call = _calls(op, x, weight, a, b)
        self.dys = tuple(torch.randn(y.shape, generator=generator) for y in self.forward())

    def backward(self, ys: tuple[Tensor, ...]) -> None:
        """The gradients of the inputs."""
        torch.autograd.grad(ys, self.inputs, self.dys)


def _calls(op: str, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Call:
    p = DROPOUT if op.endswith("dropped") else 0.0
    if op in ("lora_linear", "lora_linear_dropped"):
        return lambda: (lora_linear(x, weight, a, b, dropout_p=p),)
    if op in ("lora_linear_group", "lora_linear_group_dropped"):
        members = [weight] * MEMBERS, [a] * MEMBERS, [b] * MEMBERS
        return functools.partial(lora_linear_group, x, *members, dropout_p=p)
    if op == "dora_linear":
        magnitude = torch.ones(len(weight))
        return lambda: (dora_linear(x, weight, a, b, magnitude),)
    packed = quantize(weight, "int8")
    return lambda: (lora_linear(x, packed, a, b),)


def measure(op: str, shape: tuple[int, int, int, int], timer: Timer, repeats: int) -> _cpu_ways.Times:
    """Microseconds of each way of ``op`` at rows, columns, outputs and rank, and of its backward pass's."""
    known = Example(op, shape)
    name = _cpu_ways.shape_class(shape[0], shape[1] * shape[2], shape[3])
    works: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
        op: (lambda: None, lambda _: known.forward()),
        f"{op}_backward": (known.forward, known.backward),
    }
    times: dict[str, dict[str, dict[str, float]]] = {}
    for direction in (one for one in works if one in _cpu_ways.OPS):
        samplers = {way: _sampler(way, timer, *works[direction]) for way in _cpu_ways.OPS[direction]}
        samples = interleave(samplers, repeats)
        times[direction] = {name: {way: round(statistics.median(us), 2) for way, us in samples.items()}}
    return times


def _sampler(way: str, timer: Timer, prepare: Callable[[], Any], run: Callable[[Any], object]) -> Sampler:
    with _cpu_ways.forced(way):
        sample = timer.sampler(prepare, run)

    def sampler() -> float:
        with _cpu_ways.forced(way):
            return sample()

    return sampler


def ops() -> tuple[str, ...]:
    """The ops that are measured, each with its backward pass."""
    return tuple(op for op in _cpu_ways.OPS if not op.endswith("_backward"))


def merge(times: Iterable[_cpu_ways.Times]) -> _cpu_ways.Times:
    """All of them in one; of a class that was measured twice the times of each way are added."""
    total: dict[str, dict[str, dict[str, float]]] = {}
    for one in times:
        for op, classes in one.items():
            for name, ways in classes.items():
                into = total.setdefault(op, {}).setdefault(name, dict.fromkeys(ways, 0.0))
                for way, us in ways.items():
                    into[way] = round(into[way] + us, 2)
    return total
