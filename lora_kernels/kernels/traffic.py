"""Bytes that each pass moves, from the tiles and grids that its launcher uses, and the floor below them.

``memory`` is what goes to and from device memory: what the grid reads again and is small enough to stay
in the L2 cache (A, B, h, dH) counts once, partial sums count as written and as read. ``requested``
is every byte that a program asks for, wherever it comes from. ``floor`` is each operand once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..planner import Plan, Problem
from ..reference.gate_chain import pairs
from .config import (
    DY_PASS_MAX_RANK,
    DY_PROGRAMS,
    chain_chunks,
    chain_fits,
    chain_groups,
    chain_tile,
    dy_tile,
    forward_tile,
    kext_tile,
    padded_axes,
    replaced,
    row_chunks,
    single_tile,
    x_tile,
)

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Below this an operand that programs share stays in the L2 cache of an A100 (40 MB) or H100 (50 MB).
_IN_CACHE = 8 << 20


@dataclass(frozen=True)
class Traffic:
    """One launch, or a launch with the sums of its parts; bytes."""

    name: str
    floor: int
    memory: int
    requested: int
    launches: int = 1

    @property
    def ratio(self) -> float:
        """``memory`` over ``floor``."""
        return self.memory / self.floor


def _count(name: str, operands: list[tuple[int, int]], parts: int = 0, launches: int = 1) -> Traffic:
    """From (bytes, how many programs read or write each of them) and the bytes of partial sums."""
    floor = sum(size for size, _ in operands)
    memory = sum(size if size <= _IN_CACHE else size * times for size, times in operands) + 2 * parts
    requested = sum(size * times for size, times in operands) + 2 * parts
    return Traffic(name, floor, memory, requested, launches)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _mask(p: Problem) -> int:
    return p.rows * _blocks(p.cols, 8) if p.dropout else 0


def branch_pass(p: Problem, plan: Plan, expand: bool = True) -> Traffic:
    """x → h, keep bits and, with ``expand``, y₀."""
    item = ITEMSIZE[p.dtype]
    tile = replaced(forward_tile(p.rows, p.rank, item), plan.tile.get("forward"))
    programs = _blocks(p.rows, tile.block_m)
    operands = [(p.rows * p.cols * item, 1), (_mask(p), 1), (p.rows * p.rank * item, 1)]
    operands.append((p.rank * p.cols * item, programs))
    if expand:
        operands += [(p.out * p.rank * item, programs), (p.rows * p.out * item, 1)]
    return _count("branch_pass", operands)


def dy_pass(p: Problem, plan: Plan) -> Traffic:
    """dY → U and dB."""
    item = ITEMSIZE[p.dtype]
    dy, h = p.rows * p.out * item, p.rows * p.rank * item
    b = p.out * p.rank * item
    if p.rank > DY_PASS_MAX_RANK:
        return _count("dy_products", [(dy, 2), (h, 1), (b, 1), (h, 1), (b, 1)], launches=2)
    tile = replaced(dy_tile(p.rows, p.out, p.rank, item, p.card.startswith("gfx")), plan.tile.get("dy"))
    strips = _blocks(p.out, tile.block_c)
    chunks, _ = row_chunks(p.rows, p.out, tile, DY_PROGRAMS)
    parts = 4 * p.rank * (strips * p.rows + chunks * p.out)
    return _count("dy_pass", [(dy, 1), (h, strips), (b, chunks), (h, 1), (b, 1)], parts, launches=3)


def x_pass(p: Problem, plan: Plan, needs_dx: bool = True) -> Traffic:
    """x, dH and the keep bits → dA and, with ``needs_dx``, dX₀."""
    item = ITEMSIZE[p.dtype]
    tile = replaced(x_tile(p.rank, item), plan.tile.get("x"))
    strips = _blocks(p.cols, tile.block_c)
    chunks, _ = row_chunks(p.rows, p.cols, tile)
    x, a = p.rows * p.cols * item, p.rank * p.cols * item
    operands = [(x, 1), (_mask(p), 1), (p.rows * p.rank * item, strips), (a, chunks), (a, 1)]
    operands += [(x, 1)] if needs_dx else []
    return _count("x_pass", operands, parts=4 * p.rank * chunks * p.cols, launches=2)


def vendor_gemm(p: Problem) -> Traffic:
    """The base product of either direction by the vendor, added to what the passes wrote."""
    item, (inner, cols) = ITEMSIZE[p.dtype], _gemm_sizes(p)
    result = p.rows * cols * item
    return _count("gemm", [(p.rows * inner * item, 1), (inner * cols * item, 1), (result, 2)])


def kext_gemm(p: Problem, plan: Plan) -> Traffic:
    """kext's GEMM; that row blocks of a group share the weight in the cache is taken for granted."""
    item, (inner, cols) = ITEMSIZE[p.dtype], _gemm_sizes(p)
    tile = replaced(kext_tile(p.rows, p.rank, item, p.card), plan.tile.get("gemm"))
    across, down = _blocks(cols, tile.block_c), _blocks(p.rows, tile.block_m)
    once = [p.rows * inner * item, inner * cols * item, p.rows * p.rank * item, p.rank * cols * item]
    rest = p.rows * cols * item + (_mask(p) if p.op.endswith("backward") else 0)
    requested = (once[0] + once[2]) * across + (once[1] + once[3]) * down + rest
    return Traffic("kext", sum(once) + rest, sum(once) + rest, requested)


