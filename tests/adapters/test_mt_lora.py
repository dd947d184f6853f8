"""Matrix-Transformation LoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, shape_of_x, trained

from lora_kernels.nn import LoRALinear

STRUCTURES = {
    "shim": lambda m: m.lora_C,
    "icfm": lambda m: m.lora_C @ m.lora_C.T,
    "ctcm": lambda m: m.lora_C @ m.lora_D,
    "dtsm": lambda m: m.lora_C + m.lora_D,
}


def new(structure):
    return shake(new_layer("mt_lora", method_options={"structure": structure}))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_gradients_and_count(structure):
    layer, core = new(structure), STRUCTURES[structure]
    agrees(layer, lambda m, x: 6 / RANK * x @ m.lora_A.T @ core(m).T @ m.lora_B.T)
    assert trained(layer) == RANK * (IN + OUT) + RANK**2 * (2 if structure in ("ctcm", "dtsm") else 1)
    layer.merge()
    x = shape_of_x(3)
    merged = layer(x)
    layer.unmerge()
    torch.testing.assert_close(merged, layer(x))


def test_relations_between_the_forms():
    t = new("icfm").adapters["default"].transformation()
    torch.testing.assert_close(t, t.T)
    assert torch.linalg.eigvalsh(t).min() > -1e-12
    shim, dtsm = new("shim"), new("dtsm")
    with torch.no_grad():
        dtsm.adapters["default"].lora_D.zero_()
    dtsm.load_state_dict({**dtsm.state_dict(), **shim.state_dict()})
    x = shape_of_x(3)
    torch.testing.assert_close(dtsm(x), shim(x))
    lora = shake(new_layer("lora"))
    shim.load_state_dict({**shim.state_dict(), **lora.state_dict()})
    with torch.no_grad():
        shim.adapters["default"].lora_C.copy_(torch.eye(RANK))
    torch.testing.assert_close(shim(x), lora(x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_parts_of_one_linear_whose_ranks_are_mixed(structure):
    enabled, core = [True, False, True], STRUCTURES[structure]
    options = {"structure": structure, "enable_lora": enabled}
    layer = shake(
        LoRALinear(IN, 9, r=RANK, lora_alpha=6, method="mt_lora", method_options=options, dtype=torch.float64)
    )
    adapter = layer.adapters["default"]
    r, cores = 2 * RANK, 2 if structure in ("ctcm", "dtsm") else 1
    assert trained(layer) == r * IN + RANK * 6 + cores * r**2

    def branch(m, x):
        first, second = (x @ m.merged_A.T @ core(m).T).split(RANK, -1)
        b, d = m.merged_B.split(3)
        return 6 / RANK * torch.cat([first @ b.T, 0 * first @ b.T, second @ d.T], -1)

    agrees(layer, branch)
    assert not adapter.delta()[3:6].any()


def test_bad_parts():
    for flags, words in (
        ([False], "one of them set"),
        ([True, True, True], "expects a divisor of out_features"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRALinear(4, 4, r=2, method="mt_lora", method_options={"enable_lora": flags})


def test_a_bad_structure():
    with pytest.raises(ValueError, match=r"structure: expected one of \('shim', .*got 'x'"):
        LoRALinear(4, 4, r=2, method="mt_lora", method_options={"structure": "x"})
