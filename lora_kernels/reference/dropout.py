"""The dropout mask in eager PyTorch: Philox4x32-7, two columns a word, one byte a call.

A mask byte belongs to eight neighbouring columns and comes from one Philox call whose counter is the
byte's index. Each 32-bit word decides two columns: once as it stands and once rotated by 16 bits, so
each column is compared with the full 32-bit threshold and its keep rate is exact to 2⁻³². Two columns
of one word share bits only where their upper halves tie with the threshold (a chance of 2⁻¹⁶).
Seven rounds are the fewest that pass BigCrush (Salmon et al., SC'11, table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7


def threshold(dropout_p: float) -> int:
    """The 32-bit threshold: a column is dropped when its word is below it."""
    return min(round(dropout_p * 2**32), _MASK32)


def _philox(seed: Tensor, counter: Tensor) -> list[Tensor]:
    """Four 32-bit words (held in int64) for each counter."""
    zero = torch.zeros_like(counter)
    c = [counter & _MASK32, (counter >> 32) & _MASK32, zero, zero]
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        low, high = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [
            ((high >> 32) & _MASK32) ^ c[1] ^ k0,
            high & _MASK32,
            ((low >> 32) & _MASK32) ^ c[3] ^ k1,
            low & _MASK32,
        ]
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c


def dropout_mask(seed: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    """Packed keep bits, uint8 ``[rows, ceil(cols/8)]``; a pure function of its arguments."""
    return _mask(seed, rows, cols, threshold(dropout_p))


def row_dropout_mask(seed: Tensor, dropout_ps: Tensor, cols: int) -> Tensor:
    """The same with a probability of its own for each row, float32 ``[rows]``."""
    limits = (dropout_ps.double() * 2**32).round().clamp(max=_MASK32).long()
    width = (cols + 7) // 8
    return _mask(seed, len(dropout_ps), cols, limits.repeat_interleave(width))


def _mask(seed: Tensor, rows: int, cols: int, limit: int | Tensor) -> Tensor:
    width = (cols + 7) // 8
    counter = torch.arange(rows * width, device=seed.device)
    byte = torch.zeros_like(counter)
    for i, word in enumerate(_philox(seed, counter)):
        rotated = ((word << 16) | (word >> 16)) & _MASK32
        byte |= (word >= limit).long() << (2 * i)
        byte |= (rotated >= limit).long() << (2 * i + 1)
    return byte.to(torch.uint8).view(rows, width)


def keep_of(mask: Tensor, cols: int) -> Tensor:
    """Packed keep bits as booleans ``[rows, cols]``."""
    bits = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=mask.device, dtype=torch.uint8)
    return (mask[:, :, None] & bits).view(len(mask), 8 * mask.shape[1])[:, :cols] != 0


def dropout_apply(x: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    """drop(x) = x ⊙ keep / (1 − p) for packed keep bits."""
    return torch.where(keep_of(mask, x.shape[1]), x * (1.0 / (1.0 - dropout_p)), 0)
