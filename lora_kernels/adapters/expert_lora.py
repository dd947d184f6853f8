"""LoRA on the stacked matrices of a mixture's experts, in PEFT's layout of ``target_parameters``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Adapter
from .config import LoRAConfig
from .site import Site, Start


class ExpertFactors(NamedTuple):
    """ΔW_e = s · B_e A_e: A ``[E, r, in]``, B ``[E, out, r]``."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    @classmethod
    def of(cls, lora_a: Tensor, lora_b: Tensor, experts: int, scaling: float) -> ExpertFactors:
        """Views of PEFT's A ``[E · r, in]``, one expert after another, and B ``[out, r · E]``, by ranks."""
        a = lora_a.view(experts, -1, lora_a.shape[1])
        b = lora_b.view(lora_b.shape[0], -1, experts).permute(2, 0, 1)
        return cls(a, b, scaling)


def side_by_side(found: Sequence[ExpertFactors]) -> ExpertFactors | None:
    """Σ of several as one of their ranks together; ``None`` of none."""
    if len(found) < 2:
        return found[0] if found else None
    lora_bs = [lora_b * scaling for _, lora_b, scaling in found]
    return ExpertFactors(torch.cat([one.lora_a for one in found], 1), torch.cat(lora_bs, 2), 1.0)


class Stack(NamedTuple):
    """A parameter of the experts' module: its sizes, and the config of this adapter there."""

    experts: int
    out_features: int
    in_features: int
    config: LoRAConfig


class ExpertLoRA(Adapter):
    """ΔW_e = (α/r) · B_e A_e for each expert e and each of the module's parameters that are targeted

    A ``[E · r, in]`` and B ``[out, r · E]`` of each parameter train, in PEFT's layout. No ΔW is made.

    Args:
        site: the experts' module; its config is the adapter's.
        stacks: the parameters by name, in the order of the module.
    """

    method = "lora"
    plain = False
    mergeable = False  # by one ΔW: the layer merges its parameters itself
    beyond_weight = True
    over_quantized = False

    def __init__(self, site: Site, stacks: Mapping[str, Stack]) -> None:
        self.stacks = dict(stacks)
        super().__init__(site)
        self.scalings = {name: _scaling(stack.config) for name, stack in self.stacks.items()}

    def build(self, site: Site) -> Start:
        """A drawn as ``nn.Linear`` draws its weight, or by 1/r, and B at zero; both drawn for ``False``."""
        init, tensors = site.config.init_lora_weights, dict[str, Tensor]()
        for name, (experts, out, width, config) in self.stacks.items():
            rank = experts * config.r
            gaussian = init == "gaussian"
            lora_a = site.normal(rank, width, std=1 / config.r) if gaussian else site.kaiming(rank, width)
            lora_b = site.kaiming(out, rank) if init is False else site.zeros(out, rank)
            tensors |= {f"{name}_lora_A": lora_a, f"{name}_lora_B": lora_b}
        return Start(tensors)

    def factors(self, name: str) -> ExpertFactors:
        """Those of the parameter ``name``."""
        lora_a, lora_b = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")
        return ExpertFactors.of(lora_a, lora_b, self.stacks[name].experts, self.scalings[name])

    def place_of(self, tensor: str) -> tuple[int, str]:
        """Which of PEFT's nested wrappers, 0 the outermost, holds a tensor, and its name there."""
        name, factor = tensor[: -len("_lora_A")], tensor[-len("lora_A") :]
        return len(self.stacks) - 1 - list(self.stacks).index(name), factor


def _scaling(config: LoRAConfig) -> float:
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
