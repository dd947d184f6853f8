"""QuanTA against its gates applied one after the other by einsum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import shake
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear, apply_lora

WIDE = torch.float64


def chain(adapter, dims, n_in, n_out):
    """𝒯 [out, in] by the definition, on padded unit vectors."""
    total = math.prod(dims)
    h = F.pad(torch.eye(n_in, dtype=WIDE), (0, total - n_in)).view(n_in, *dims)
    letters = "abcdefg"[: len(dims)]
    for at, (i, j) in enumerate(itertools.combinations(range(-1, -len(dims) - 1, -1), 2)):
        gate = getattr(adapter, f"gate_{at}").view(dims[j], dims[i], dims[j], dims[i])
        out = list(letters)
        out[j], out[i] = "y", "z"
        h = torch.einsum(f"yz{letters[j]}{letters[i]},x{letters}->x{''.join(out)}", gate, h)
    flat = h.reshape(n_in, total)
    return (flat[:, :n_out] if n_out <= total else F.pad(flat, (0, n_out - total))).T


@pytest.mark.parametrize(
    "dims,sizes", [((4, 3), (12, 10)), ((3, 2, 2), (12, 12)), ((3, 2, 2), (11, 20)), ((2, 3, 2, 2), (24, 7))]
)
def test_values_and_gradients(dims, sizes):
    base = nn.Linear(*sizes, dtype=WIDE)
    config = LoRAConfig(method="quanta", method_options={"dims": dims})
    layer = LoRALinear.from_linear(base, config)
    adapter = layer.adapters["default"]
    start = chain(adapter, dims, *sizes)
    torch.testing.assert_close(layer.weight, base.weight - start)
    shake(layer)
    x, gates = torch.randn(5, sizes[0], dtype=WIDE, requires_grad=True), list(adapter.parameters())
    dy = torch.randn(5, sizes[1], dtype=WIDE)
    y, want = layer(x), F.linear(x, layer.weight + chain(adapter, dims, *sizes), base.bias)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(z, (x, *gates), dy) for z in (y, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_parameters_and_rank():
    adapter = make(4096, 4096, LoRAConfig(method="quanta", method_options={"dims": (16, 8, 8, 4)}))
    assert sum(p.numel() for p in adapter.parameters()) == 43_008
    small = make(64, 64, LoRAConfig(method="quanta", method_options={"dims": (4, 4, 4)}), dtype=WIDE)
    assert sum(p.numel() for p in small.parameters()) == 768  # LoRA's of rank 6
    before = small.delta()
    shake(small)
    assert int(torch.linalg.matrix_rank(small.delta() - before)) > 6


@pytest.mark.parametrize(
    "size,dims", [(12, (3, 2, 2)), (4096, (8, 8, 8, 8)), (11008, (43, 16, 4, 4)), (7, (7, 1)), (1, (1, 1))]
)
def test_dims_by_default(size, dims):
    got = make(size, 3, LoRAConfig(method="quanta")).branch.dims
    assert math.prod(got) == size and (got == dims or size == 11008)


def test_a_loaded_adapter_takes_the_same_out_of_the_weight(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, dtype=WIDE), nn.Linear(12, 12, dtype=WIDE))
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(12, 12, dtype=WIDE), nn.Linear(12, 12, dtype=WIDE))
    apply_lora(model, LoRAConfig(method="quanta", target_modules="all-linear"))
    first, second = (model[i].adapters["default"].gate_0 for i in (0, 1))
    assert not torch.equal(first, second)
    shake(model)
    save_adapter(model, tmp_path)
    torch.manual_seed(9)
    load_adapter(bare, tmp_path)
    x = torch.randn(3, 12, dtype=WIDE)
    torch.testing.assert_close(bare(x), model(x))
