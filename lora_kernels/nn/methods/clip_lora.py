"""CLIP-LoRA: few-shot adaptation of both towers of a CLIP, one recipe for all data sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters import LoRAConfig
from ..adapted import lora_layers
from ..apply import apply_lora

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_TOWERS = {"text": ("text_model",), "vision": ("vision_model",), "both": ("text_model", "vision_model")}


class FewShot(NamedTuple):
    """What trains: the optimiser, its schedule, and how many steps to take."""

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps: int


def apply_clip_lora(
    clip: nn.Module,
    r: int = 2,
    alpha: float = 1,
    params: str = "qkv",
    encoder: str = "both",
    dropout: float = 0.25,
) -> nn.Module:
    """ΔW = (α/√r) · B A on the projections of every attention of both encoders

    CLIP-LoRA (Zanella and Ben Ayed, 2024, arXiv 2405.18541). The projections of one attention share their
    input and are computed together.

    Args:
        clip: a ``CLIPModel`` of Transformers, or one of its names.
        r: rank.
        alpha: α.
        params: letters of ``q``, ``k``, ``v`` and ``o``.
        encoder: ``"text"``, ``"vision"`` or ``"both"``.
        dropout: on the branch's input, for each projection by itself.

    Returns:
        ``clip`` itself; merge it for evaluation by :func:`merge_adapters`.

    Raises:
        ValueError: other letters or another encoder, or a model without such layers.
    """
    if not params or set(params) - set(_PROJECTIONS):
        raise ValueError(f"params: expected letters of {''.join(_PROJECTIONS)}, got {params!r}")
    if encoder not in _TOWERS:
        raise ValueError(f"encoder: expected one of {', '.join(_TOWERS)}, got {encoder!r}")
    names = "|".join(_PROJECTIONS[letter] for letter in params)
    targets = rf"(.*\.)?({'|'.join(_TOWERS[encoder])})\..*\b({names})"
    config = LoRAConfig(r, alpha, target_modules=targets, lora_dropout=dropout, use_rslora=True)
    return apply_lora(clip, config)


def few_shot_recipe(clip: nn.Module, shots: int) -> FewShot:
    """AdamW of 2e-4 and decay 1e-2, a cosine down to 1e-6, 500 · shots steps, for what trains

    Raises:
        ValueError: fewer than one shot, or a model without adapters.
    """
    if shots < 1 or not lora_layers(clip):
        what = "a model with adapters" if shots >= 1 else "at least 1"
        raise ValueError(f"shots: expected {what}, got {shots}")
    steps = 500 * shots
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    return FewShot(optimizer, schedule, steps)


def few_shot_loss(images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor | float) -> Tensor:
    """CE(logit_scale · norm(images) norm(texts)ᵀ, labels), a text for each class"""
    logits = logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return F.cross_entropy(logits, labels)
