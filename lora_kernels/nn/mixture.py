"""A linear with a mixture of LoRA experts and its router, by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters import LoRAConfig
from ..routing import MixLoRA
from .linear import LoRALinear

_OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora")


class LoRAMixtureLinear(LoRALinear):
    """y = x Wᵀ + b + s · Σ_j w_j (drop(x) A_jᵀ) B_jᵀ, w = softmax(x Rᵀ), j over the ``top_k`` largest w

    for each row of x by itself: a :class:`LoRALinear` of the method ``mixlora``
    (:class:`lora_kernels.routing.MixLoRA`), which ``apply_lora`` puts on whole models. The losses of
    :mod:`lora_kernels.routing` take the call of the :func:`side_inputs` in which the layer ran.

    x is ``[..., in_features]`` of W's dtype.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        num_experts: E.
        top_k: how many experts a row uses; ``None`` for all.
        r: rank of each expert.
        lora_alpha: numerator of s.
        lora_dropout: probability in [0, 1) on the experts' input.
        use_rslora: s = alpha/√r in place of alpha/r.
        norm_topk_prob: whether the weights of the chosen are divided by their sum.
        bias: whether there is a b.
        device: of all parameters.
        dtype: of W and b.

    Raises:
        TypeError: an option of the wrong type, or x of another dtype than W outside autocast.
        ValueError: an option out of range, or x's last dimension is not ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 4,
        top_k: int | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        norm_topk_prob: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = _options(num_experts, top_k, norm_topk_prob)
        super().__init__(
            *(in_features, out_features, r, lora_alpha, lora_dropout, use_rslora, bias, "mixlora"),
            device=device,
            dtype=dtype,
            method_options=options,
        )

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        num_experts: int = 4,
        top_k: int | None = None,
        *,
        norm_topk_prob: bool = True,
        **options: Any,
    ) -> LoRAMixtureLinear:
        """A mixture on the very parameters of ``linear``, which become frozen.

        Args:
            linear: an ``nn.Linear``. Its weight and bias are shared, not copied; hooks come along.
            num_experts: E.
            top_k: how many experts a row uses; ``None`` for all.
            norm_topk_prob: whether the weights of the chosen are divided by their sum.
            options: ``r``, ``lora_alpha``, ``lora_dropout`` and ``use_rslora``.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or an option is unknown.
            ValueError: an option is out of range; ``linear`` is then as it was.
        """
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise TypeError(f"options: expected {', '.join(_OPTIONS)}, got {', '.join(unknown)}")
        own = _options(num_experts, top_k, norm_topk_prob)
        config = LoRAConfig(method="mixlora", method_options=own, **options)
        trained = [p for p in linear.parameters() if p.requires_grad]
        try:
            return cls._wrap(linear, config, "default", {})
        except (TypeError, ValueError):
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    @property
    def experts(self) -> MixLoRA:
        """The experts and their router."""
        return self.adapters["default"]  # type: ignore[return-value]

    def reset_experts(self) -> None:
        """Draws every A and the router anew, Kaiming-uniform, and zeroes every B."""
        self._draw(self.experts)


def _options(num_experts: int, top_k: int | None, norm_topk_prob: bool) -> dict[str, Any]:
    return {"experts": num_experts, "top_k": top_k, "norm_topk_prob": norm_topk_prob}
