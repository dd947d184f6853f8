"""FourierFT against PEFT and against the cosines of its definition."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear

WIDE = torch.float64


def cosines(adapter, sizes):
    n_in, n_out = sizes
    generator = torch.Generator().manual_seed(777)
    places = torch.randperm(n_in * n_out, generator=generator)[: len(adapter.fourierft_spectrum)]
    p, q = torch.arange(n_out, dtype=WIDE)[:, None, None], torch.arange(n_in, dtype=WIDE)[:, None]
    turns = (places // n_in) * p / n_out + (places % n_in) * q / n_in
    waves = torch.cos(2 * math.pi * turns)
    return adapter.scaling / (n_in * n_out) * (waves * adapter.fourierft_spectrum).sum(-1)


@pytest.mark.parametrize("sizes", [(12, 10), (9, 16), (16, 7), (33, 17), (1, 4), (4, 1)])
@pytest.mark.parametrize("n", [1, 2, 40, "all"])
def test_values_and_gradients(sizes, n):
    n = sizes[0] * sizes[1] if n == "all" else min(n, sizes[0] * sizes[1])
    options = {"n_frequency": n, "scaling": 20.0}
    layer = shake(LoRALinear(*sizes, r=1, method="fourierft", method_options=options, dtype=WIDE))
    adapter = layer.adapters["default"]
    delta = cosines(adapter, sizes)
    x = torch.randn(2, 3, sizes[0], dtype=WIDE, requires_grad=True)
    dy = torch.randn(2, 3, sizes[1], dtype=WIDE)
    y, want = layer(x), F.linear(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    wanted = (x, adapter.fourierft_spectrum)
    for one, other in zip(*(torch.autograd.grad(z, wanted, dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n,few", [(3, True), (4, False), (300, False)])
def test_is_pefts_update_either_way(n, few):
    base = nn.Linear(48, 56)
    config = peft.FourierFTConfig(n_frequency=n, scaling=30.0, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    options = {"n_frequency": n, "scaling": 30.0}
    adapter = make(48, 56, LoRAConfig(r=1, method="fourierft", method_options=options))
    with torch.no_grad():
        adapter.fourierft_spectrum.copy_(theirs.fourierft_spectrum["default"])
    assert adapter.few == few
    torch.testing.assert_close(adapter.delta(), theirs.get_delta_weight("default"), rtol=1e-4, atol=1e-6)
    assert int(torch.linalg.matrix_rank(adapter.delta(WIDE))) <= 2 * n


def test_starts_at_zero_or_as_the_paper_does():
    for init, std in ((True, 0.0), (False, 1.0)):
        adapter = make(64, 64, LoRAConfig(method="fourierft", init_lora_weights=init))
        assert adapter.fourierft_spectrum.numel() == 1000
        assert float(adapter.fourierft_spectrum.detach().std()) == pytest.approx(std, abs=0.1)
