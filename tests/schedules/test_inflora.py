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


class Attention(nn.Module):
    """Two layers that read one tensor, one that reads it written over, and one that reads another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("query", "key", "late", "out"):
            self.add_module(name, nn.Linear(SIZE, SIZE))

    def forward(self, x):
        y = self.query(x) * self.key(x)
        return self.out(y + self.late(x.mul_(x)))


@pytest.mark.parametrize("inference", [False, True])
def test_layers_that_read_the_same_are_designed_once(monkeypatch, inference):
    model = apply_lora(Attention(), LoRAConfig(r=R, target_modules="all-linear"))
    schedule, calls, real = InfLoRA(model, 2), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: calls.append(1) or real(*a, **k))

    def run(x):
        with torch.inference_mode(inference):
            model(x.clone())

    data = [torch.randn(9, SIZE) for _ in range(3)]
    for task in range(2):
        calls.clear()
        schedule.begin_task(run, data)
        # An inference tensor does not tell whether it was written to.
        assert len(calls) == (4 if inference else 3), task
        schedule.end_task(run, data)
    query, key, late, out = (getattr(model, name).adapters["default"].lora_A for name in model._modules)
    assert torch.equal(query, key) and not torch.equal(query, out) and not torch.equal(query, late)
    memory = schedule.memory
    assert inference or memory["query"].basis is memory["key"].basis
    assert memory["out"].basis is not memory["key"].basis


def test_each_moment_is_of_its_own_rows():
    model = apply_lora(Attention(), LoRAConfig(r=R, target_modules="all-linear"))
    schedule = InfLoRA(model, 1)
    data = [torch.randn(rows, SIZE) for rows in (5, 9)]
    seen = schedule._second_moments(lambda x: model(x.clone()), data)
    whole = torch.cat(data)
    torch.testing.assert_close(seen["key"], whole.T @ whole / 14)
    torch.testing.assert_close(seen["late"], whole.square().T @ whole.square() / 14)


@pytest.mark.parametrize("memory_rank", [0, 3])
def test_the_design_in_float32(memory_rank):
    """As near to that of float64 as a decomposition in float32, up to twice its error."""
    h = second(20, 0)[0]
    exact, narrow = DualGPM(SIZE, h), DualGPM(SIZE, h.float())
    exact.basis = torch.linalg.qr(second(memory_rank, 1)[1].T).Q if memory_rank else exact.basis
    narrow.basis = exact.basis.float()
    want, got = inflora_design(h, exact, R).T, inflora_design(h.float(), narrow, R).double().T
    eager = torch.linalg.svd(narrow.project(h.float())).U[:, :R].double() / 3**0.5
    error, bound = ((one @ one.T - want @ want.T).norm() for one in (got, eager))
    assert error <= 2 * bound


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
