"""PVeRA (Leboucher et al., 2025, arXiv 2512.07703): VeRA whose h is drawn around a mean while it trains."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.pvera.layer import Linear
from torch import Tensor

from ...adapters.update import Branched, LowRank, apply_update
from ...ops.sampled_rank import SampledRank
from .base import FusedTuner, dropout_now, linear


class FusedPvera(FusedTuner, Linear):  # type: ignore[misc]
    """y = x Wᵀ + b + h (b' ⊙ B)ᵀ with [μ | l] = (drop(x) Aᵀ) ⊙ d, and h = μ + exp(l / 2) ⊙ ε or μ alone."""

    per_adapter = "pvera_lambda_d"
    dropouts = "pvera_dropout"

    def update(self: Any, name: str, x: Tensor) -> LowRank | Branched:
        """VeRA's where h is the mean, whose half of A comes first."""
        lora_a = self.pvera_A[name][:, : self.in_features].to(x.device)
        lora_b = self.pvera_B[name][: self.out_features].to(x.device)
        lora_b, gate = lora_b * self.pvera_lambda_b[name][:, None], self.pvera_lambda_d[name]
        if not (self.training or self.sample_at_inference[name]):
            half = len(gate) // 2
            return LowRank(lora_a[:half], lora_b, 1.0, gate[:half])
        p, noise = dropout_now(self, name), _noise(self, name, x, gate)
        if not p:
            tensors = lora_a, gate, noise.view(-1, noise.shape[-1]), lora_b
            return Branched(SampledRank(self.out_features), tensors)
        eye = torch.eye(len(gate), dtype=gate.dtype, device=gate.device)
        mean, log_variance = apply_update(x, None, None, LowRank(lora_a, eye, 1.0, gate), p).chunk(2, -1)
        return LowRank(None, lora_b, x_lora=mean + torch.exp(0.5 * log_variance) * noise)


def _noise(layer: Any, name: str, x: Tensor, gate: Tensor) -> Tensor:
    """ε as PEFT draws it: by a generator of the CPU, if it has one."""
    shape, generator = (*x.shape[:-1], len(gate) // 2), layer.pvera_generator[name]
    if generator is None:
        return torch.randn_like(gate.new_empty(shape))
    return torch.randn(shape, dtype=gate.dtype, generator=generator).to(gate.device)


TAKEOVERS = {Linear: linear(FusedPvera)}
