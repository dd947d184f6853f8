"""LORPMAN against dense sums, and its penalty against dense inner products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import LoRAConfig
from lora_kernels.compose import draw_preference, orthogonal_penalty
from lora_kernels.nn import LoRALinear, side_inputs

WIDE, TASKS, R = torch.float64, 3, 2


def layer_of():
    torch.manual_seed(0)
    layer = LoRALinear(7, 5, r=R, method="lorpman", method_options={"tasks": TASKS}, dtype=WIDE)
    with torch.no_grad():
        layer.adapters["default"].lora_B.normal_()
    return layer


def deltas(layer):
    """s B_i A_i by task."""
    one = layer.adapters["default"]
    parts = zip(one.lora_B.chunk(TASKS, 1), one.lora_A.chunk(TASKS), strict=True)
    return [4.0 * b @ a for b, a in parts]


def test_a_preference_mixes_the_tasks_updates_with_its_gradients():
    layer, x = layer_of(), torch.randn(4, 6, 7, dtype=WIDE)
    tensors = [layer.adapters["default"].lora_A, layer.adapters["default"].lora_B]
    for shape in ((TASKS,), (4, TASKS)):
        p = torch.rand(*shape, dtype=WIDE).requires_grad_()
        with side_inputs(layer, preference=p):
            y = layer(x)
        mixed = torch.einsum("...i,inm->...nm", p, torch.stack(deltas(layer)))
        want = F.linear(x, layer.weight, layer.bias) + torch.einsum(
            "bsm,...nm->bsn" if p.dim() == 1 else "bsm,bnm->bsn", x, mixed
        )
        torch.testing.assert_close(y, want)
        got, dense = (
            torch.autograd.grad(out.square().sum(), [p, *tensors], retain_graph=True) for out in (y, want)
        )
        for one, other in zip(got, dense, strict=True):
            torch.testing.assert_close(one, other)


def test_the_weight_is_affine_in_the_preference_and_counts():
    layer = layer_of()
    eye = torch.eye(7, dtype=WIDE)
    outs = []
    for p in ([1.0, 0, 0], [0, 1.0, 0], [0.25, 0.75, 0]):
        with side_inputs(layer, preference=torch.tensor(p, dtype=WIDE)):
            outs.append(layer(eye))
    torch.testing.assert_close(outs[2], 0.25 * outs[0] + 0.75 * outs[1])
    assert sum(p.numel() for p in layer.adapters.parameters()) == TASKS * R * (7 + 5)


def test_the_penalty_is_the_dense_one_with_its_gradients():
    layer = layer_of()
    flat = [delta.flatten() for delta in deltas(layer)]
    want = sum(
        (flat[i] @ flat[j]) ** 2 / ((flat[i] @ flat[i]) * (flat[j] @ flat[j]))
        for i in range(TASKS)
        for j in range(i + 1, TASKS)
    )
    got = orthogonal_penalty(layer)
    torch.testing.assert_close(got, want)
    tensors = list(layer.adapters.parameters())
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        layer.adapters["default"].lora_B.zero_()
    assert orthogonal_penalty(layer) == 0


def test_preferences_are_drawn_from_the_simplex_by_seed():
    drawn = [draw_preference(3, 1.0, torch.Generator().manual_seed(i)) for i in (0, 0, *range(500))]
    assert torch.equal(drawn[0], drawn[1])
    each = torch.stack(drawn[2:])
    torch.testing.assert_close(each.sum(1), torch.ones(500))
    torch.testing.assert_close(each.mean(0), torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_bad_input():
    layer = layer_of()
    with (
        side_inputs(layer, preference=torch.ones(2)),
        pytest.raises(ValueError, match=r"preference: lorpman expects"),
    ):
        layer(torch.randn(2, 7, dtype=WIDE))
    with pytest.raises(ValueError, match="adapter_name: expected one of method='lorpman', got 'b'"):
        orthogonal_penalty(layer, "b")
    with pytest.raises(ValueError, match="tasks, concentration: expected"):
        draw_preference(2, 0.0)
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        LoRALinear.from_linear(
            torch.nn.Linear(3, 3), LoRAConfig(method="lorpman", method_options={"tasks": 0})
        )
