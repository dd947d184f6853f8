"""Several adapters in one denoising process: LoRA Switch and LoRA Composite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import set_adapter
from .together import forward_each


class SwitchSchedule:
    """Step t of T uses adapter ⌊((t − 1) mod k τ) / τ⌋, t from 1

    LoRA Switch (Zhong et al., 2024, arXiv 2402.16843): the k adapters take turns, τ steps each.

    Args:
        names: the adapters, in their order.
        period: τ.
        late: whether the first turn of all is one step longer, as in the paper's published code.

    Raises:
        ValueError: no names, or a period below 1.
    """

    def __init__(self, names: Sequence[str], period: int = 5, *, late: bool = False) -> None:
        if isinstance(names, str) or not names:
            raise ValueError(f"names: expected adapters, got {names!r}")
        if period < 1:
            raise ValueError(f"period: expected at least 1, got {period}")
        self.names, self.period, self.late = tuple(names), period, late

    def at(self, step: int) -> str:
        """The adapter of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        turn = max(step - self.late, 0) // self.period
        return self.names[turn % len(self.names)]

    def choose(self, model: nn.Module, step: int) -> None:
        """Makes the step's adapter the active one of ``model``."""
        set_adapter(model, self.at(step))


def composite_forward(
    model: nn.Module, adapters: Sequence[str], *args: Any, combine: str = "mean", **kwargs: Any
) -> Tensor:
    """e = (1/k) Σ_i e(x; adapter i), in one pass

    LoRA Composite (Zhong et al., 2024, arXiv 2402.16843). Classifier-free guidance of the means is the mean
    of the guided: give both halves of the batch at once, or call it for each.

    Args:
        model: one of :func:`apply_lora` whose output is a tensor, or begins with one.
        adapters: names, each once.
        args: of the model; as :func:`forward_each`, whose ``repeats`` and ``batch_dim`` may be among
            ``kwargs``.
        combine: ``"mean"``, or ``"sum"``.
        kwargs: of the model.

    Raises:
        ValueError: as :func:`forward_each`, or another ``combine``.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> model = apply_lora(apply_lora(nn.Sequential(nn.Linear(4, 4)), config, "hat"), config, "coat")
        >>> composite_forward(model, ["hat", "coat"], torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """
    if combine not in ("mean", "sum"):
        raise ValueError(f"combine: expected 'mean' or 'sum', got {combine!r}")
    outputs = [first_tensor(one) for one in forward_each(model, adapters, *args, **kwargs)]
    total = torch.stack(outputs).sum(0)
    return total / len(outputs) if combine == "mean" else total


def first_tensor(output: Any) -> Tensor:
    """The tensor that an output is or begins with."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if hasattr(output, "values") else output[0]
