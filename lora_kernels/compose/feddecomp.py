"""FedDecomp: the weights are everyone's, the adapters each client's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn import lora_state_dict
from .rounds import State, Upload

Fit = Callable[[nn.Module, list[nn.Parameter], int], None]


def split_state(model: nn.Module) -> tuple[State, State]:
    """(shared, personal): a model's state without its adapters, and the adapters alone.

    Both by the names of ``state_dict``.

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> shared, personal = split_state(model)
        >>> sorted(shared)
        ['0.bias', '0.weight']
    """
    personal = set(lora_state_dict(model))
    if not personal:
        raise ValueError("model: expected one with adapters (apply_lora), got one without")
    state = model.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name not in personal}
    return shared, {name: tensor for name, tensor in state.items() if name in personal}


class FedDecompClient:
    """W_m = S + s B_m A_m: first A_m and B_m train on what the server sent, then S, which goes back

    FedDecomp (2024, arXiv 2406.19931; the list has it as FedLoRA). A client of
    :func:`~lora_kernels.compose.run_round` with a plain :class:`~lora_kernels.compose.Server`, which
    averages. A_m and B_m never leave the client. S trains from scratch, so nothing of it is frozen.

    Args:
        model: one of :func:`apply_lora`; whatever is not of an adapter is S.
        fit: ``fit(model, parameters, epochs)`` trains just these parameters.
        personal_epochs: of A_m and B_m; 2 in the paper's runs.
        shared_epochs: of S; 3 there.
        samples: how much the client counts in the mean.

    Raises:
        ValueError: the model has no adapters, or a number is below 0.
    """

    def __init__(
        self,
        model: nn.Module,
        fit: Fit,
        *,
        personal_epochs: int = 2,
        shared_epochs: int = 3,
        samples: float = 1.0,
    ) -> None:
        split_state(model)
        given = {"personal_epochs": personal_epochs, "shared_epochs": shared_epochs, "samples": samples}
        for name, value in given.items():
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        self.model, self.fit, self.samples = model, fit, samples
        self.epochs = (personal_epochs, shared_epochs)

    def __call__(self, state: State) -> Upload:
        """Trains both phases from the server's ``state``."""
        shared, personal = split_state(self.model)
        if state.keys() != shared.keys():
            names = sorted(state.keys() ^ shared.keys())
            raise ValueError(f"state: expected what the model shares, got another set of names ({names[0]})")
        self.model.load_state_dict({**state, **personal})
        for mine, epochs in zip((True, False), self.epochs, strict=True):
            self.fit(self.model, self._phase(personal, mine), epochs)
        return Upload(
            {name: _copy(tensor) for name, tensor in split_state(self.model)[0].items()}, self.samples
        )

    def _phase(self, personal: State, mine: bool) -> list[nn.Parameter]:
        """The parameters of a phase, which alone train in it."""
        chosen = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_((name in personal) == mine)
            parameter.grad = None
            chosen += [parameter] if parameter.requires_grad else []
        return chosen


def _copy(tensor: Tensor) -> Any:
    return tensor.detach().clone()
