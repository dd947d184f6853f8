"""What every adapter method is: parameters that lower to the factors of one primitive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..ops.dora_linear import output_scale

if TYPE_CHECKING:
    from .config import LoRAConfig


class Factors(NamedTuple):
    """s · (B ⊙ g) A, as :func:`lora_kernels.lora_linear` takes it.

    With a magnitude m the adapted weight is m ⊙ (W + s B A) / ‖W + s B A‖ by row, as
    :func:`lora_kernels.dora_linear` takes it; there is no gate beside it.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    gate: Tensor | None = None
    magnitude: Tensor | None = None

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """s · (B ⊙ g) A, ``[out, in]``, computed in ``dtype`` (by default theirs)."""
        lora_b = self.lora_b.to(dtype)
        lora_b = lora_b if self.gate is None else lora_b * self.gate.to(dtype)
        return self.scaling * (lora_b @ self.lora_a.to(dtype))


class Adapter(nn.Module):
    """ΔW = s · (B ⊙ g) A, where A, B, s and g come from :meth:`lower`.

    A method subclasses this, overrides what differs and carries :func:`register`. The defaults are
    those of LoRA: A ``[r, in]`` and B ``[out, r]`` as parameters.

    Args:
        in_features: columns of the base weight.
        out_features: rows of the base weight.
        config: rank, alpha, dropout, initialisation and the method's own options.
        weight: the base weight ``[out, in]``, for methods that start from it.
        device: of the parameters.
        dtype: of the parameters.
    """

    # Names of parameters that the method never trains.
    frozen: ClassVar[frozenset[str]] = frozenset()
    # Keys that `config.method_options` may hold.
    options: ClassVar[frozenset[str]] = frozenset()
    # Whether ΔW is exactly zero after initialisation.
    zero_start: ClassVar[bool] = True
    method: ClassVar[str]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LoRAConfig,
        *,
        weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha, self.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
        self.use_rslora, self.init_lora_weights = config.use_rslora, config.init_lora_weights
        self.scaling = self.scaling_at(self.r)
        self.build(config, device=device, dtype=dtype)
        self.reset_parameters(weight)
        self.set_trainable(True)

    def build(self, config: LoRAConfig, **where: Any) -> None:
        """Creates the parameters, uninitialised; ``where`` has their device and dtype."""
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **where))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Fills the parameters: random A and zero B, or both random for ``init_lora_weights=False``."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def lower(self) -> Factors:
        """The factors of this step, differentiable in the method's parameters."""
        return Factors(self.lora_A, self.lora_B, self.scaling)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW = s · (B ⊙ g) A, ``[out, in]``, computed in ``dtype`` (by default the parameters')."""
        return self.lower().delta(dtype)

    def merged(self, weight: Tensor, base: Tensor) -> Tensor:
        """W + ΔW in the dtype of ``weight``, or what else the method makes of the two.

        Args:
            weight: W, or what the active adapters before this one made of it.
            base: W itself, whose norms DoRA takes.
        """
        factors = self.lower()
        total = weight + factors.delta(weight.dtype)
        lora_a, lora_b, scaling, _, magnitude = factors
        if magnitude is None:
            return total
        return output_scale(base, lora_a, lora_b, magnitude, scaling).to(total.dtype)[:, None] * total

    def scaling_at(self, rank: int) -> float:
        """s: alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def set_trainable(self, flag: bool) -> None:
        """Switches the gradients of the parameters that the method trains."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(flag and name not in self.frozen)

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


METHODS: dict[str, type[Adapter]] = {}
_Method = TypeVar("_Method", bound=type[Adapter])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: makes an :class:`Adapter` known as ``LoRAConfig(method=name)``."""

    def add(cls: _Method) -> _Method:
        cls.method = name
        METHODS[name] = cls
        return cls

    return add


def method(name: str) -> type[Adapter]:
    """The class registered as ``name``.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))}, got {name!r}")
    return METHODS[name]


def make(
    in_features: int,
    out_features: int,
    config: LoRAConfig,
    *,
    weight: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """An adapter of ``config.method`` for a base weight ``[out_features, in_features]``."""
    cls = method(config.method)
    return cls(in_features, out_features, config, weight=weight, device=device, dtype=dtype)
