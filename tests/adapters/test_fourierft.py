"""FourierFT against PEFT and against the cosines of its definition."""

from __future__ import annotations

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear, apply_lora

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


def peft_model(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 56), nn.Linear(56, 7))
    config = peft.FourierFTConfig(target_modules=["0", "1"], **options)
    return peft.get_peft_model(model, config)


def test_reads_what_peft_writes(tmp_path):
    theirs = peft_model(n_frequency=60, scaling=20.0, random_loc_seed=5)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ours = load_adapter(nn.Sequential(nn.Linear(48, 56), nn.Linear(56, 7)), tmp_path)
    x = torch.randn(3, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_peft_reads_what_is_written(tmp_path):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(48, 56), nn.Linear(56, 7))
    options = {"n_frequency": 60, "scaling": 20.0, "random_loc_seed": 5}
    apply_lora(ours, LoRAConfig(method="fourierft", method_options=options, target_modules=["0", "1"]))
    shake(ours)
    save_adapter(ours, tmp_path)
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(48, 56), nn.Linear(56, 7))
    theirs = peft.PeftModel.from_pretrained(bare, tmp_path)
    assert theirs.peft_config["default"].peft_type == peft.PeftType.FOURIERFT
    x = torch.randn(3, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_what_pefts_config_cannot_say_is_refused_or_kept_by_us(tmp_path):
    peft_model(n_frequency=60, n_frequency_pattern={"1": 30}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_frequency_pattern: expected it unset"):
        load_adapter(nn.Sequential(nn.Linear(48, 56), nn.Linear(56, 7)), tmp_path)
    dropping = LoRAConfig(method="fourierft", lora_dropout=0.5, target_modules="all-linear")
    model = nn.Sequential(nn.Linear(48, 56))
    apply_lora(model, dropping)
    save_adapter(model, tmp_path)
    loaded = load_adapter(nn.Sequential(nn.Linear(48, 56)), tmp_path)
    assert loaded[0].adapters["default"].lora_dropout == 0.5


def test_a_changed_seed_is_taken_over(tmp_path):
    """The places follow from the settings and lie in no file."""
    for seed in (1, 2):
        model = nn.Sequential(nn.Linear(16, 16))
        options = {"n_frequency": 30, "random_loc_seed": seed}
        apply_lora(model, LoRAConfig(method="fourierft", method_options=options, target_modules=["0"]))
        shake(model)
        if seed == 1:
            save_adapter(model, tmp_path)
            want = model[0].adapters["default"].delta()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model[0].adapters["default"].delta(), want)


def test_starts_at_zero_or_as_the_paper_does():
    for init, std in ((True, 0.0), (False, 1.0)):
        adapter = make(64, 64, LoRAConfig(method="fourierft", init_lora_weights=init))
        assert adapter.fourierft_spectrum.numel() == 1000
        assert float(adapter.fourierft_spectrum.detach().std()) == pytest.approx(std, abs=0.1)
