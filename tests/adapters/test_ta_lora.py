"""TA-LoRA's own promises."""

from __future__ import annotations

import pytest
import torch
from cases import IN, OUT, RANK, new_layer, shake
from oracles import agrees, shape_of_x, trained
from torch import nn

from lora_kernels.adapters.low_rank.ta_lora import orthogonality
from lora_kernels.nn import LoRALinear, side_inputs

WIDE = torch.float64
TASKS, OUT_RANK, TASK_RANK = 3, 5, 2
OPTIONS = {"tasks": TASKS, "rank_out": OUT_RANK, "rank_tasks": TASK_RANK}


def new():
    return new_layer("ta_lora", method_options=OPTIONS)


def delta(m, k):
    """U2 C_k U1ᵀ, element by element of the Tucker sum."""
    return 6 / RANK * torch.einsum("or,sri,i,sn->on", m.lora_B, m.core, m.tasks[k], m.lora_A)


def test_one_task_for_the_batch():
    layer = shake(new())
    for k in range(TASKS):
        agrees(layer, lambda m, x, k=k: x @ delta(m, k).T, task=k)
    assert trained(layer) == RANK * OUT_RANK * TASK_RANK + IN * RANK + OUT * OUT_RANK + TASKS * TASK_RANK


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_a_task_for_each_sample_or_row(shape):
    layer, task = shake(new()), torch.randint(TASKS, shape)

    def branch(m, x):
        every = torch.stack([x @ delta(m, k).T for k in range(TASKS)], -1)
        chosen = task.reshape(*shape, *[1] * (every.dim() - len(shape))).expand(*every.shape[:-1], 1)
        return every.gather(-1, chosen)[..., 0]

    agrees(layer, branch, task=task)


def test_independent_cores():
    """U the identity and v = tasks: slice k of the core is task k's alone."""
    layer = shake(new_layer("ta_lora", method_options={"tasks": 3, "rank_tasks": 3}))
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.tasks.copy_(torch.eye(3))
    for k in range(3):
        want = 6 / RANK * adapter.lora_B @ adapter.core[..., k].T @ adapter.lora_A
        torch.testing.assert_close(delta(adapter, k), want)


def test_the_regulariser():
    model = nn.Sequential(shake(new()), shake(new()))
    norms = []
    for layer in model:
        m = layer.adapters["default"]
        factors = [m.lora_A.T, m.lora_B, *(m.core[..., v] for v in range(TASK_RANK))]
        norms += [(f.T @ f - torch.eye(f.shape[1], dtype=WIDE)).norm() for f in factors]
    torch.testing.assert_close(orthogonality(model), sum(norms) / len(norms))
    with pytest.raises(ValueError, match="model: expected adapters of the method ta_lora, got none"):
        orthogonality(nn.Linear(2, 2))


def test_what_it_refuses():
    layer, x = new(), shape_of_x(2, 3)
    for task, words in (
        (3, "task: expected 0 to 2, got 3"),
        (
            torch.zeros(3, dtype=torch.long),
            r"task: expected one for each of the first dimensions of x \(2, 3",
        ),
    ):
        with side_inputs(layer, task=task), pytest.raises(ValueError, match=words):
            layer(x)
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        LoRALinear(4, 4, r=2, method="ta_lora", method_options={"tasks": 0})
