"""Federated learning in one process: a server, its clients, and the round that they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


class Upload(NamedTuple):
    """What a client gives back: tensors by name, and how much it counts (its number of samples, say)."""

    state: State
    weight: float = 1.0


class Traffic(NamedTuple):
    """Bytes of one round, by :func:`payload_bytes`."""

    down: int
    up: int


Client = Callable[[State], Upload]


class Server:
    """The tensors that all clients work on; a rule of aggregation overrides :meth:`update`.

    Args:
        state: the tensors to start with, by name; they are copied.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            raise ValueError("state: expected at least one tensor, got none")
        self.state: State = {name: tensor.detach().clone() for name, tensor in state.items()}

    def send(self, client: int | None = None) -> State:
        """What goes to a client, or to all where no client is named."""
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def update(self, uploads: Sequence[Upload]) -> None:
        """Takes in what the clients of one round gave back."""
        self.state = fed_average([one.state for one in uploads], [one.weight for one in uploads])


def run_round(server: Server, clients: Mapping[int, Client]) -> Traffic:
    """One round: each client trains on what the server sends it, then the server takes in all of it.

    Args:
        server: any :class:`Server`.
        clients: those of this round, by number.

    Raises:
        ValueError: there are none.

    Examples:
        >>> server = Server({"lora_A": torch.zeros(2, 8)})
        >>> run_round(server, {0: lambda state: Upload({"lora_A": torch.ones(2, 8)})}).up
        64
    """
    if not clients:
        raise ValueError("clients: expected at least one, got none")
    uploads, down = [], 0
    for number, client in clients.items():
        state = server.send(number)
        down += payload_bytes(state)
        uploads.append(client(state))
    server.update(uploads)
    return Traffic(down, sum(payload_bytes(one.state) for one in uploads))


def payload_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the elements that are not zero: what a sparse message carries, its indices not counted.

    Examples:
        >>> payload_bytes({"a": torch.tensor([0.0, 1.0, 2.0])})
        8
    """
    return sum(int(tensor.count_nonzero()) * tensor.element_size() for tensor in state.values())


def fed_average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> State:
    """Σ w_i θ_i / Σ w_i

    FedAvg (McMahan et al., 2017, arXiv 1602.05629). Sums are float32, or float64 for float64 tensors.

    Args:
        states: of each client, the same names and shapes.
        weights: how much each counts; all the same by default.

    Raises:
        ValueError: no states, other names or shapes in one of them, or weights that do not fit.

    Examples:
        >>> fed_average([{"a": torch.zeros(2)}, {"a": torch.ones(2)}], weights=[1, 3])
        {'a': tensor([0.7500, 0.7500])}
    """
    shares = shares_of(len(states), weights)
    first = states[0]
    for state in states[1:]:
        if state.keys() != first.keys():
            names = sorted(state.keys() ^ first.keys())
            raise ValueError(f"states: expected the same names in all, got {names[0]} in some")
    return {name: weighted_mean(name, [state[name] for state in states], shares) for name in first}


def weighted_mean(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of tensors of one shape; what is not floating is that of the first."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"states: expected one shape of {name}, got {', '.join(map(str, sorted(shapes)))}")
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = sum(share * tensor.detach().to(wide) for share, tensor in zip(shares, tensors, strict=True))
    return torch.as_tensor(total).to(tensors[0].dtype)


def shares_of(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights over their sum.

    Raises:
        ValueError: nobody, as many weights as there are not, one below 0, or none above.
    """
    if not count:
        raise ValueError("states: expected those of at least one client, got none")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights: expected {count} of at least 0 with one above, got {weights}")
    return [weight / sum(weights) for weight in weights]
