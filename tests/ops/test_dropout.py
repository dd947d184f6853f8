"""Dropout: the same bits on every backend, an exact keep rate, no dependence between neighbours."""

from __future__ import annotations

import math

import pytest
import torch
from lora_linear_harness import CPU_PATHS, call

from lora_kernels import _backend
from lora_kernels.reference.dropout import dropout_apply
from lora_kernels.reference.dropout import dropout_mask as reference_mask
from lora_kernels.testing import LoraCase, leaves, lora_inputs

RATES = (0.001, 0.1, 0.5, 0.9)


def mask_of(backend, device, *args):
    reason = _backend.unavailable(backend, device.type, torch.float32, 1)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return _backend.implementation(backend, "dropout_mask")(*args)


def fast(device):
    """The quickest backend of the device; its bits are every backend's."""
    return _backend.resolve(device.type, torch.float32, 1)


def seed_tensor(value, device):
    return torch.tensor([value], dtype=torch.int64, device=device)


def keep_bits(mask, cols):
    """The packed mask as one float per column."""
    return dropout_apply(torch.ones(mask.shape[0], cols, device=mask.device), mask, 0.0)


@pytest.mark.parametrize("shape", ((1, 1), (5, 7), (3, 8), (17, 9), (33, 300), (0, 8)), ids=str)
@pytest.mark.parametrize("seed", (0, 1, 2**31, 2**63 - 1, -1, -(2**63)))
@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_same_bits_as_the_reference(backend, seed, shape, device):
    drawn = seed_tensor(seed, device)
    p = RATES[seed % 4]
    assert torch.equal(mask_of(backend, device, drawn, *shape, p), reference_mask(drawn, *shape, p))


@pytest.mark.parametrize("p", (0.0, 2**-33, 2**-32, 0.25, 1 - 2**-32, 1 - 2**-33))
@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_same_bits_at_extreme_rates(backend, p, device):
    drawn = seed_tensor(77, device)
    assert torch.equal(mask_of(backend, device, drawn, 9, 40, p), reference_mask(drawn, 9, 40, p))


def within_four_sigma(kept, total, rate):
    deviation = abs(kept - total * rate)
    assert deviation <= 4 * math.sqrt(total * rate * (1 - rate)), f"{deviation / total:.2e} off {rate}"


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_keep_rate_over_ten_million(backend, p, device):
    mask = mask_of(backend, device, seed_tensor(1234, device), 2500, 4000, p)
    count = torch.tensor([byte.bit_count() for byte in range(256)], device=device)
    within_four_sigma(count[mask.long()].sum().item(), 10_000_000, 1 - p)


@pytest.mark.parametrize("p", RATES)
def test_keep_rate_of_every_column_in_a_byte(p, device):
    bits = keep_bits(mask_of(fast(device), device, seed_tensor(5, device), 2000, 4000, p), 4000)
    for column, kept in enumerate(bits.view(-1, 8).sum(0, dtype=torch.float64).tolist()):
        assert 0 <= column < 8
        within_four_sigma(kept, bits.numel() // 8, 1 - p)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("apart", ((0, 1), (0, 2), (0, 7), (0, 8), (1, 0), (1, 1), (16, 0)), ids=str)
def test_neighbours_are_independent(apart, p, device):
    down, right = apart
    bits = keep_bits(mask_of(fast(device), device, seed_tensor(9, device), 1000, 2000, p), 2000).bool()
    one = bits[: bits.shape[0] - down, : bits.shape[1] - right]
    other = bits[down:, right:]
    within_four_sigma((one & other).sum().item(), one.numel(), (1 - p) ** 2)
    within_four_sigma((~one & ~other).sum().item(), one.numel(), p**2)


def test_every_pair_of_columns_in_a_byte_is_independent(device):
    bits = keep_bits(mask_of(fast(device), device, seed_tensor(3, device), 1000, 2000, 0.3), 2000).view(-1, 8)
    together = bits.double().T @ bits.double()
    for i in range(8):
        for j in range(i):
            within_four_sigma(together[i, j].item(), bits.shape[0], 0.7**2)


def test_other_seeds_are_independent(device):
    one, other = (mask_of(fast(device), device, seed_tensor(s, device), 1000, 2000, 0.4) for s in (0, 1))
    both = (keep_bits(one, 2000) * keep_bits(other, 2000)).sum(dtype=torch.float64).item()
    within_four_sigma(both, 2_000_000, 0.36)


@pytest.mark.parametrize("path", (*CPU_PATHS, "triton"))
def test_manual_seed_repeats_and_calls_differ(path, device):
    case = LoraCase(cols=64, dropout_p=0.5)
    inputs = leaves(lora_inputs(case, device))
    torch.manual_seed(3)
    first, second = call(path, inputs, case), call(path, inputs, case)
    torch.manual_seed(3)
    again = call(path, inputs, case)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("path", (*CPU_PATHS, "triton"))
def test_no_draw_without_dropout(path, device):
    case = LoraCase()
    inputs = lora_inputs(case, device)
    before = torch.get_rng_state()
    call(path, inputs, case)
    assert torch.equal(before, torch.get_rng_state())


def test_all_paths_drop_the_same_elements(device):
    case = LoraCase(lead=(5,), cols=19, weight="none", dropout_p=0.5, rank=19, out=19)
    inputs = lora_inputs(case, device)
    eye = torch.eye(19, device=device)
    inputs.update(lora_a=eye, lora_b=eye, x=torch.ones(5, 19, device=device))
    kept = []
    for path in (*CPU_PATHS, "triton"):
        if _backend.unavailable(path.removesuffix("-function"), device.type, torch.float32, 19):
            continue
        torch.manual_seed(11)
        kept.append(call(path, inputs, case) != 0)
    assert len(kept) > 1 and kept[0].any() and not kept[0].all()
    assert all(torch.equal(kept[0], other) for other in kept[1:])


@pytest.mark.parametrize("path", (*CPU_PATHS, "triton"))
def test_a_dropped_infinity_is_zero(path, device):
    case = LoraCase(lead=(8,), cols=16, weight="none", dropout_p=0.5)
    inputs = lora_inputs(case, device)
    inputs["x"] = torch.full((8, 16), torch.inf, device=device)
    inputs["lora_a"] = torch.zeros(4, 16, device=device)
    torch.manual_seed(0)
    drawn = torch.empty(1, dtype=torch.int64, device=device).random_()
    mask = reference_mask(drawn, 8, 16, 0.5)
    dropped = dropout_apply(inputs["x"], mask, 0.5)
    assert torch.equal(dropped == 0, keep_bits(mask, 16) == 0)
    torch.manual_seed(0)
    inputs["x"] = torch.where(keep_bits(mask, 16).bool(), 1.0, inputs["x"])
    assert torch.isfinite(call(path, inputs, case)).all()
