"""The type of a quantised weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .codes import NESTED_BLOCK, NESTED_CODES

FORMATS = ("nf4", "int8", "fp8")
CODE_DTYPES = {"nf4": torch.uint8, "int8": torch.int8, "fp8": torch.uint8}
# A four-bit block must be a power of two of at least 32, which is what bitsandbytes makes.
MIN_BLOCK = 32


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """W[i] = value(codes[i]) · scale(i // block), i counting the elements of W row by row

    The frozen base weight of a linear, in one of three formats:

    ========  ====================================================  =============  =======================
    format    codes                                                 value          block
    ========  ====================================================  =============  =======================
    ``nf4``   uint8 ``[ceil(N·K/2)]``, the first of two elements    one of 16      64, by default; a block
              in the high half of a byte                                           may run across rows
    ``int8``  int8 ``[N, K]``                                       code / 127     K: a scale a row
    ``fp8``   uint8 ``[N, K]``, the bits of float8_e4m3fn           the number     K, or N·K: one scale
    ========  ====================================================  =============  =======================

    ``nf4`` and ``int8`` are bitsandbytes' layouts and numbers (QLoRA, arXiv 2305.14314; LLM.int8, arXiv
    2208.07339). It is no tensor: it has no gradient and takes no part in arithmetic; functions of this
    package that take a ``weight`` take it.

    Args:
        codes: as in the table.
        scales: float32 ``[blocks]``; or uint8 where they are quantised a second time.
        nested: ``None``, or float32 ``[1 + 256 + ceil(blocks / 256)]``: an offset, the 256 values of the
            scales' codes, and a scale for each 256 of them; scale(j) = offset + value · nested scale.
        format: ``nf4``, ``int8`` or ``fp8``.
        shape: (N, K).
        block: consecutive elements that share a scale.
        dtype: the dtype that the weight had; what :func:`lora_kernels.dequantize` gives by default.

    Raises:
        TypeError: a tensor of the wrong dtype, or one that requires a gradient.
        ValueError: no such format, or a size that does not fit.

    Examples:
        >>> weight = quantize(torch.randn(4, 64), "fp8")
        >>> weight.shape, weight.format
        ((4, 64), 'fp8')
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    format: str
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype

    @classmethod
    def checked(cls, *args: Any, **kwargs: Any) -> QuantizedWeight:
        """A weight whose parts are known to fit; the plain constructor trusts its caller."""
        weight = cls(*args, **kwargs)
        _check(weight)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        parts = (self.codes, self.scales, self.nested)
        return sum(part.nbytes for part in parts if part is not None)

    def dim(self) -> int:
        """2, as of a matrix."""
        return 2

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        nested = None if self.nested is None else self.nested.to(device)
        return dataclasses.replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), nested=nested
        )

    def __repr__(self) -> str:
        double = ", double-quantised" if self.nested is not None else ""
        return (
            f"QuantizedWeight({self.format}, shape={self.shape}, block={self.block}{double}, {self.device})"
        )


def code_shape(format: str, rows: int, cols: int) -> tuple[int, ...]:
    """The shape of the codes of a weight [rows, cols]."""
    return ((rows * cols + 1) // 2,) if format == "nf4" else (rows, cols)


def _check(weight: QuantizedWeight) -> None:
    if weight.format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {weight.format!r}")
    rows, cols = weight.shape
    if rows < 1 or cols < 1:
        raise ValueError(f"shape: expected at least one element, got {(rows, cols)}")
    _check_block(weight)
    blocks = -(-rows * cols // weight.block)
    nested = weight.nested is not None
    _check_part("codes", weight.codes, CODE_DTYPES[weight.format], code_shape(weight.format, rows, cols))
    _check_part("scales", weight.scales, torch.uint8 if nested else torch.float32, (blocks,))
    if nested:
        size = 1 + NESTED_CODES + -(-blocks // NESTED_BLOCK)
        _check_part("nested", weight.nested, torch.float32, (size,))
    if not weight.dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {weight.dtype}")


def _check_block(weight: QuantizedWeight) -> None:
    rows, cols = weight.shape
    if weight.format == "nf4":
        if weight.block < MIN_BLOCK or weight.block & (weight.block - 1):
            raise ValueError(
                f"block: expected a power of two of at least {MIN_BLOCK} for nf4, got {weight.block}"
            )
        return
    whole = (cols, rows * cols) if weight.format == "fp8" else (cols,)
    if weight.block not in whole:
        want = " or ".join(map(str, whole))
        raise ValueError(f"block: expected {want} for {weight.format}, got {weight.block}")
    if weight.nested is not None:
        raise ValueError(f"nested: expected None for {weight.format}, got a tensor")


def _check_part(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(part).__name__}")
    if part.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {part.dtype}")
    if tuple(part.shape) != shape or not part.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor of shape {shape}, got {tuple(part.shape)}")
    if part.requires_grad:
        raise TypeError(f"{name}: expected a tensor without a gradient: a quantised weight is frozen")
