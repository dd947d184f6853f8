"""The loss that keeps the load of the experts even."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Call
from .base import Seen, seen


def balance_loss(call: Call) -> Tensor:
    """Σ over layers of E · Σ_j f_j P_j, f_j the share of choices that fell on expert j, P_j the mean of its w

    with w = softmax of all scores: 1 a layer where the load is even, and differentiable (Switch Transformer,
    Fedus et al., 2021, arXiv 2101.03961; MixLoRA and SiRA take it). Add a small multiple to the loss. Where
    all experts are in use it is 1.

    Args:
        call: of the :func:`lora_kernels.nn.side_inputs` in which the model ran.

    Raises:
        ValueError: no router ran in the block.

    Examples:
        >>> from lora_kernels.nn import side_inputs
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="mixlora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> with side_inputs(model) as call:
        ...     loss = model(torch.randn(3, 4)).sum() + 0.01 * balance_loss(call)
    """
    return torch.stack([_of_layer(one) for one in seen(call).values()]).sum()


def _of_layer(one: Seen) -> Tensor:
    weights = one.scores.softmax(-1)
    experts = weights.shape[-1]
    mean = weights.reshape(-1, experts).sum(0) / max(1, weights.numel() // experts)
    if one.ids is None:
        return mean.sum()
    chosen = one.ids.reshape(-1, 1) == torch.arange(experts, device=mean.device)
    share = chosen.sum(0).to(mean.dtype) / max(1, len(chosen))
    return experts * (share * mean).sum()
