"""A chain of gates on pairs of axes: a tile of tokens stays on chip from the first gate to the last.

A gate on axes (j, i) sees a tile as ``[A, d_j, B, d_i, C]``: it is permuted to rows ``[A B C]`` of
``d_j d_i`` columns, multiplied and permuted back. Forward, and dX by the transposed chain, read and write
each activation once. The gates' gradients are summed over chunks of tokens by launches of as many gates as
there is room for, which compute anew, from x and from dY, what these gates read and what comes back to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import GateChainBackward, flat
from ..reference import gate_chain as reference
from .config import (
    Tile,
    chain_chunks,
    chain_fits,
    chain_groups,
    chain_tile,
    padded_axes,
    stages,
)
from .launch import has_descriptors, precision, unit_columns
from .passes import sum_parts
from .primitives import cast, dot


@triton.jit
def _columns(DIMS: tl.constexpr, PADS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of each place in a padded token its column in x, and whether it has one."""
    place = tl.arange(0, BLOCK_C)
    column, inside = place, place >= 0
    if DIMS is not None:
        column = place * 0
        stride = 1
        for back in tl.static_range(1, len(DIMS) + 1):
            index = place % PADS[-back]
            place = place // PADS[-back]
            column += index * stride
            inside = inside & (index < DIMS[-back])
            stride = stride * DIMS[-back]
    return column, inside


@triton.jit
def _offsets(rows, columns, inside, M, width, stride):
    """Where a tile of tokens lies, and what of it is there."""
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return offsets, (rows[:, None] < M) & (inside & (columns < width))[None, :]


@triton.jit
def _turn(h, VIEWS: tl.constexpr, K: tl.constexpr):
    """The rows that gate K, on axes 1 and 3 of its view, multiplies."""
    A: tl.constexpr = VIEWS[5 * K]
    J: tl.constexpr = VIEWS[5 * K + 1]
    B: tl.constexpr = VIEWS[5 * K + 2]
    L: tl.constexpr = VIEWS[5 * K + 3]
    C: tl.constexpr = VIEWS[5 * K + 4]
    return tl.reshape(tl.permute(tl.reshape(h, (A, J, B, L, C)), (0, 2, 4, 1, 3)), (A * B * C, J * L))


