"""Device functions that every kernel here is written in."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _backend

_INTERPRETING = tl.constexpr(_backend.interpreting())
_ROUNDS = tl.constexpr(7)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


dot = _dot
if _backend.interpreting():  # and only there: it needs numpy
    from . import interpreted

    dot = interpreted.dot


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest. The interpreter would truncate to bfloat16."""
    if _INTERPRETING and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= -0x10000  # or a zero would become the smallest number there is
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_tile(ptr, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """The tile [rows, cols] of a matrix, zero outside it."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, cols, stride_row, stride_col, n_rows, n_cols):
    """Writes the part of the tile that lies inside the matrix, in the matrix's dtype."""
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    tl.store(ptr + offsets, cast(tile, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _two_bits(word, limit):
    """One 32-bit word decides two columns: as it stands, and rotated by half."""
    rotated = (word << 16) | (word >> 16)
    return (word >= limit).to(tl.int32) | ((rotated >= limit).to(tl.int32) << 1)


@triton.jit
def keep_bytes(seed, rows, bytes_, row_bytes, threshold):
    """The packed keep bits of ``reference/dropout.py`` for a tile [rows, bytes_]."""
    counter = rows[:, None].to(tl.int64) * row_bytes + bytes_[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero, n_rounds=_ROUNDS)
    limit = threshold.to(tl.uint32)
    lower = _two_bits(w0, limit) | (_two_bits(w1, limit) << 2)
    return lower | (_two_bits(w2, limit) << 4) | (_two_bits(w3, limit) << 6)


@triton.jit
def unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One boolean a column from a tile of bytes [ROWS, COLS / 8]."""
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLS)) != 0


@triton.jit
def drop_tile(
    x,
    seed,
    mask_ptr,
    rows,
    bytes_,
    n_rows,
    row_bytes,
    threshold,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The tile with zeros where dropout takes an element; writes its keep bits, those of ``n_rows`` rows."""
    packed = keep_bytes(seed, rows, bytes_, row_bytes, threshold)
    store_tile(mask_ptr, packed, rows, bytes_, row_bytes, 1, n_rows, row_bytes)
    return tl.where(unpack(packed, ROWS, COLS), x, 0.0)


@triton.jit
def load_keep(mask_ptr, rows, first_col, n_rows, row_bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The keep bits of COLS columns from ``first_col``, a multiple of eight; false outside."""
    bytes_ = first_col // 8 + tl.arange(0, COLS // 8)
    packed = load_tile(mask_ptr, rows, bytes_, row_bytes, 1, n_rows, row_bytes)
    return unpack(packed.to(tl.int32), ROWS, COLS)


@triton.jit
def apply_gate(h, gate_ptr, rows, ranks, n_rows, R, stride_row):
    """h ⊙ g in h's dtype; a gate that all rows share has row stride 0."""
    gate = load_tile(gate_ptr, rows, ranks, stride_row, 1, n_rows, R)
    return cast(h * gate.to(tl.float32), h.dtype)


@triton.jit
def expand(
    h,
    b_ptr,
    bias_ptr,
    gate_ptr,
    y_ptr,
    rows,
    ranks,
    M,
    N,
    R,
    stride_bn,
    stride_br,
    stride_gm,
    scaling,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Writes b + s (h ⊙ g) Bᵀ for these rows."""
    if HAS_GATE:
        h = apply_gate(h, gate_ptr, rows, ranks, M, R, stride_gm)
    for n in range(0, N, BLOCK_C):
        cols = n + tl.arange(0, BLOCK_C)
        b = cast(load_tile(b_ptr, ranks, cols, stride_br, stride_bn, R, N), h.dtype)
        y = dot(h, b, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION) * scaling
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        store_tile(y_ptr, y, rows, cols, N, 1, M, N)
