"""IR-QLoRA's connection, written as the paper has it: a mean on the way in, repeats on the way out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dense_oracle import IN, OUT, WIDE, agrees, linear, refuses, trained


def test_values_gradients_and_count():
    layer, r = linear("ir_qlora", r=2), 2
    assert trained(layer) == r * (IN + OUT) + 2

    def want(one, x):
        h = x @ one.lora_A.T + one.beta_1 * x.unflatten(-1, (r, IN // r)).mean(-1)
        up = (h @ one.lora_B.T).unflatten(-1, (r, OUT // r)) + one.beta_2 * h[..., None]
        return F.linear(x, layer.weight, layer.bias) + 6 / r * up.flatten(-2)

    agrees(layer, torch.randn(2, 3, IN, dtype=WIDE), want)


def test_bad_rank():
    refuses("r: ir_qlora expects a divisor of out_features = 10, got 4", method="ir_qlora")
