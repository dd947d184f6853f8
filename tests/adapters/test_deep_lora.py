"""Deep LoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, saved_shapes, shape_of_x, trained
from torch import nn

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.low_rank.deep_lora import compressed_factors
from lora_kernels.nn import LoRALinear, apply_lora

WIDE = torch.float64


@pytest.mark.parametrize("depth", [3, 4])
def test_values_gradients_and_count(depth):
    layer = shake(new_layer("deep_lora", method_options={"depth": depth}))

    def branch(m, x):
        factors = [m.lora_B, *m.cores.flip(0), m.lora_A]
        return 6 / RANK * x @ torch.linalg.multi_dot(factors).T

    agrees(layer, branch)
    assert trained(layer) == RANK * (IN + OUT) + (depth - 2) * RANK**2


def test_factors_start_orthonormal_and_tiny():
    adapter = new_layer("deep_lora", lora_alpha=RANK).adapters["default"]
    eye = torch.eye(RANK, dtype=WIDE) * 1e-6
    for factor in (adapter.lora_A.T, adapter.lora_B, adapter.cores[0]):
        torch.testing.assert_close(factor.T @ factor, eye, rtol=0, atol=1e-14)
    norm = torch.linalg.matrix_norm(adapter.delta(), 2)
    torch.testing.assert_close(norm, torch.tensor(1e-9, dtype=WIDE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sizes", [(12, 12), (10, 12), (12, 10)])
def test_compressed_factors_are_orthonormal_and_hold_the_leading_directions(sizes):
    torch.manual_seed(0)
    left, right = torch.randn(sizes[0], 2, dtype=WIDE), torch.randn(2, sizes[1], dtype=WIDE)
    gradient = left @ right
    u, vh = compressed_factors(gradient, RANK, 3)
    assert u.shape == (sizes[0], RANK) and vh.shape == (RANK, sizes[1])
    held = [one for one, size in ((u.T @ u, sizes[0]), (vh @ vh.T, sizes[1])) if size == max(sizes)]
    for one in held:
        torch.testing.assert_close(one, torch.eye(RANK, dtype=WIDE), rtol=0, atol=1e-10)
    assert max(torch.linalg.matrix_norm(one, 2) for one in (u, vh)) < 1 + 1e-10
    # A gradient of rank r/2 lies in what the wider side spans.
    projected = u @ (u.T @ gradient) if sizes[0] > sizes[1] else gradient @ vh.T @ vh
    torch.testing.assert_close(projected, gradient)


def compressed(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=WIDE))
    options = {"compress": True, **options}
    config = LoRAConfig(
        r=RANK, lora_alpha=6, method="deep_lora", target_modules=["0"], method_options=options
    )
    gradient = torch.randn(OUT, IN, dtype=WIDE)
    return apply_lora(model, config, statistics={"0": {"gradient": gradient}})


def test_the_compressed_form(tmp_path):
    model = compressed()
    layer = model[0]
    assert trained(layer) == 3 * RANK**2 and trained(compressed(train_outer=True)) == 3 * RANK**2 + RANK * (
        IN + OUT
    )
    assert (7, IN) not in saved_shapes(layer, shape_of_x(7))
    with torch.no_grad():
        layer.adapters["default"].cores.normal_()

    def branch(m, x):
        return 6 / RANK * x @ torch.linalg.multi_dot([m.lora_B, *m.cores.flip(0), m.lora_A]).T

    agrees(layer, branch)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = load_adapter(nn.Sequential(nn.Linear(IN, OUT, dtype=WIDE)), tmp_path)
    x = shape_of_x(3)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(
    "options,r,words",
    [
        ({"depth": 2}, 2, "depth: expected at least 3, got 2"),
        ({"eps": 0.0}, 2, "eps: expected a float above 0, got 0.0"),
        ({"compress": "yes"}, 2, "compress: expected one of"),
        ({"compress": True}, 3, "r: deep_lora's compress expects an even rank of at most 4, got 3"),
        ({"compress": True}, 2, "statistics: deep_lora's compress expects 'gradient', got none"),
    ],
)
def test_what_it_refuses(options, r, words):
    with pytest.raises(ValueError, match=words):
        LoRALinear(4, 5, r=r, method="deep_lora", method_options=options)
