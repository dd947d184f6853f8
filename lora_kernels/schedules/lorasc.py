"""LoRASC: cycles of fast adapters on a noisy base, part of each kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim._common import check_number
from ._common import fill_, generator
from ._periodic import Periodic

# Apart enough that neighbouring seeds share no cycle's noise.
_STRIDE = 1_000_003


class LoRASC(Periodic):
    """In a cycle W̃ = W + U(-½, ½) · λ · std(W); at its end W ← W + α · s · B A, and A, B and moments anew

    LoRASC (Li et al., 2024, arXiv 2407.01491), slow cascaded learning. The pipeline is the paper's; α, the
    form of the noise and that W itself is the slow part are from memory. The noise is one draw a cycle and
    leaves no trace: with λ > 0 a copy of every adapted W is kept, here and in the checkpoint. Noise is put
    in at once; call :meth:`finish` when training is done.

    Args:
        model: one of :func:`apply_lora` or of PEFT with plain LoRA.
        optimizer: what trains it.
        every: steps of a cycle, an epoch's say.
        alpha: α in (0, 1], the part of a cycle's adapter that stays; with 1 and no noise the output goes on
            as it was.
        noise: λ.
        seed: of the noise and of the new A.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, W cannot take the adapters (see :class:`ReLoRA`), or is
            quantised and there is noise.
    """

    key = "lorasc"
    saved = ("rng", "cycles", "clean")

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int,
        alpha: float = 0.5,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, every, seed)
        check_number("alpha", alpha, above=True)
        check_number("noise", noise)
        if alpha > 1:
            raise ValueError(f"alpha: expected at most 1, got {alpha}")
        self.alpha, self.noise, self.seed, self.cycles = alpha, noise, seed, 0
        self._weights: dict[str, Tensor] = {}
        for pair in self.pairs if noise else ():
            if pair.weight is None:
                raise ValueError(f"noise: expected 0 over a quantised weight ({pair.name}), got {noise}")
            self._weights[pair.name] = pair.weight
        self._disturb()

    def cycle(self) -> None:
        """Takes the noise out, keeps a part of the adapters, and begins anew."""
        self._restore()
        self.merge_and_restart(self.alpha)
        self.forget()
        self.cycles += 1
        self._disturb()

    def finish(self) -> None:
        """Takes the noise out; the adapters stay as they are."""
        self._restore()

    def restored(self) -> None:
        """The clean W of the checkpoint with its cycle's noise."""
        self._restore()
        self._disturb()

    @torch.no_grad()
    def _disturb(self) -> None:
        self.clean = {name: weight.detach().clone() for name, weight in self._weights.items()}
        rng = generator(self.seed * _STRIDE + self.cycles)
        for weight in self._weights.values():
            drawn = fill_(torch.empty_like(weight), rng, "uniform_", -0.5, 0.5)
            weight.add_(drawn * (self.noise * weight.std()))

    @torch.no_grad()
    def _restore(self) -> None:
        for name, weight in self._weights.items():
            weight.copy_(self.clean[name])
