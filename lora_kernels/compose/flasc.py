"""FLASC: sparse messages both ways, dense training in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rounds import Client, Server, State, Upload


def topk_mask(values: Tensor, density: float) -> Tensor:
    """True at the ⌊density · n⌋ elements of largest |value|; ties go to the first.

    Args:
        values: any shape.
        density: 0 to 1.

    Raises:
        ValueError: the density is not.

    Examples:
        >>> topk_mask(torch.tensor([1.0, -3.0, 2.0, 0.5]), density=0.5)
        tensor([False,  True,  True, False])
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {density}")
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    order = values.detach().abs().flatten().argsort(descending=True, stable=True)
    mask[order[: int(density * values.numel())]] = True
    return mask.view(values.shape)


class FLASC(Server):
    """θ ← AdamW(θ, (1/n) Σ_i top_up(θ ⊙ m − θ_i)),  m = top_down(|θ|)

    FLASC (Kuo et al., 2024, arXiv 2406.05233). The server sends its largest values alone, each client trains
    all of them, and sends back the largest changes alone; what the server does not send it keeps. With both
    densities 1 this is FedAdam. The masks are of all tensors together.

    Args:
        state: what trains, by name (the adapters').
        d_dl: density of what goes down; a number, or a function of the client's number.
        d_ul: density of what goes up; likewise.
        lr: of the server's AdamW, which has no weight decay.
        clip: C, the largest ‖change‖₂ of a client; the sum is then divided by C. ``None``: no clipping.
        noise: σ of the normal noise that is added to the sum so divided; only with ``clip``.
        generator: draws the noise.

    Raises:
        ValueError: a density that is not 0 to 1, a ``clip`` that is not above 0, or noise without it.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        d_dl: float | Callable[[int | None], float] = 0.25,
        d_ul: float | Callable[[int | None], float] = 0.25,
        lr: float = 1e-3,
        clip: float | None = None,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(state)
        for name, density in (("d_dl", d_dl), ("d_ul", d_ul)):
            if not callable(density) and not 0 <= density <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {density}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a number above 0, or None, got {clip}")
        if noise < 0 or (noise and clip is None):
            raise ValueError(f"noise: expected at least 0, and above 0 only with clip, got {noise}")
        self.d_dl, self.d_ul, self.clip, self.noise, self.generator = d_dl, d_ul, clip, noise, generator
        self.optimizer = torch.optim.AdamW(list(self.state.values()), lr=lr, weight_decay=0.0)

    def send(self, client: int | None = None) -> State:
        return _sparse(super().send(client), _density(self.d_dl, client))

    def client(self, number: int, train: Callable[[State], Mapping[str, Tensor]]) -> Client:
        """A client of this server: ``train`` gives the tensors after training on those it is given."""

        def run(state: State) -> Upload:
            # Training may work in place.
            after = train({name: tensor.clone() for name, tensor in state.items()})
            change = {name: tensor - after[name].detach() for name, tensor in state.items()}
            return Upload(self._clipped(_sparse(change, _density(self.d_ul, number))))

        return run

    def update(self, uploads: Sequence[Upload]) -> None:
        for name, tensor in self.state.items():
            total: Any = sum(one.state[name] for one in uploads)
            if self.clip is not None:
                noise = torch.empty_like(total).normal_(generator=self.generator)
                total = total / self.clip + self.noise * noise
            tensor.grad = total / len(uploads)
        self.optimizer.step()

    def _clipped(self, change: State) -> State:
        if self.clip is None:
            return change
        norm = torch.linalg.vector_norm(torch.stack([tensor.norm() for tensor in change.values()]))
        return {name: tensor / (norm / self.clip).clamp(min=1) for name, tensor in change.items()}


def _density(given: float | Callable[[int | None], float], client: int | None) -> float:
    return given(client) if callable(given) else given


def _sparse(state: State, density: float) -> State:
    """The largest values of all tensors together, the others zero."""
    if density == 1:
        return state
    mask = topk_mask(torch.cat([tensor.flatten() for tensor in state.values()]), density)
    parts = mask.split([tensor.numel() for tensor in state.values()])
    return {
        name: torch.where(part.view(tensor.shape), tensor, 0.0)
        for part, (name, tensor) in zip(parts, state.items(), strict=True)
    }
