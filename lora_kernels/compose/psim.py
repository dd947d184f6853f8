"""PSIM: a second adapter, trained on random labels, tells poisoned inputs by its confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .denoising import first_tensor
from .together import forward_each


def reset_labels(labels: Tensor, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """y' ~ uniform on the classes, drawn once for each sample before training

    Raises:
        ValueError: fewer than two classes.

    Examples:
        >>> reset_labels(torch.tensor([0, 1, 1]), classes=4).shape
        torch.Size([3])
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return drawn.to(labels.device, labels.dtype)


def psim_flag(logits: Tensor, threshold: float = 0.7) -> Tensor:
    """max softmax(logits) > threshold, for each sample

    Raises:
        ValueError: the threshold is not 0 to 1.

    Examples:
        >>> psim_flag(torch.tensor([[4.0, 0.0], [0.1, 0.0]]))
        tensor([ True, False])
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected 0 to 1, got {threshold}")
    return logits.softmax(-1).amax(-1) > threshold


class PSIM:
    """y = argmax victim(x), or −1 where max softmax(psim(x)) > threshold

    PSIM (Zhao et al., 2024, arXiv 2402.12168), a defence of fine-tuning on a backbone that may be poisoned:
    a second adapter learns labels of :func:`reset_labels`, and stays unsure of all but inputs with a trigger.
    Both adapters share the base and one pass.

    Args:
        model: gives logits ``[samples, classes]``, or an output that begins with them.
        victim: the adapter that was trained on the labels.
        adapter: that of the reset labels.
        threshold: of the confidence.

    Raises:
        ValueError: the threshold is not 0 to 1.
    """

    def __init__(
        self, model: nn.Module, victim: str = "victim", adapter: str = "psim", threshold: float = 0.7
    ) -> None:
        psim_flag(torch.zeros(1, 2), threshold)
        self.model, self.victim, self.adapter, self.threshold = model, victim, adapter, threshold

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Tensor:
        """The class of each sample, −1 of those that are excluded."""
        outputs = forward_each(self.model, [self.victim, self.adapter], *args, **kwargs)
        answer, other = (first_tensor(one) for one in outputs)
        return answer.argmax(-1).masked_fill(psim_flag(other, self.threshold), -1)
