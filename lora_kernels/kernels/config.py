"""Tile shapes: pure functions of the problem, so that they can be read and tested without a card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

# Enough programs to give each multiprocessor of a large card two of them; a constant and not the
# card's own count, so that sums are split, and rounded, the same way on every card.
TARGET_PROGRAMS = 264
# The pass over dY has one program a multiprocessor: every further one would write more partial sums.
DY_PROGRAMS = 132
# Above this rank the partial sums of the pass over dY outweigh dY itself, and the vendor's GEMM, which
# reads dY twice and writes none, moves fewer bytes.
DY_PASS_MAX_RANK = 32


@dataclass(frozen=True)
class Tile:
    """One launch: rows and columns a step, the padded rank, and the pipeline."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 3


T = TypeVar("T", bound=Tile)
# What a plan changes in the tile of one pass: fields of it, by name.
Changes = Mapping[str, int] | None


def replaced(tile: T, changes: Changes) -> T:
    """The tile with some of its fields changed."""
    return dataclasses.replace(tile, **changes) if changes else tile


def stages(tile: Tile, amd: bool) -> int:
    """The pipeline's depth: AMD's compute units have 64 KiB to keep it in, and want two."""
    return min(tile.num_stages, 2) if amd else tile.num_stages


def padded_rank(rank: int) -> int:
    """The rank as the tensor cores take it: a power of two of at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _narrow(width: int, itemsize: int) -> int:
    """Half the columns for 4-byte elements: the same bytes in shared memory."""
    return max(16, width // 2) if itemsize == 4 else width


def forward_tile(rows: int, rank: int, itemsize: int) -> Tile:
    """For the pass over x that gives h and y₀."""
    block_r = padded_rank(rank)
    tall = 64 if block_r * itemsize <= 128 else 32
    block_m = 16 if rows <= 2048 and block_r <= 64 else tall
    if block_r <= 32:
        return Tile(block_m, _narrow(128, itemsize), block_r)
    if block_r <= 128:
        return Tile(block_m, _narrow(64, itemsize), block_r)
    return Tile(block_m if block_r == 256 else 16, _narrow(32, itemsize), block_r, num_warps=8, num_stages=2)


def dy_tile(rows: int, out: int, rank: int, itemsize: int, lean: bool = False) -> Tile:
    """For the pass over dY, whose programs each write a part of U for their rows and of dB for their
    columns: the wider and the squarer a program's share of dY, the fewer partial sums there are.

    ``lean``: strips of 128 columns, where registers must do for more than U and dB.
    """
    block_r = padded_rank(rank)
    if block_r > 64:
        return _wide_rank_tile(block_r, itemsize)
    square = 1 << round(math.log2(max(1.0, math.sqrt(rows * out / DY_PROGRAMS))))
    width = 128 if lean else min(max(128, square), 512 if block_r == 16 else 256)
    warps = 4 if width == 128 and block_r <= 32 else 8
    return Tile(64 if width == 128 else 32, _narrow(width, itemsize), block_r, num_warps=warps)


def x_tile(rank: int, itemsize: int) -> Tile:
    """For the pass over x, which holds a tile of x and one of dX₀: half the columns of dY's."""
    block_r = padded_rank(rank)
    if block_r <= 64:
        return Tile(64, _narrow(64, itemsize), block_r, num_warps=4)
    return _wide_rank_tile(block_r, itemsize)


def norm_tile(rank: int, itemsize: int) -> Tile:
    """For the pass over W that gives its row norms: few rows, so that there are programs enough."""
    block_r = padded_rank(rank)
    wide = 128 if block_r <= 64 else 64 if block_r <= 256 else 32
    return Tile(16, _narrow(wide, itemsize), block_r)


def _wide_rank_tile(block_r: int, itemsize: int) -> Tile:
    if block_r <= 128:
        return Tile(32, _narrow(64, itemsize), block_r, num_warps=8, num_stages=2)
    return Tile(32 if block_r == 256 else 16, _narrow(32, itemsize), block_r, num_warps=8, num_stages=2)


