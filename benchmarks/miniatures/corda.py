"""CorDA: W's components ordered by what they do to the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import calibrate

from ._pretrained import adapted, losses, pretrained

CLAIM = (
    "a pretrained net: with ipm, tuned to other classes, below half of LoRA's loss after 30 steps at one"
    " rate; without the components that kpm takes outputs on what it knows change by less than without W's"
    " least ones"
)
STEPS, LR, R = 30, 1e-3, 16


def run(seed: int) -> dict[str, float]:
    """The losses on the target, and the parts of the outputs that are lost with r components."""
    tuning = pretrained(seed)

    def covariance(x: Tensor) -> object:
        return calibrate(tuning.net, [x], ("covariance",))

    ipm = {"init_lora_weights": "corda", "statistics": covariance(tuning.target[0])}
    kpm = {"init_lora_weights": "corda", "statistics": covariance(tuning.source[0])}
    kpm["method_options"] = {"corda_method": "kpm"}
    return {
        "LoRA, loss": losses(tuning, adapted(tuning), STEPS, LR)[0],
        "ipm, loss": losses(tuning, adapted(tuning, **ipm), STEPS, LR)[0],
        "kpm, lost": _lost(tuning, adapted(tuning, R, **kpm)),
        "least, lost": _lost(tuning, adapted(tuning, R, init_lora_weights="milora")),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["ipm, loss"] < 0.5 * one["LoRA, loss"] and one["kpm, lost"] < one["least, lost"]
        for one in figures
    )


@torch.no_grad()
def _lost(tuning: object, model: torch.nn.Module) -> float:
    """‖x (s B A)ᵀ‖ over ‖x Wᵀ‖ for the known samples x at the first layer."""
    x, layer = tuning.source[0], model[0]
    return float((x @ layer.adapters["default"].delta().T).norm() / (x @ layer.bare_weight.T).norm())
