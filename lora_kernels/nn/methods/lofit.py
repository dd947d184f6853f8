"""LoFiT's choice of heads."""

from __future__ import annotations

import torch
from torch import nn

from ...adapters.layer_kinds.lofit import LoFiT
from ..adapted import lora_layers


@torch.no_grad()
def lofit_heads(model: nn.Module, count: int, adapter_name: str = "default") -> dict[str, list[int]]:
    """The ``count`` heads of largest ‖a_h‖₂ over all layers, by layer: ``chosen`` of the second stage

    LoFiT (Yin et al., 2024, arXiv 2406.01563).

    Args:
        model: one whose ``lofit`` adapters have been through the stage "scale".
        count: how many heads, 1 to all there are.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapters, or fewer heads.

    Examples:
        >>> options = {"stage": "scale", "heads": 2}
        >>> config = LoRAConfig(method="lofit", method_options=options, target_modules="all-linear")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> chosen = lofit_heads(model, 1)
    """
    norms: list[tuple[float, str, int]] = []
    for layer in lora_layers(model).values():
        adapter = dict(layer.adapters.items()).get(adapter_name)
        if isinstance(adapter, LoFiT) and "scale" in adapter._parameters:
            each = adapter.scale.view(adapter.heads, -1).norm(dim=1).tolist()
            norms += [(norm, adapter.site, head) for head, norm in enumerate(each)]
    if not norms:
        raise ValueError(f"model: expected lofit adapters {adapter_name!r} of the stage 'scale', got none")
    if not 1 <= count <= len(norms):
        raise ValueError(f"count: expected 1 to {len(norms)} heads, got {count}")
    found: dict[str, list[int]] = {}
    for _, site, head in sorted(norms, key=lambda one: -one[0])[:count]:
        found.setdefault(site, []).append(head)
    return {site: sorted(heads) for site, heads in found.items()}
