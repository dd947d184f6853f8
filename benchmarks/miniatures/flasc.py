"""FLASC: a federated regression at a quarter of the bytes, beside dense FedAdam and frozen sparsity."""

from __future__ import annotations

import torch

from lora_kernels.compose import FLASC, run_round, topk_mask

CLAIM = (
    "density ¼ both ways, at ¼ of the bytes: within 0.1 of dense FedAdam's loss (in units of the first),"
    " and below the loss with a mask of ¼ fixed at the start"
)
CLIENTS, WIDTH, RANK, TRUE_RANK, ROUNDS, SAMPLES = 8, 16, 16, 1, 60, 24


def run(seed: int) -> dict[str, float]:
    """Final loss over the loss at the start, and bytes over the dense run's."""
    problem = _problem(seed)
    dense, dense_bytes = _train(problem, 1.0, frozen=False)
    sparse, sparse_bytes = _train(problem, 0.25, frozen=False)
    pruned, _ = _train(problem, 0.25, frozen=True)
    return {"dense": dense, "¼": sparse, "¼ fixed": pruned, "bytes": sparse_bytes / dense_bytes}


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(
        one["¼"] < one["dense"] + 0.1 and one["¼ fixed"] > one["¼"] and one["bytes"] < 0.26 for one in figures
    )


def _problem(seed):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(WIDTH, TRUE_RANK, generator=generator)
    change = change @ torch.randn(TRUE_RANK, WIDTH, generator=generator)
    inputs = torch.randn(CLIENTS, SAMPLES, WIDTH, generator=generator)
    a = torch.randn(RANK, WIDTH, generator=generator) * WIDTH**-0.5
    return inputs, inputs @ change.T, {"lora_A": a, "lora_B": torch.zeros(WIDTH, RANK)}


def _loss(state, x, y):
    return (x @ state["lora_A"].T @ state["lora_B"].T - y).square().mean()


def _train(problem, density, frozen):
    inputs, targets, start = problem
    server = FLASC(start, d_dl=density, d_ul=1.0 if frozen else density, lr=0.02)
    keep = _mask(start, inputs, targets, density) if frozen else None
    if frozen:
        server.d_dl = 1.0
    moved = 0
    for _ in range(ROUNDS):
        clients = {}
        for i in range(CLIENTS):
            clients[i] = server.client(i, lambda state, i=i: _local(state, inputs[i], targets[i], keep))
        traffic = run_round(server, clients)
        moved += traffic.down + traffic.up
    first = _loss(start, inputs, targets)
    return float(_loss(server.send(), inputs, targets) / first), moved


def _mask(start, inputs, targets, density):
    """A quarter chosen once, by the first gradient: sparsity that stays."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    leaves["lora_B"] = (leaves["lora_B"].detach() + 1e-2).requires_grad_()
    grads = torch.autograd.grad(_loss(leaves, inputs, targets), list(leaves.values()))
    return {name: topk_mask(grad, density) for name, grad in zip(leaves, grads, strict=True)}


def _local(state, x, y, keep):
    leaves = {name: tensor.requires_grad_() for name, tensor in state.items()}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=2e-3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(leaves, x, y).backward()
        for name, tensor in leaves.items():
            if keep is not None:
                tensor.grad *= keep[name]
        optimizer.step()
    return leaves
