"""Tile shapes: pure functions of the problem, so that they can be read and tested without a card."""

from __future__ import annotations

from dataclasses import dataclass

# Enough programs to give each multiprocessor of a large card two of them; a constant and not the
# card's own count, so that sums are split, and rounded, the same way on every card.
TARGET_PROGRAMS = 264


@dataclass(frozen=True)
class Tile:
    """One launch: rows and columns a step, the padded rank, and the pipeline."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 3


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


def dy_tile(rank: int, itemsize: int) -> Tile:
    """For the pass over dY. U's partials are written once a strip, so strips are wide."""
    block_r = padded_rank(rank)
    if block_r <= 64:
        return Tile(64, _narrow(128, itemsize), block_r, num_warps=4 if block_r <= 32 else 8)
    return _wide_rank_tile(block_r, itemsize)


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


def row_chunks(rows: int, cols: int, tile: Tile) -> tuple[int, int]:
    """(number of chunks, rows in each) for a grid of column strips and row chunks."""
    steps = -(-rows // tile.block_m)
    strips = -(-cols // tile.block_c)
    chunks = min(steps, max(1, TARGET_PROGRAMS // strips))
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
    # With the keep bits to unpack, four warps run out of registers.
    warps, splits = 8 if masked else 4, -(-cols // each) if cols else 1
    return PageTile(16, block_c, block_r, warps, splits=splits, cols_per_split=max(1, each))
