"""What trains LORPMAN: preferences that are drawn, and a penalty that keeps the tasks' updates apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import lora_layers


def draw_preference(
    tasks: int, concentration: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """p ~ Dirichlet(c, …, c) ``[tasks]``; 1, the default, is uniform on the simplex

    Raises:
        ValueError: fewer than one task, or a concentration that is not above 0.

    Examples:
        >>> draw_preference(3).sum().round(decimals=4)
        tensor(1.)
    """
    if tasks < 1 or not concentration > 0:
        raise ValueError(
            f"tasks, concentration: expected at least 1 and a number above 0, got {tasks}, {concentration}"
        )
    shape = torch.full((tasks,), float(concentration), dtype=torch.float64)
    drawn = torch._standard_gamma(shape, generator=generator)
    return (drawn / drawn.sum()).float()


def orthogonal_penalty(model: nn.Module, adapter_name: str = "default", eps: float = 1e-12) -> Tensor:
    """R = Σ_layers Σ_{i<j} ⟨ΔW_i, ΔW_j⟩² / (‖ΔW_i‖² ‖ΔW_j‖² + ε)

    Of LORPMAN (2024, arXiv 2407.20734), whose exact form was not at hand. Inner products come from r × r
    Grams: ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀB_j) ⊙ (A_i A_jᵀ). Differentiable.

    Raises:
        ValueError: no layer has an adapter of that name and of ``method="lorpman"``.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> model = apply_lora(model, LoRAConfig(r=2, method="lorpman", target_modules="all-linear"))
        >>> orthogonal_penalty(model).backward()
    """
    found = [
        layer.adapters[adapter_name]
        for layer in lora_layers(model).values()
        if adapter_name in layer.adapters
    ]
    found = [one for one in found if one.method == "lorpman"]
    if not found:
        raise ValueError(f"adapter_name: expected one of method='lorpman', got {adapter_name!r}")
    return torch.stack([_of_layer(one.lora_A, one.lora_B, one.tasks, eps) for one in found]).sum()


def _of_layer(lora_a: Tensor, lora_b: Tensor, tasks: int, eps: float) -> Tensor:
    grams = (lora_b.T @ lora_b) * (lora_a @ lora_a.T)
    r = len(lora_a) // tasks
    inner = grams.view(tasks, r, tasks, r).sum((1, 3))
    norms = inner.diagonal()
    share = inner.square() / (norms[:, None] * norms + eps)
    return share.triu(1).sum()
