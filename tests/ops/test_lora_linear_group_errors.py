"""What ``lora_linear_group`` refuses."""

from __future__ import annotations

import pytest
import torch
from test_lora_linear_group import FP64, Group, make, part

from lora_kernels import lora_linear_group


def arguments(**changes):
    inputs = make(Group(), "cpu", ())
    given = {
        "x": inputs["x"],
        "weights": part(inputs, Group(), "weight"),
        "lora_as": part(inputs, Group(), "lora_a"),
        "lora_bs": part(inputs, Group(), "lora_b"),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"weights": torch.ones(2, 2)},
            TypeError,
            "weights: expected a list or tuple of Tensors, got T",
        ),
        ({"weights": []}, ValueError, "weights: expected at least one member"),
        ({"weights": [None] * 3}, TypeError, r"weights\[0\]: expected a Tensor, got NoneType"),
        ({"lora_as": []}, ValueError, "lora_as: expected 3 members, as weights has, got 0"),
        ({"scalings": "two"}, TypeError, "scalings: expected a list or tuple, got str"),
        ({"scalings": [1.0, None, 2.0]}, TypeError, r"scalings\[1\]: expected a number"),
        ({"dropout_p": [0.1]}, ValueError, "dropout_p: expected 3 members"),
        ({"dropout_p": [0.1, 0.1, 1.0]}, ValueError, "member 2: dropout_p: expected 0 <= dropout_p < 1"),
        ({"lora_bs": [torch.ones(2, 2)] * 3}, ValueError, "member 0: lora_b: expected"),
        ({"biases": [None, torch.ones(3), None]}, ValueError, "member 1: bias: expected"),
        ({"x": torch.ones(3, 24, dtype=FP64)}, TypeError, "member 0: weight: expected torch.float64"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        lora_linear_group(**arguments(**changes))