def single(p: Problem, plan: Plan) -> Traffic:
    """The one launch of single's forward pass."""
    item = ITEMSIZE[p.dtype]
    tile = replaced(single_tile(p.rows, p.rank, item), plan.tile.get("single"))
    across, down = _blocks(p.out, tile.block_c), _blocks(p.rows, tile.block_m)
    x, h = p.rows * p.cols * item, p.rows * p.rank * item
    operands = [(x, across), (p.cols * p.out * item, down), (p.cols * p.rank * item, across * down)]
    operands += [(p.out * p.rank * item, down), (h, 1), (_mask(p), 1), (p.rows * p.out * item, 1)]
    return _count("single", operands)


def _gemm_sizes(p: Problem) -> tuple[int, int]:
    return (p.out, p.cols) if p.op.endswith("backward") else (p.cols, p.out)


def gate_chain(rows: int, cols: int, out: int, dims: Sequence[int], dtype: str) -> list[Traffic]:
    """What a step of a chain of gates launches beside the base products, which add to what it writes."""
    item, pads = ITEMSIZE[dtype], padded_axes(dims)
    if not chain_fits(dims, item):  # the vendor's products between copies
        return []
    sizes = [pads[j] * pads[i] for i, j in pairs(len(dims))]
    gates = sum(size * size for size in sizes) * item
    x, y = rows * cols * item, rows * out * item
    programs = _blocks(rows, chain_tile(rows, dims, item).block_m)
    found = [_count(f"chain {name}", [(x, 1), (y, 1), (gates, programs)]) for name in ("y", "dX")]
    chunks, _ = chain_chunks(rows, chain_tile(rows, dims, item, backward=True))
    steps = _blocks(rows, chain_tile(rows, dims, item, backward=True).block_m)
    for first, last in chain_groups(sizes, [True] * len(sizes)):
        sums = sum(size * size for size in sizes[first : last + 1])
        operands = [(x, 1), (y, 1), (gates, steps), (sums * item, 1)]
        found.append(_count(f"grads {first}-{last}", operands, 4 * chunks * sums, launches=2))
    return found


def launches(p: Problem, plan: Plan) -> list[Traffic]:
    """All that a strategy launches for the problem, in order."""
    if p.op == "lora_linear":
        if plan.strategy == "single":
            return [single(p, plan)]
        if plan.strategy == "kext":
            return [branch_pass(p, plan, expand=False), kext_gemm(p, plan)]
        return [branch_pass(p, plan), vendor_gemm(p)]
    if plan.strategy == "kext":
        return [dy_pass(p, plan), x_pass(p, plan, needs_dx=False), kext_gemm(p, plan)]
    return [dy_pass(p, plan), x_pass(p, plan), vendor_gemm(p)]


@dataclass(frozen=True)
class Card:
    """Rates that a prediction takes: bytes and half-precision operations a second."""

    bandwidth: float
    flops: float


# sm_90: a copy and a GEMM measured on an H100. sm_80: nine tenths of an A100's data sheet.
CARDS = {"sm_90": Card(3.0e12, 798e12), "sm_80": Card(1.8e12, 280e12)}
# What is assumed, until it is measured, of our own GEMM against the vendor's, and of a launch.
GEMM_EFFICIENCY = {"gemm": 1.0, "kext": 0.9, "single": 0.5}
LAUNCH_S = 2.5e-6


def predict(p: Problem, plan: Plan) -> float:
    """Microseconds: each launch at the slower of its bytes and its operations, and a gap before it."""
    rates, total = CARDS[p.card], 0.0
    for launch in launches(p, plan):
        seconds = launch.memory / rates.bandwidth
        if launch.name in GEMM_EFFICIENCY:
            flops = 2.0 * p.rows * p.cols * p.out * (ITEMSIZE[p.dtype] / 2)
            seconds = max(seconds, flops / (rates.flops * GEMM_EFFICIENCY[launch.name]))
        total += seconds + launch.launches * LAUNCH_S
    return total * 1e6