@triton.jit
def _turn_back(rows, VIEWS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The reverse of :func:`_turn`."""
    A: tl.constexpr = VIEWS[5 * K]
    J: tl.constexpr = VIEWS[5 * K + 1]
    B: tl.constexpr = VIEWS[5 * K + 2]
    L: tl.constexpr = VIEWS[5 * K + 3]
    C: tl.constexpr = VIEWS[5 * K + 4]
    return tl.reshape(tl.permute(tl.reshape(rows, (A, B, C, J, L)), (0, 3, 1, 4, 2)), (BLOCK_M, BLOCK_C))


@triton.jit
def _apply(
    h,
    gate_ptrs,
    VIEWS: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gate K on a tile, or with TRANSPOSE its transpose; rounded to the tile's dtype, as eager does."""
    SIZE: tl.constexpr = VIEWS[5 * K + 1] * VIEWS[5 * K + 3]
    one, other = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    if TRANSPOSE:
        gate = tl.load(gate_ptrs[K] + one * SIZE + other)
    else:
        gate = tl.load(gate_ptrs[K] + other * SIZE + one)
    out = dot(_turn(h, VIEWS, K), gate, tl.zeros((BLOCK_M * BLOCK_C // SIZE, SIZE), tl.float32), PRECISION)
    return _turn_back(cast(out, h.dtype), VIEWS, K, BLOCK_M, BLOCK_C)


@triton.jit(do_not_specialize=["M"])
def gate_chain_kernel(
    x_ptr,
    gate_ptrs,
    out_ptr,
    M,
    K,
    N,
    stride_xm,
    stride_om,
    MEMBERS: tl.constexpr,
    VIEWS: tl.constexpr,
    DIMS: tl.constexpr,
    PADS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gates in turn on BLOCK_M tokens: x read once, out written once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, inside = _columns(DIMS, PADS, BLOCK_C)
    offsets, mask = _offsets(rows, columns, inside, M, K, stride_xm)
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    for k in tl.static_range(MEMBERS):
        h = _apply(h, gate_ptrs, VIEWS, k, TRANSPOSE, PRECISION, BLOCK_M, BLOCK_C)
    offsets, mask = _offsets(rows, columns, inside, M, N, stride_om)
    out = h.to(tl.float32)
    if ADD:
        out += tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, cast(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def gate_grads_kernel(
    x_ptr,
    dy_ptr,
    gate_ptrs,
    part_ptr,
    M,
    K,
    N,
    stride_xm,
    stride_dym,
    rows_per_chunk,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MEMBERS: tl.constexpr,
    VIEWS: tl.constexpr,
    DIMS: tl.constexpr,
    PADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients of gates FIRST to LAST over one chunk of tokens, side by side in its row of parts."""
    start = tl.program_id(0) * rows_per_chunk
    columns, inside = _columns(DIMS, PADS, BLOCK_C)
    sums = ()
    for k in tl.static_range(FIRST, LAST + 1):
        sums += (_square_of_zeros(VIEWS[5 * k + 1] * VIEWS[5 * k + 3]),)  # type: ignore[assignment]
    # What is the same for all tokens would be held in registers, were it moved out of the loop.
    stop = min(start + rows_per_chunk, M)
    for m in tl.range(start, stop, BLOCK_M, num_stages=1, disable_licm=True):
        rows = m + tl.arange(0, BLOCK_M)
        offsets, mask = _offsets(rows, columns, inside, M, K, stride_xm)
        h = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        for k in tl.static_range(FIRST):
            h = _apply(h, gate_ptrs, VIEWS, k, False, PRECISION, BLOCK_M, BLOCK_C)
        inputs = (h,)
        for k in tl.static_range(FIRST, LAST):
            h = _apply(h, gate_ptrs, VIEWS, k, False, PRECISION, BLOCK_M, BLOCK_C)
            inputs += (h,)  # type: ignore[assignment]
        offsets, mask = _offsets(rows, columns, inside, M, N, stride_dym)
        g = tl.load(dy_ptr + offsets, mask=mask, other=0.0)
        for k in tl.static_range(MEMBERS - 1, LAST, -1):
            g = _apply(g, gate_ptrs, VIEWS, k, True, PRECISION, BLOCK_M, BLOCK_C)
        grown = ()
        for k in tl.static_range(LAST, FIRST - 1, -1):
            read = _turn(inputs[k - FIRST], VIEWS, k)
            one = dot(tl.trans(_turn(g, VIEWS, k)), read, sums[k - FIRST], PRECISION)
            grown = (one,) + grown  # type: ignore[assignment]  # noqa: RUF005
            if k > FIRST:
                g = _apply(g, gate_ptrs, VIEWS, k, True, PRECISION, BLOCK_M, BLOCK_C)
        sums = grown
    _store_parts(part_ptr, sums, VIEWS, FIRST, LAST)


@triton.jit
def _square_of_zeros(SIZE: tl.constexpr):
    return tl.zeros((SIZE, SIZE), tl.float32)


@triton.jit
def _store_parts(part_ptr, sums, VIEWS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    row = 0
    for k in tl.static_range(FIRST, LAST + 1):
        row += (VIEWS[5 * k + 1] * VIEWS[5 * k + 3]) * (VIEWS[5 * k + 1] * VIEWS[5 * k + 3])
    at = part_ptr + tl.program_id(0).to(tl.int64) * row
    for k in tl.static_range(FIRST, LAST + 1):
        at = _store_square(at, sums[k - FIRST], VIEWS[5 * k + 1] * VIEWS[5 * k + 3])


@triton.jit
def _store_square(ptr, square, SIZE: tl.constexpr):
    """Stores it, and gives where the next one goes."""
    r = tl.arange(0, SIZE)
    tl.store(ptr + r[:, None] * SIZE + r[None, :], square)
    return ptr + SIZE * SIZE


def views(dims: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """``[A, d_j, B, d_i, C]`` of a tile of tokens for each gate."""
    found: list[tuple[int, ...]] = []
    pads = padded_axes(dims)
    for i, j in ((i + len(pads), j + len(pads)) for i, j in reference.pairs(len(pads))):
        between, behind = math.prod(pads[j + 1 : i]), math.prod(pads[i + 1 :])
        found.append((tokens * math.prod(pads[:j]), pads[j], between, pads[i], behind))
    return found


def padded_gates(gates: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The gates on the padded axes, zero where these have no index."""
    pads = padded_axes(dims)
    if pads == tuple(dims):
        return [gate.contiguous() for gate in gates]
    found = []
    for (i, j), gate in zip(reference.pairs(len(dims)), gates, strict=True):
        parted = gate.reshape(dims[j], dims[i], dims[j], dims[i])
        more_i, more_j = pads[i] - dims[i], pads[j] - dims[j]
        padded = F.pad(parted, (0, more_i, 0, more_j, 0, more_i, 0, more_j))
        found.append(padded.view(pads[j] * pads[i], -1))
    return found


def _cut(grad: Tensor, dims: Sequence[int], pair: tuple[int, int]) -> Tensor:
    """The part of a padded gate's gradient that the gate has."""
    (i, j), pads = pair, padded_axes(dims)
    parted = grad.view(pads[j], pads[i], pads[j], pads[i])[: dims[j], : dims[i], : dims[j], : dims[i]]
    return parted.reshape(dims[j] * dims[i], -1)


def constants(
    dims: Sequence[int], tile: Tile, dtype: torch.dtype, reverse: bool = False
) -> dict[str, object]:
    """What a launch is compiled for."""
    of_gates, pads = views(dims, tile.block_m), padded_axes(dims)
    order = reversed(of_gates) if reverse else of_gates
    return {
        "MEMBERS": len(of_gates),
        "VIEWS": tuple(size for view in order for size in view),
        "DIMS": None if pads == tuple(dims) else tuple(dims),
        "PADS": pads,
        "PRECISION": precision(dtype),
        "BLOCK_M": tile.block_m,
        "BLOCK_C": tile.block_c,
    }


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": stages(tile, torch.version.hip is not None)}


def _chain(
    out: Tensor, x: Tensor, gates: Sequence[Tensor], dims: Sequence[int], add: bool, transpose: bool = False
) -> None:
    x, written = unit_columns(x), unit_columns(out)
    (rows, cols), width = x.shape, out.shape[1]
    tile = chain_tile(rows, dims, x.element_size())
    gate_chain_kernel[(triton.cdiv(rows, tile.block_m),)](
        *(x, tuple(reversed(gates) if transpose else gates), written),
        *(rows, cols, width, x.stride(0), written.stride(0)),
        TRANSPOSE=transpose,
        ADD=add,
        **constants(dims, tile, x.dtype, transpose),
        **_options(tile),
    )
    if not add:
        written[:, math.prod(dims) :] = 0
    if written is not out:
        out.copy_(written)


def _grads(
    dy: Tensor, x: Tensor, gates: Sequence[Tensor], dims: Sequence[int], group: tuple[int, int]
) -> list[Tensor]:
    """The padded gradients of gates ``group[0]`` to ``group[1]``."""
    (rows, cols), (first, last) = x.shape, group
    tile = chain_tile(rows, dims, x.element_size(), backward=True, amd=torch.version.hip is not None)
    chunks, each = chain_chunks(rows, tile)
    counts = [gate.numel() for gate in gates[first : last + 1]]
    parts = torch.empty(chunks, sum(counts), dtype=torch.float32, device=x.device)
    gate_grads_kernel[(chunks,)](
        *(x, dy, tuple(gates), parts, rows, cols, dy.shape[1], x.stride(0), dy.stride(0), each),
        FIRST=first,
        LAST=last,
        **constants(dims, tile, x.dtype),
        **_options(tile),
    )
    return list(sum_parts(parts, x.dtype, 1.0).split(counts))


def _on_chip(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether the kernels take it. Exact float32 products have no tensor cores, and spill at these tiles."""
    exact = x.is_cuda and precision(x.dtype) == "ieee"
    return chain_fits(dims, x.element_size()) and not exact


def gate_chain(out: Tensor, x: Tensor, gates: Sequence[Tensor], dims: Sequence[int], add: bool) -> None:
    """The op of ``_ops.py``. What does not stay on chip are products for the vendor's library."""
    if _on_chip(x, dims):
        _chain(out, x, padded_gates(gates, dims), dims, add)
    else:
        reference.gate_chain(out, x, gates, dims, add)


@flat(GateChainBackward)
def gate_chain_backward(saved: GateChainBackward) -> None:
    """The backward op of ``_ops.py``: fills the gradients."""
    dy, x, gates, dims, dx, add, grads = saved
    if not _on_chip(x, dims):
        return reference.gate_chain_backward(*saved)
    x, dy, padded = unit_columns(x), unit_columns(dy), padded_gates(gates, dims)
    if dx is not None:
        _chain(dx, dy, padded, dims, add, transpose=True)
    pairs, sizes = reference.pairs(len(dims)), [len(gate) for gate in padded]
    for first, last in chain_groups(sizes, [bool(g.numel()) for g in grads], has_descriptors(x.device)):
        found = _grads(dy, x, padded, dims, (first, last))
        for at, grad in enumerate(found, first):
            grads[at].copy_(_cut(grad, dims, pairs[at]))
    return None
