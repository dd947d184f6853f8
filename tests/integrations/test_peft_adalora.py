"""PEFT's AdaLoRA accelerated: its orthogonality loss and its allocator go on as they do in PEFT."""

import copy
from types import SimpleNamespace

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.tuners.adalora import FusedAdaLora


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        return SimpleNamespace(loss=self.second(torch.tanh(self.first(x))).square().mean())


def wrapped():
    torch.manual_seed(0)
    options = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 1, "total_step": 12}
    config = AdaLoraConfig(target_modules=["first", "second"], orth_reg_weight=0.5, **options)
    model = get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.double()


def trained(model, steps=12):
    """The losses, and every singular value at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    data, losses = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for step in range(steps):
        loss = model(data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_loss_and_ranks_are_pefts():
    model = wrapped()
    peft = copy.deepcopy(model)
    report = accelerate(model)
    assert len(report.accelerated) == 2 and not report.skipped
    assert isinstance(model.base_model.model.first, FusedAdaLora)
    (losses, ours), (exact, theirs) = trained(model), trained(peft)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=name)
    left = sum(int((value != 0).sum()) for name, value in ours.items() if "lora_E" in name)
    assert left == 2 * 2, "the allocator has taken what is above the target"
    assert decelerate(model) == 2
