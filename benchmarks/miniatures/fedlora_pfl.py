"""FedDecomp: personal linears that share most of W, each with few samples."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import FedDecompClient, Server, Upload, run_round, split_state

CLAIM = "eight clients, W_m of one shared part and rank 1: test loss below FedAvg's and below training alone"
CLIENTS, WIDTH, SAMPLES, ROUNDS = 8, 12, 8, 20


def run(seed: int) -> dict[str, float]:
    """Mean test loss of the clients' own models."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(WIDTH, WIDTH, generator=generator)
    own = [shared + torch.outer(*torch.randn(2, WIDTH, generator=generator).unbind()) for _ in range(CLIENTS)]
    data = [torch.randn(SAMPLES, WIDTH, generator=generator) for _ in range(CLIENTS)]
    ways = {"FedDecomp": _decomposed, "FedAvg": _averaged, "alone": _alone}
    return {name: _test(train([*zip(data, own, strict=True)]), own) for name, train in ways.items()}


def holds(figures: list[dict[str, float]]) -> bool:
    """Below both in every seed."""
    return all(one["FedDecomp"] < min(one["FedAvg"], one["alone"]) for one in figures)


def _fit(data, own):
    def fit(model, parameters, epochs):
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        for _ in range(5 * epochs):
            optimizer.zero_grad()
            (model(data) - data @ own.T).square().mean().backward()
            optimizer.step()

    return fit


def _model(rank=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    return apply_lora(model, LoRAConfig(r=rank, lora_alpha=1, target_modules="all-linear")) if rank else model


def _decomposed(clients):
    members = [_model(rank=2) for _ in clients]
    run_on = {i: FedDecompClient(members[i], _fit(*one)) for i, one in enumerate(clients)}
    server = Server(split_state(members[0])[0])
    for _ in range(ROUNDS):
        run_round(server, run_on)
    for model in members:
        model.load_state_dict({**server.send(), **split_state(model)[1]})
    return members


def _averaged(clients):
    server, model = Server(_model().state_dict()), _model()

    def client(one):
        def train(state):
            model.load_state_dict(state)
            _fit(*one)(model, list(model.parameters()), 5)
            return Upload({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

        return train

    for _ in range(ROUNDS):
        run_round(server, {i: client(one) for i, one in enumerate(clients)})
    model.load_state_dict(server.state)
    return [model] * len(clients)


def _alone(clients):
    members = [_model() for _ in clients]
    for model, one in zip(members, clients, strict=True):
        _fit(*one)(model, list(model.parameters()), 5 * ROUNDS)
    return members


@torch.no_grad()
def _test(members, own):
    x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(99))
    losses = [(model(x) - x @ w.T).square().mean() for model, w in zip(members, own, strict=True)]
    return float(torch.stack(losses).mean())
