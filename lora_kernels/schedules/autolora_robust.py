"""AutoLoRa: robust fine-tuning with a natural branch through LoRA and an adversarial one through W."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.switch import disable_adapters
from ..optim._common import check_keys, check_number, pairs_of
from ._attack import ascend

CHECKS = (0, 16, 24, 28, 36, 40, 42, 44, 46, 48, 50)


class TwoBranches:
    """z_n = f(x; sg(W) + s · B A), z_a = f(x'; W): natural samples train A and B, adversarial ones W

    AutoLoRa (Xu et al., 2023, arXiv 2310.01818). The head trains in both. After training the adapters are
    left out: :meth:`adversarial` is the model that predicts. Run one of the two passes at a time; both may go
    into one loss, :func:`two_branch_loss`.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        head: modules that train in both branches.

    Raises:
        TypeError: of a wrong type.
        ValueError: the model has no LoRA layers.
    """

    def __init__(self, model: nn.Module, head: Iterable[nn.Module] = ()) -> None:
        pairs = pairs_of(model)
        self.model = model
        self.factors = [factor for pair in pairs for factor in (pair.lora_a, pair.lora_b)]
        self.head = [parameter for module in head for parameter in module.parameters()]
        own = {id(one) for one in (*self.factors, *self.head)}
        self.base = [p for p in model.parameters() if id(p) not in own and p.is_floating_point()]

    def parameters(self) -> list[nn.Parameter]:
        """What to give to an optimiser: everything."""
        return list(self.model.parameters())

    def natural(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the adapters, over a W that gets no gradient."""
        with self._training(self.factors, self.base):
            return self.model(*args, **kwargs)

    def adversarial(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output without the adapters, which get no gradient."""
        with self._training(self.base, self.factors), self._plain():
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _training(self, on: list[nn.Parameter], off: list[nn.Parameter]) -> Iterator[None]:
        for parameter in off:
            parameter.requires_grad_(False)
        for parameter in (*on, *self.head):
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in (*on, *off):
                parameter.requires_grad_(True)

    def _plain(self) -> AbstractContextManager[Any]:
        model: Any = self.model
        return model.disable_adapter() if hasattr(model, "disable_adapter") else disable_adapters(model)


def autolora_lambdas(accuracy: float, lambda2_max: float = 6.0) -> tuple[float, float]:
    """λ₁ = 1 - SA, λ₂ = 6 · SA for the natural branch's accuracy SA on the training set

    Raises:
        ValueError: the accuracy is not in [0, 1].

    Examples:
        >>> autolora_lambdas(0.5)
        (0.5, 3.0)
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy: expected 0 <= accuracy <= 1, got {accuracy}")
    return 1 - accuracy, lambda2_max * accuracy


def two_branch_loss(natural: Tensor, adversarial: Tensor, labels: Tensor, l1: float, l2: float) -> Tensor:
    """λ₁ CE(z_n) + (1-λ₁) CE(z_a) + λ₂ · KL(softmax z_n ‖ softmax z_a), the mean over the batch.

    Examples:
        >>> labels = torch.tensor([0, 1, 1])
        >>> loss = two_branch_loss(torch.randn(3, 2), torch.randn(3, 2), labels, *autolora_lambdas(0.5))
    """
    kl = F.kl_div(adversarial.log_softmax(-1), natural.softmax(-1), reduction="batchmean")
    ce = l1 * F.cross_entropy(natural, labels) + (1 - l1) * F.cross_entropy(adversarial, labels)
    return ce + l2 * kl


def pgd(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    radius: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 10,
    bounds: tuple[float, float] = (0.0, 1.0),
    start: float = 1e-3,
) -> Tensor:
    """x' ← clip(x' + η sign ∇ CE(f(x'), y)) into the ball of ``radius`` around x and into ``bounds``.

    Examples:
        >>> model, x = nn.Linear(4, 2), torch.rand(3, 4)
        >>> worst = pgd(model, x, torch.tensor([0, 1, 1]), steps=2)
    """
    limits: dict[str, Any] = {"radius": radius, "step": step, "steps": steps, "bounds": bounds}
    return ascend(lambda z: F.cross_entropy(forward(z), labels), x, **limits, start=start)


class MinAutoLR:
    """η ← η / 2 at a check where fewer than ¾ of the epochs since the last improved, or nothing moved

    AutoLoRa's automatic rate; what may move are η and the best accuracy. Call :meth:`update` after each
    epoch with its robust validation accuracy.

    Args:
        checks: the epochs at which to look, from 0 and rising.
        lr: η at the start.
        rho: the part of the epochs that have to improve on the one before.
        divide: by what η is divided.

    Raises:
        ValueError: a number is out of range, or fewer than two checks, or they do not rise from 0.
    """

    def __init__(
        self, checks: Iterable[int] = CHECKS, lr: float = 0.1, rho: float = 0.75, divide: float = 2.0
    ) -> None:
        self.checks = list(checks)
        check_number("lr", lr)
        check_number("rho", rho)
        check_number("divide", divide, 1.0, above=True)
        rises = all(a < b for a, b in itertools.pairwise(self.checks))
        if len(self.checks) < 2 or self.checks[0] != 0 or not rises:
            raise ValueError(f"checks: expected at least two epochs that rise from 0, got {self.checks}")
        self.lr, self.rho, self.divide = lr, rho, divide
        self.history: list[float] = []
        # η and the best accuracy at the check before.
        self.seen = (lr, -1.0)
        self.epoch = 0

    def update(self, accuracy: float) -> bool:
        """Takes an epoch's accuracy; whether η fell, and the best checkpoint is to be taken up again."""
        self.history.append(accuracy)
        self.epoch += 1
        if self.epoch not in self.checks[1:]:
            return False
        since = self.checks[self.checks.index(self.epoch) - 1]
        values = self.history[max(since - 1, 0) :]
        improved = sum(b > a for a, b in itertools.pairwise(values)) + (since == 0)
        state = (self.lr, max(self.history))
        cut = improved < self.rho * (self.epoch - since) or state == self.seen
        self.seen = state
        if cut:
            self.lr /= self.divide
        return cut

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"lr": self.lr, "history": list(self.history), "seen": list(self.seen), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            TypeError: no mapping.
            ValueError: another's state.
        """
        check_keys("state", ("lr", "history", "seen", "epoch"), state)
        self.lr, self.history, self.epoch = state["lr"], list(state["history"]), state["epoch"]
        self.seen = (state["seen"][0], state["seen"][1])
