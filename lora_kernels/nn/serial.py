"""An adapter in series: what a method adds to the output, or the input, of any module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig, apply_update, current_call, make


class SerialAdapter(nn.Module):
    """y = h + Δ(h), Δ what the method adds to a linear

    The bottleneck adapter of Houlsby et al. (2019, arXiv 1902.00751) for a method with an activation
    (``loretta_adp``): put it behind a sublayer or before it, ``nn.Sequential(linear, SerialAdapter(...))``.
    h and y are ``[..., features]``.

    Args:
        features: the size of h's last dimension.
        config: the method, its rank, scale and dropout.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: h has another last dimension, or as of the method.
    """

    adapter: Adapter

    def __init__(
        self,
        features: int,
        config: LoRAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.adapter = make(features, features, config, device=device, dtype=dtype)

    def forward(self, h: Tensor) -> Tensor:
        """y for h ``[..., features]``."""
        adapter = self.adapter
        if h.shape[-1] != adapter.in_features:
            raise ValueError(f"h: expected last dimension {adapter.in_features}, got shape {tuple(h.shape)}")
        p = adapter.lora_dropout if self.training else 0.0
        return h + apply_update(h, None, None, adapter.lower(h, current_call()), p)
