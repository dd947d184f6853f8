"""The numbers that codes stand for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# The sixteen values of NormalFloat4: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero
# (Dettmers et al., 2023, arXiv 2305.14314, appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# A scale of an int8 row is the row's largest magnitude, which the code 127 stands for.
INT8_UNIT = 1.0 / 127.0
FP8_LARGEST = 448.0
# Scales that one scale of a second quantisation covers, and the values that its codes can take.
NESTED_BLOCK = 256
NESTED_CODES = 256


@functools.cache
def nf4_table(device: torch.device) -> Tensor:
    """``NF4_VALUES``, float32 on ``device``."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


@functools.cache
def dynamic_values() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending (Dettmers, 2015, arXiv 1511.04561).

    Seven decades up to one; the i-th has 2ⁱ values of each sign, the middles of equal parts of [0.1, 1]
    times 10^(i-6). Zero and one are added.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        middles = (10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index in an ascending ``table`` of the entry next to each value, the lower one on a tie."""
    return torch.bucketize(values, (table[:-1] + table[1:]) / 2.0)
