"""InfLoRA: what a task may touch, and what the memory holds."""

from __future__ import annotations

import pytest
import torch
from optim_models import net, ours
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import InfLoRA
from lora_kernels.schedules.inflora import DualGPM, inflora_design

SIZE, R = 12, 2


def second(rank, seed):
    x = torch.randn(rank, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rank, x


def projector(memory):
    inside = memory.basis @ memory.basis.T
    return inside if memory.keeps else torch.eye(SIZE, dtype=torch.float64) - inside


def test_the_design_is_beside_the_memory():
    h, x = second(4, 0)
    memory = DualGPM(SIZE, h)
    memory.update(h, 1.0)
    assert memory.keeps and memory.basis.shape == (SIZE, 4)
    a = inflora_design(second(5, 1)[0], memory, R)
    unit = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(a @ a.T, unit / 3)
    assert (a @ memory.basis).abs().max() < 1e-12 and (a @ x.T).abs().max() < 1e-12


def test_the_memory_turns_over_and_stays_the_same_space():
    memory, rows = DualGPM(SIZE, torch.zeros(1, dtype=torch.float64)), []
    for seed, rank in ((0, 4), (1, 3), (2, 2)):
        h, x = second(rank, seed)
        rows.append(x)
        memory.update(h, 1.0)
        count = memory.basis.shape[1]
        unit = torch.eye(count, dtype=torch.float64)
        torch.testing.assert_close(memory.basis.T @ memory.basis, unit, rtol=0, atol=1e-10)
        q = torch.linalg.qr(torch.cat(rows).T).Q
        torch.testing.assert_close(projector(memory), q @ q.T, rtol=0, atol=1e-7)
    assert not memory.keeps and memory.basis.shape[1] == SIZE - 9


def test_a_part_of_the_energy():
    q = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64)).Q
    h = q @ torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.0] * 9, dtype=torch.float64)) @ q.T
    memory = DualGPM(SIZE, h)
    memory.update(h, 0.9)  # 9/14, 13/14
    assert memory.basis.shape[1] == 2
    memory.update(h, 0.9)
    assert memory.basis.shape[1] == 2


def tasks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, 7, dtype=torch.float64))
    apply_lora(model, LoRAConfig(r=R, target_modules=["0"]))
    return model, [second(4, seed)[1] for seed in range(2)]


def test_old_outputs_stay_and_a_does_not_train():
    model, data = tasks()
    schedule = InfLoRA(model, 2, share=1.0)
    adapter = model[0].adapters["default"]
    for x in data:
        schedule.begin_task(model, [x])
        assert not adapter.lora_A.requires_grad and not adapter.lora_B.any()
        before = [model(one).detach() for one in data]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == R * 7
        with torch.no_grad():
            adapter.lora_B.normal_()
        with_task = model(x).detach()
        schedule.end_task(model, [x])
        torch.testing.assert_close(model(x), with_task)
    torch.testing.assert_close(model(data[0]), before[0], rtol=1e-10, atol=1e-10)
    assert (model(data[1]) - before[1]).abs().max() > 0.1


def test_a_state_goes_on():
    model, data = tasks()
    one = InfLoRA(model, 2)
    one.begin_task(model, [data[0]])
    one.end_task(model, [data[0]])
    other = InfLoRA(model, 2)
    other.load_state_dict(one.state_dict())
    assert other.done == 1 and torch.equal(other.memory["0"].basis, one.memory["0"].basis)
    with pytest.raises(ValueError, match="state: expected one of 'inflora', got one of 'relora'"):
        other.load_state_dict({"schedule": "relora"})
    with pytest.raises(ValueError, match=r"state\['memory'\]: expected '0', got nothing"):
        other.load_state_dict({"schedule": "inflora", "done": 0, "memory": {}})


def test_bad_input():
    model, data = tasks()
    with pytest.raises(ValueError, match="share: expected 0 <= share"):
        InfLoRA(model, 2, share=2)
    with pytest.raises(ValueError, match="model: expected a model with LoRA layers"):
        InfLoRA(net(), 2)
    with pytest.raises(ValueError, match="batches: expected them to reach every layer, and 0 never ran"):
        InfLoRA(model, 2).begin_task(model, [])
    memory = DualGPM(SIZE, data[0])
    memory.update(torch.eye(SIZE, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="r: expected at most the"):
        inflora_design(torch.eye(SIZE, dtype=torch.float64), memory, 12)
    assert ours() is not None