def row_chunks(rows: int, cols: int, tile: Tile, programs: int = TARGET_PROGRAMS) -> tuple[int, int]:
    """(number of chunks, rows in each) for a grid of column strips and row chunks."""
    steps = -(-rows // tile.block_m)
    strips = -(-cols // tile.block_c)
    chunks = min(steps, max(1, programs // strips))
    rows_per_chunk = -(-steps // chunks) * tile.block_m
    return -(-rows // rows_per_chunk), rows_per_chunk


@dataclass(frozen=True)
class PageTile(Tile):
    """A tile of the multi-adapter kernels, and how the shrink's columns are split among programs."""

    splits: int = 1
    cols_per_split: int = 0


def page_tile(cols: int, rank: int, itemsize: int, masked: bool = False) -> PageTile:
    """By the pages' shape and not the batch's, so that no row's sum depends on its company."""
    block_c = _narrow(128, itemsize)
    steps = -(-cols // block_c)
    splits = max(1, min(16, steps // 4))
    each = -(-steps // splits) * block_c
    block_r = min(32, padded_rank(rank))
    # With the keep bits to unpack, or with 4-byte elements, four warps run out of registers.
    warps = 8 if masked or itemsize == 4 else 4
    splits = -(-cols // each) if cols else 1
    stages = 2 if masked and itemsize == 2 else 3
    return PageTile(16, block_c, block_r, warps, stages, splits=splits, cols_per_split=max(1, each))


@dataclass(frozen=True)
class GemmTile(Tile):
    """A tile of a kernel that multiplies by the base weight: also the step along the summed dimension,
    and how many row blocks go over the same columns before the next ones are read.
    """

    block_k: int = 64
    group_m: int = 8


def kext_tile(rows: int, rank: int, itemsize: int, card: str) -> GemmTile:
    """For the GEMM that takes the branch along. The rank is padded to a step, and looped over."""
    block_r = min(64, padded_rank(rank))
    if card == "cpu":  # the interpreter: several tiles and steps of small shapes
        return GemmTile(32, 32, min(32, block_r), block_k=32, group_m=2)
    block_m = 64 if rows <= 64 else 128
    block_k = _narrow(64, itemsize)
    if card == "sm_90":
        return GemmTile(block_m, _narrow(256, itemsize), block_r, 8, 3, block_k=block_k)
    # Where an operand tile of 4-byte elements takes a third stage, a fourth does not fit.
    return GemmTile(block_m, 128, min(32, block_r), 8, 4 if itemsize == 2 else 3, block_k=block_k)


def single_tile(rows: int, rank: int, itemsize: int) -> GemmTile:
    """For few rows: narrow blocks of columns give each multiprocessor one, long steps keep it fed."""
    block_r = padded_rank(rank)
    block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
    block_k = 128 if block_r <= 32 else 64 if block_r <= 128 else 32
    stages = 4 if block_r <= 64 else 2
    return GemmTile(block_m, 32, block_r, 4, stages, block_k=_narrow(block_k, itemsize))


def invariant_tile(itemsize: int) -> Tile:
    """For ``invariant_linear``: one shape for every batch. ``block_r`` are columns of y."""
    return Tile(16, _narrow(128, itemsize), 64, num_warps=8 if itemsize == 4 else 4)


def group_forward_tile(rows: int, members: int, rank: int, itemsize: int, dropout: bool) -> Tile:
    """For the pass over the x of a group: each member keeps sums of its own, so rows are few."""
    block_r = padded_rank(rank)
    width = members * block_r
    block_m = 16 if rows <= 2048 else 64 if width <= 64 else 32
    if width <= 64:
        return Tile(
            block_m, _narrow(128 if dropout else 64, itemsize), block_r, num_warps=8 if dropout else 4
        )
    return Tile(block_m, _narrow(64, itemsize), block_r, num_warps=4 if width <= 128 else 8)


def group_x_tile(members: int, rank: int, itemsize: int, dropout: bool) -> Tile:
    """For the pass over x that gives the dA of all members and their common dX₀."""
    block_r = padded_rank(rank)
    if members * block_r <= 64:
        return Tile(64, _narrow(64, itemsize), block_r, num_warps=8 if dropout else 4)
    return Tile(32, _narrow(32, itemsize), block_r, num_warps=8, num_stages=2)


# Rows up to which a quantised weight is decoded inside the tile that multiplies it, and the widest branch
# that each of its programs computes along the way.
QUANTIZED_ROWS = 64
QUANTIZED_RANK = 64


@dataclass(frozen=True)
class QuantizedTile(Tile):
    """A tile of the linear over a quantised weight: ``block_n`` rows of W."""

    block_n: int = 32


def quantized_tile(rows: int, rank: int, itemsize: int) -> QuantizedTile:
    """All rows of x in one tile, so that W is decoded once."""
    block_m = min(64, max(16, 1 << (rows - 1).bit_length()))
    return QuantizedTile(block_m, _narrow(128, itemsize), padded_rank(rank), 4, 2)


# Bytes of a row of the widest gate, and of the longest token, that a program holds on chip.
CHAIN_GATE = 256
CHAIN_TOKEN = 16384


def padded_axes(dims: Sequence[int]) -> tuple[int, ...]:
    """Each a power of two, and of at least four: a pair then has the columns that tensor cores take."""
    return tuple(max(4, 1 << (d - 1).bit_length()) for d in dims)


def chain_fits(dims: Sequence[int], itemsize: int) -> bool:
    """Whether a token of such axes and every gate stay on chip."""
    pads = sorted(padded_axes(dims))
    return max(math.prod(pads) / CHAIN_TOKEN, pads[-1] * pads[-2] / CHAIN_GATE) * itemsize <= 1


def chain_tile(
    rows: int, dims: Sequence[int], itemsize: int, backward: bool = False, amd: bool = False
) -> Tile:
    """For a chain of gates: ``block_m`` tokens of ``block_c`` places, the widest gate of ``block_r`` columns.

    ``backward``: for the gates' gradients. AMD's threads have 512 registers where there are few of them.
    """
    pads = sorted(padded_axes(dims))
    token, gate = math.prod(pads), pads[-1] * pads[-2]
    elements = (4096 if backward else 16384) // (2 if itemsize == 4 else 1)
    tokens = min(max(1, elements // token), 1 << max(0, rows - 1).bit_length())
    tokens = max(tokens, 16 * gate // token)  # a product of 16 rows or more
    return Tile(tokens, token, gate, num_warps=4 if backward and amd else 8, num_stages=2)


def chain_chunks(rows: int, tile: Tile) -> tuple[int, int]:
    """(chunks of tokens, tokens in each): one part of the gradients is written for each."""
    steps = -(-rows // tile.block_m)
    each = -(-steps // DY_PROGRAMS) * tile.block_m
    return -(-rows // each), each


def chain_groups(sizes: Sequence[int], needs: Sequence[bool], roomy: bool = True) -> list[tuple[int, int]]:
    """The (first, last) gates whose gradients one launch sums.

    ``roomy``: whether products take their operands from shared memory (sm_90 and later), and leave registers
    for more sums.
    """
    room = 8192 if roomy else 4096
    groups: list[list[int]] = []
    for at in (at for at, needed in enumerate(needs) if needed):
        group = groups[-1] if groups else []
        fits = sum(sizes[k] ** 2 for k in (*group, at)) <= room
        if group and group[-1] == at - 1 and fits:
            group.append(at)
        else:
            groups.append([at])
    return [(group[0], group[-1]) for group in groups]
