"""loralib's MergedLinear: each enabled part has a LoRA of its own, the others none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import IN, OUT, WIDE, R, agrees, linear, refuses, trained


@pytest.mark.parametrize("enabled", [[True, False], [False, True], [True, False, True, True, False]])
def test_values_gradients_and_count(enabled):
    layer = linear("merged_linear", enable_lora=enabled)
    m, rows = sum(enabled), OUT // len(enabled)
    assert trained(layer) == R * m * IN + m * rows * R

    def want(adapter, x):
        parts, at = [F.linear(x, layer.weight, layer.bias)], 0
        delta = torch.zeros(OUT, IN, dtype=WIDE)
        for i, on in enumerate(enabled):
            if on:
                lora_a = adapter.merged_A[at * R : (at + 1) * R]
                lora_b = adapter.merged_B[at * rows : (at + 1) * rows]
                delta = delta.index_add(0, torch.arange(i * rows, (i + 1) * rows), lora_b @ lora_a)
                at += 1
        return parts[0] + 6 / R * x @ delta.T

    agrees(layer, torch.randn(2, 3, IN, dtype=WIDE), want)


def test_bad_options():
    for flags, message in (
        ([False, False], "expected a flag for each part, one of them set"),
        ([True, 1], "expected a flag for each part"),
        ([True, False, True], "expects a divisor of out_features = 10, got 3"),
    ):
        refuses(message, method="merged_linear", method_options={"enable_lora": flags})
