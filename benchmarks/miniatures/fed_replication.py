"""Replication: rounds until clients of unequal ranks reach a loss, beside padding with zeros."""

from __future__ import annotations

import torch

from lora_kernels.compose import ReplicationServer, Upload, run_round

CLAIM = "two clean clients of r = 8 among ten: fewer rounds to a tenth of the loss than with zero padding"
CLIENTS, TALL, HIGH, LOW, WIDTH, LIMIT = 10, 2, 8, 2, 16, 300


def run(seed: int) -> dict[str, float]:
    """Rounds until the loss at r = 8 is a tenth of the first; ``LIMIT`` where it is not reached."""
    return {pad: _rounds(seed, pad) for pad in ("replicate", "zero")}


def holds(figures: list[dict[str, float]]) -> bool:
    """Fewer rounds in every seed."""
    return all(one["replicate"] < one["zero"] for one in figures)


def _rounds(seed, pad):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    change = normal(WIDTH, HIGH) @ normal(HIGH, WIDTH) / WIDTH
    inputs = normal(CLIENTS, 64, WIDTH)
    noise = torch.where(torch.arange(CLIENTS) < TALL, 0.0, 0.3)[:, None, None]
    targets = inputs @ change.T + noise * normal(CLIENTS, 64, WIDTH)
    state = {"lora_A": normal(HIGH, WIDTH) * WIDTH**-0.5, "lora_B": torch.zeros(WIDTH, HIGH)}
    server = ReplicationServer(state, dict.fromkeys(range(TALL, CLIENTS), LOW), pad)
    first = (inputs @ change.T).square().mean()
    clients = {i: lambda state, i=i: _local(state, inputs[i], targets[i]) for i in range(CLIENTS)}
    for round_ in range(LIMIT):
        run_round(server, clients)
        delta = server.state["lora_B"] @ server.state["lora_A"]
        if (inputs @ (delta - change).T).square().mean() < 0.1 * first:
            return round_ + 1
    return LIMIT


def _local(state, x, y):
    a, b = (state[name].requires_grad_() for name in ("lora_A", "lora_B"))
    optimizer = torch.optim.SGD([a, b], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (x @ a.T @ b.T - y).square().mean().backward()
        optimizer.step()
    return Upload({"lora_A": a.detach(), "lora_B": b.detach()})
