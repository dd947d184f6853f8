"""Every structure on a batch without rows: y has its shape, and each gradient is zero."""

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, methods
from lora_kernels.nn import side_inputs
from lora_kernels.testing.method_cases import CASES, IN, OUT, RANK, MethodCase

# Of factors that a network makes for each layer, whose names a single layer lacks.
APART = {"vlora"}


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("key", [key for key in methods.structures() if key not in APART])
def test_no_rows(key, lead):
    torch.manual_seed(0)
    case, model = CASES.get(key, MethodCase()), nn.Sequential(nn.Linear(IN, OUT))
    options = {"r": RANK, "target_modules": ["0"], "method": key, "init_lora_weights": False} | case.options
    apply_lora(model, LoRAConfig(**options))
    x = torch.randn(*lead, IN, requires_grad=True)
    with side_inputs(model, **case.side(x)):
        y = model(x)
        assert y.shape == (*lead, OUT)
        y.sum().backward()
    assert x.grad is None or x.grad.shape == x.shape
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
