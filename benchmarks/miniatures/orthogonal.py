"""The orthogonal start: neither factor is zero, and their product is."""

from __future__ import annotations

from ._pretrained import adapted, loss_of, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes: it starts at the base's loss with a gradient for A, for which"
    " LoRA's start has none, and ends within 1.5 of LoRA's loss after 100 steps at one rate"
)
STEPS, LR = 100, 1e-3


def run(seed: int) -> dict[str, float]:
    """The loss at the start over the base's, the size of A's gradient there, and the loss after training."""
    tuning, figures = pretrained(seed), {}
    base = float(loss_of(tuning.net, tuning.target).detach())
    for name, start in (("LoRA", True), ("orthogonal", "orthogonal")):
        model = adapted(tuning, init_lora_weights=start)
        loss = loss_of(model, tuning.target)
        loss.backward()
        figures[f"{name}, start"] = float(loss.detach()) / base
        figures[f"{name}, gradient of A"] = float(model[0].adapters["default"].lora_A.grad.norm())
        model.zero_grad()
        figures[f"{name}, end"] = losses(tuning, model, STEPS, LR)[0]
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """All of it, in every seed."""
    return all(
        abs(one["orthogonal, start"] - 1) < 1e-5
        and one["orthogonal, gradient of A"] > 0 == one["LoRA, gradient of A"]
        and one["orthogonal, end"] < 1.5 * one["LoRA, end"]
        for one in figures
    )
