"""The drop-in module: an ``nn.Linear`` with named adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import LoraInputs
from ..adapters import LoRAConfig, Replaced, apply_update, apply_updates, current_call
from ..ops._inputs import autocasts
from .adapter_layer import AdapterLayer
from .groups import grouped


class LinearAdapterLayer(AdapterLayer):
    """The forward pass of a linear with adapters, whose weight as ``_matrix`` gives it is [out, in]."""

    bias: Any
    in_features: int

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in_features]``."""
        weight = self._matrix(self._own_weight)
        if x.shape[-1] != self.in_features or x.dtype != weight.dtype:
            self._check_input(x)
        if self._single is None:
            return self._forward_general(x)
        y = grouped(self, x)
        if y is not None:
            return y
        # Past the search that a module makes for its parts: at small sizes each of these microseconds shows.
        adapter: Any = self._modules["adapters"]._modules[self._single]  # type: ignore[union-attr]
        p = adapter.lora_dropout if self.training else 0.0
        own = self._parameters
        # Else one that torch.nn.utils.parametrize computes.
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return apply_update(x, weight, bias, adapter.lower(x, current_call()), p)

    def group_member(self, x: Tensor) -> LoraInputs | None:
        """What this layer computes for ``x``, where that is one plain fused linear."""
        if self._single is None or not self._takes(x):
            return None
        adapter = self.adapters[self._single]
        if not adapter.plain:
            return None
        update: Any = adapter.lower(x, current_call())
        lora_a, lora_b, scaling, gate, *_ = update.numbered()
        p = adapter.lora_dropout if self.training else 0.0
        weight = self._matrix(self._own_weight)
        return LoraInputs(x, weight, lora_a, lora_b, self.bias, gate, None, None, scaling, p)

    def _takes(self, x: Tensor) -> bool:
        """Whether x is of a dtype that needs no error."""
        return x.dtype == self._own_weight.dtype or autocasts(x)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            got = f"got shape {tuple(x.shape)}"
            raise ValueError(f"x: expected last dimension {self.in_features} (in_features), {got}")
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {self._own_weight.dtype} (the weight's), got {x.dtype}")

    def _forward_general(self, x: Tensor) -> Tensor:
        """The cases that need more, or less, than one update of one adapter."""
        if not self.enabled:
            return self._base(x, self.bare_weight)
        if self.merged or not self.active:
            return self._base(x, self._own_weight)
        weight, active = self._matrix(self._own_weight), [self.adapters[name] for name in self.active]
        call = current_call()
        updates = [adapter.lower(x, call) for adapter in active]
        if len(updates) > 1 and any(type(one) is Replaced for one in updates):
            return self._base(x, self._adapted())
        ps = [adapter.lora_dropout if self.training else 0.0 for adapter in active]
        return apply_updates(x, weight, self.bias, updates, ps)

    def _base(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, self._matrix(weight), self.bias if self.enabled else self.bare_bias)


class LoRALinear(LinearAdapterLayer, nn.Linear):
    """y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ ⊙ g_i) B_iᵀ over the active adapters i

    and for DoRA :func:`lora_kernels.dora_linear`.

    An ``nn.Linear`` (it is one: same ``weight`` and ``bias``) whose forward is one fused call. Several
    active adapters are one call too, their ranks stacked; only where dropout is on, in training, has each
    its own mask and therefore its own call.

    x is ``[..., in_features]`` of W's dtype. Adapters are float32 on a half-precision base, where they
    are cast in the call and x is not; else of W's dtype.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the first adapter.
        lora_alpha: numerator of its scale.
        lora_dropout: probability in [0, 1) on the branch's input.
        use_rslora: s = alpha/√r in place of alpha/r.
        bias: whether there is a b.
        method: a name in ``lora_kernels.adapters.METHODS``.
        adapter_name: name of the first adapter.
        device: of all parameters.
        dtype: of W and b.
        options: further fields of :class:`LoRAConfig`.

    Raises:
        TypeError: an option of the wrong type, or x of another dtype than W outside autocast.
        ValueError: an option out of range, or x's last dimension is not ``in_features``.

    Examples:
        >>> layer = LoRALinear(64, 128, r=8, lora_alpha=16, lora_dropout=0.1)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 128])
    """

    base_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        method: str = "lora",
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        options.update(lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
        config = LoRAConfig(r, method=method, **options)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start()
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: LoRAConfig | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> LoRALinear:
        """A LoRALinear on the very parameters of ``linear``, which become frozen.

        Args:
            linear: an ``nn.Linear``, or a :class:`QuantizedLinear`, of which comes a
                :class:`QuantizedLoRALinear`. Its weight and bias are shared, not copied; hooks come along.
            config: what the adapter is; or its fields as keywords.
            adapter_name: the adapter's name.
            options: fields of :class:`LoRAConfig`, where no config is given.

        Raises:
            TypeError: ``linear`` is neither of the two, or both a config and options were given.
        """
        return cls._wrap(linear, config, adapter_name, options)

    def to_linear(self, *, merge: bool = False) -> nn.Linear:
        """The ``nn.Linear`` this layer was, or with ``merge`` the one it has become."""
        return self.to_base(merge=merge)  # type: ignore[return-value]
