"""LoRA+: B learns faster than A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ._common import build, check_number, check_optimizer_class, pairs_of


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    *,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """η_B = ratio · η_A, as parameter groups for any optimiser

    LoRA+ (Hayou et al., 2024, arXiv 2402.12354). The groups are those of PEFT, in its order: A and whatever
    else trains; the factors of embeddings; B, and vectors; biases and the weights of norms, which do not
    decay. Some may be empty.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        lr: η_A.
        ratio: η_B / η_A, above 0; the paper suggests 16 or so, more the wider the model.
        lr_embedding: of both factors of embeddings.
        weight_decay: of all but biases and norms.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: the model has no LoRA layers, or a number is out of range.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> [group["lr"] for group in lora_plus_groups(model, lr=1.0, ratio=16) if group["params"]]
        [1.0, 16.0]
    """
    pairs = pairs_of(model)
    check_number("lr", lr)
    check_number("ratio", ratio, above=True)
    check_number("lr_embedding", lr_embedding)
    check_number("weight_decay", weight_decay)
    embedded = {id(p) for pair in pairs if pair.is_embedding for p in (pair.lora_a, pair.lora_b)}
    fast = {id(pair.lora_b) for pair in pairs}
    parts: list[list[nn.Parameter]] = [[], [], [], []]
    for name, parameter, in_norm in _trained(model):
        if id(parameter) in embedded:
            parts[1].append(parameter)
        elif id(parameter) in fast or parameter.ndim == 1 or name.endswith("_lora_B"):  # of experts
            parts[3 if in_norm or "bias" in name else 2].append(parameter)
        else:
            parts[0].append(parameter)
    rates = (lr, lr_embedding, lr * ratio, lr * ratio)
    decays = (weight_decay, weight_decay, weight_decay, 0.0)
    columns = zip(parts, rates, decays, strict=True)
    return [{"params": part, "lr": rate, "weight_decay": decay} for part, rate, decay in columns]


def lora_plus(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    ratio: float,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
    **options: Any,
) -> Optimizer:
    """An optimiser of that class over :func:`lora_plus_groups`

    torch's AdamW, Adam and SGD come in their fused form, unless ``options`` say otherwise.

    Args:
        model: one of :func:`apply_lora` or of PEFT.
        optimizer_cls: any class of optimisers.
        lr: η_A.
        ratio: η_B / η_A.
        lr_embedding: of both factors of embeddings.
        weight_decay: of all but biases and norms.
        options: of ``optimizer_cls``.

    Raises:
        TypeError: ``optimizer_cls`` is no optimiser, or as :func:`lora_plus_groups`.
        ValueError: as :func:`lora_plus_groups`.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> optimizer = lora_plus(model, lr=1e-4, ratio=16)
    """
    check_optimizer_class(optimizer_cls)
    groups = lora_plus_groups(model, lr, ratio, lr_embedding=lr_embedding, weight_decay=weight_decay)
    return build(optimizer_cls, groups, {**options, "lr": lr})


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether a norm holds it, of each parameter that trains, once."""
    found: dict[int, tuple[str, nn.Parameter, bool]] = {}
    for prefix, module in model.named_modules():
        in_norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                found.setdefault(id(parameter), (name, parameter, in_norm))
    return list(found.values())
