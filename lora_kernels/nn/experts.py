"""Adapters that were trained by themselves become the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters.lowered import low_rank_of
from ..routing import Experts
from .adapted import lora_layers
from .adapter_layer import AdapterLayer


@torch.no_grad()
def fill_experts(model: nn.Module, names: Sequence[str], adapter_name: str) -> nn.Module:
    """A_e = A of adapter e, B_e = (s_e / s) · B of adapter e, in every layer that has the mixture

    Adapters of a lower rank are filled up with zeros; where one has no part in a layer, its expert adds
    nothing there. They stay as they are; delete them once they are not needed.

    Args:
        model: one with the adapters, and with a mixture of as many experts (:mod:`lora_kernels.routing`).
        names: the adapters, expert by expert.
        adapter_name: the mixture's name.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no such mixture or adapter, another number of experts, an adapter that is more than A, B
            and s, or of a higher rank than the experts. The model is then as it was.

    Examples:
        >>> model, config = nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear")
        >>> mixture = LoRAConfig(2, 2, "all-linear", method="mixlora", method_options={"experts": 2})
        >>> for name, one in {"a": config, "b": config, "both": mixture}.items():
        ...     model = apply_lora(model, one, name)
        >>> model = fill_experts(model, ["a", "b"], "both")
    """
    layers = {at: one for at, one in lora_layers(model).items() if adapter_name in one.adapters}
    known = {name for layer in layers.values() for name in layer.adapters}
    for name in (adapter_name, *names):
        if name not in known:
            raise ValueError(f"names: expected some of {', '.join(sorted(known)) or 'none'}, got {name!r}")
    found = [_factors(at, layer, names, adapter_name) for at, layer in layers.items()]
    for layer, (lora_a, lora_b) in zip(layers.values(), found, strict=True):
        layer.adapters[adapter_name].lora_A.copy_(lora_a)
        layer.adapters[adapter_name].lora_B.copy_(lora_b)
        layer.adapters[adapter_name].filled()
    return model


def _factors(at: str, layer: AdapterLayer, names: Sequence[str], adapter_name: str) -> tuple[Tensor, Tensor]:
    """A and B of the mixture on one layer."""
    mixture = layer.adapters[adapter_name]
    if not isinstance(mixture, Experts) or mixture.experts != len(names):
        what = f"a mixture of {mixture.experts}" if isinstance(mixture, Experts) else mixture.method
        raise ValueError(f"adapter_name: expected a mixture of {len(names)} experts at {at!r}, got {what}")
    lora_a, lora_b = mixture.lora_A.clone(), torch.zeros_like(mixture.lora_B)
    for e, name in enumerate(names):
        if name not in layer.adapters:
            continue
        own_a, own_b, scaling = low_rank_of(layer.adapters[name])
        rank, first = len(own_a), e * mixture.r
        if rank > mixture.r:
            raise ValueError(f"names: expected ranks up to {mixture.r} at {at!r}, got {rank} of {name!r}")
        lora_a[first : first + mixture.r] = 0
        lora_a[first : first + rank] = own_a
        lora_b[:, first : first + rank] = own_b * (scaling / mixture.scaling)
    return lora_a, lora_b
