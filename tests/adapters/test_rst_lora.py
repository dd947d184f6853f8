"""RST-LoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, shape_of_x, trained

from lora_kernels.adapters.low_rank.rst_lora import rst_gamma
from lora_kernels.nn import side_inputs

WIDE = torch.float64


def scaled(scale):
    return lambda m, x: 6 / RANK * (x * scale) @ m.lora_A.T @ m.lora_B.T


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 3, IN)])
def test_values_and_gradients(shape):
    layer, scale = shake(new_layer("rst_lora")), 1 + torch.rand(*shape, dtype=WIDE)
    broadcast = scale if len(shape) == 3 else scale.reshape(*shape, *[1] * (3 - len(shape)))
    agrees(layer, scaled(broadcast), token_scale=scale)
    assert trained(layer) == RANK * (IN + OUT)


def test_both_routes_are_one_function_and_uniform_ones_are_lora():
    layer, x = shake(new_layer("rst_lora")), shape_of_x(2, 3)
    lora = new_layer("lora", lora_alpha=6 * 1.25)
    lora.load_state_dict(layer.state_dict())
    token = torch.full((2, 3), 1.25, dtype=WIDE)
    for scale in (token, token[..., None].expand(2, 3, IN)):
        with side_inputs(layer, token_scale=scale):
            torch.testing.assert_close(layer(x), lora(x))


def test_gamma_from_a_parser():
    torch.manual_seed(0)
    p = torch.rand(3, 3, 2, dtype=WIDE) * (1 - torch.eye(3, dtype=WIDE))[..., None]
    units = torch.tensor([0, 0, 1, 2, 2])
    index = torch.stack([sum(p[i, j] for j in range(3)) / 3 for i in range(3)])
    torch.testing.assert_close(rst_gamma(p, units), index.mean(1)[units])
    torch.testing.assert_close(rst_gamma(p, units, "p_w", width=5), index[units][:, [0, 1, 0, 1, 0]])
    hard = torch.stack([sum((p[i, j] >= 0.5).double() for j in range(3)) / 3 for i in range(3)])
    torch.testing.assert_close(rst_gamma(p, units, "b_wo"), hard.mean(1)[units])
    late = rst_gamma(p, units, "b_wo", after=True)
    torch.testing.assert_close(late, (index >= 0.5).double().mean(1)[units])


@pytest.mark.parametrize(
    "shape,variant,words",
    [
        ((3, 3, 2), "x", "variant: expected"),
        ((3, 2, 2), "p_wo", r"relations: expected \[units, units, k\], got \(3, 2, 2\)"),
        ((3, 3, 2), "p_w", "width: expected the features of x for 'p_w', got 0"),
    ],
)
def test_what_it_refuses(shape, variant, words):
    with pytest.raises(ValueError, match=words):
        rst_gamma(torch.zeros(shape), torch.zeros(2, dtype=torch.long), variant)
    with pytest.raises(ValueError, match="call: expected 'token_scale'"):
        new_layer("rst_lora")(shape_of_x(2))
