"""The drop-in module for GPT-2's linear, which Transformers calls ``Conv1D``.

Imports Transformers, so that the core imports it where a model that has such a layer did so already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters import LoRAConfig
from .linear import LinearAdapterLayer


class LoRATransposedLinear(LinearAdapterLayer, Conv1D):  # type: ignore[misc]
    """y = x W + b + Σ_i s_i · (drop_i(x) A_iᵀ ⊙ g_i) B_iᵀ over the active adapters i, W ``[in, out]``

    A Transformers ``Conv1D`` (it is one: same ``weight`` and ``bias``), and apart from the layout of W, which
    is read as a transposed view, a :class:`LoRALinear`. Made by :func:`apply_lora` and :meth:`from_conv1d`.
    """

    base_type = Conv1D
    fan_in_fan_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("LoRATransposedLinear: use from_conv1d on a Conv1D of Transformers")

    @classmethod
    def from_conv1d(
        cls,
        conv1d: Conv1D,
        config: LoRAConfig | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> LoRATransposedLinear:
        """A LoRATransposedLinear on the very parameters of ``conv1d``, which become frozen.

        Args:
            conv1d: a ``Conv1D`` of Transformers; its parameters are shared, not copied.
            config: what the adapter is; or its fields as keywords.
            adapter_name: the adapter's name.
            options: fields of :class:`LoRAConfig`, where no config is given.

        Raises:
            TypeError: not a plain ``Conv1D``, or both a config and options were given.
        """
        return cls._wrap(conv1d, config, adapter_name, options)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Rows of W."""
        return self._own_weight.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws W anew, as a ``Conv1D`` does, and then every adapter; b becomes zero."""
        nn.init.normal_(self.base_weight, std=0.02)
        nn.init.zeros_(self.bias)
        for adapter in self.adapters.values():
            self._draw(adapter)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # Conv1D's own leaves the adapters out

    def extra_repr(self) -> str:
        """The sizes, and which adapters act."""
        in_features, out_features = self._own_weight.shape
        return f"in_features={in_features}, out_features={out_features}{super().extra_repr()}"
