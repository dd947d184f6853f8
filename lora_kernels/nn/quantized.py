"""Linears whose base weight is quantised, alone and with adapters (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig
from ..ops.dequantize import dequantize
from ..ops.quantized_linear import quantized_linear
from ..quant import QuantizedWeight, quantize
from .adapter_layer import _HALF
from .layer_weights import OWN
from .linear import LoRALinear

_PARTS = ("codes", "scales", "nested")


class _QuantizedBase(nn.Module):
    """``weight`` out of three buffers, which a move of dtype leaves alone."""

    codes: Tensor
    scales: Tensor
    nested: Tensor | None
    in_features: int
    out_features: int

    def _hold(self, weight: QuantizedWeight) -> None:
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        self._layout = (weight.format, weight.shape, weight.block, weight.dtype)

    @property
    def weight(self) -> QuantizedWeight:
        """W as the functions of this package take it."""
        buffers = self._buffers
        return QuantizedWeight(buffers["codes"], buffers["scales"], buffers["nested"], *self._layout)

    @property
    def _own_weight(self) -> QuantizedWeight:
        return self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = [part for part in map(self._buffers.get, _PARTS) if part is not None]

        def keep_dtype(tensor: Tensor) -> Tensor:
            if not any(tensor is part for part in own):
                return fn(tensor)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)  # integers are not cast

        return super()._apply(keep_dtype, recurse)


def _transplant(cls: Any, source: nn.Module, drop: Iterable[str]) -> Any:
    """A ``cls`` with the bias, hooks and all else of ``source`` but what ``drop`` names."""
    layer = cls.__new__(cls)
    state = dict(vars(source))
    held = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    for name in held:
        state[name] = state[name].copy()
    for name in drop:
        for table in (state, *(state[one] for one in held[:3])):
            table.pop(name, None)
        state[held[3]].discard(name)
    layer.__dict__.update(state)
    return layer


def _quantized(cls: Any, linear: nn.Linear, format: str, options: dict[str, Any]) -> Any:
    """``linear`` as a ``cls``, which holds the codes of its weight."""
    weight = quantize(linear.weight, format, **options)
    layer = _transplant(cls, linear, ("weight",))
    layer._hold(weight)
    return layer


def _dense(layer: nn.Module, weight: Tensor) -> nn.Linear:
    """``layer`` as a plain linear of this weight."""
    linear = _transplant(nn.Linear, layer, (*_PARTS, "_layout", *OWN))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class QuantizedLinear(_QuantizedBase):
    """y = x Wᵀ + b over a quantised, frozen W

    x is ``[..., in_features]`` of any floating dtype, which is y's. ``codes``, ``scales`` and ``nested``
    (see :class:`QuantizedWeight`) are buffers: they move between devices and are saved, and no move of
    dtype changes them.

    Args:
        weight: W, ``[out_features, in_features]``.
        bias: b, or ``None``.

    Raises:
        TypeError: no :class:`QuantizedWeight`.
        ValueError: x's last dimension is not ``in_features``.

    Examples:
        >>> layer = QuantizedLinear(quantize(torch.randn(128, 64), "nf4"))
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 128])
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
        self.out_features, self.in_features = weight.shape
        self._hold(weight)
        parameter = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", parameter)

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str = "nf4", **options: Any) -> QuantizedLinear:
        """``linear`` with its weight quantised; the bias is shared and hooks come along.

        Args:
            linear: an ``nn.Linear``, left as it is.
            format: as of :func:`lora_kernels.quantize`.
            options: of the same.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``.
            ValueError: no such format or option.
        """
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            raise TypeError(f"linear: expected a plain nn.Linear, got {type(linear).__name__}")
        return _quantized(cls, linear, format, options)

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in_features]``."""
        bias: Any = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return quantized_linear(x, self.weight, bias)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` of what the codes stand for, in the dtype that W had."""
        return _dense(self, dequantize(self.weight))

    def extra_repr(self) -> str:
        """The linear's, and the format."""
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {_words(self)}"
        )


def _words(layer: _QuantizedBase) -> str:
    return f"format={layer._layout[0]}" + ("" if layer.nested is None else ", double_quant=True")


class QuantizedLoRALinear(_QuantizedBase, LoRALinear):  # type: ignore[misc]
    """A :class:`LoRALinear` over a quantised W: QLoRA (Dettmers et al., 2023, arXiv 2305.14314)

    Made by ``LoRALinear.from_linear`` of a :class:`QuantizedLinear`, by :func:`apply_lora` and by
    :func:`quantize_base`. x is of any floating dtype. :meth:`merge` is refused: W + ΔW is no sum of codes,
    and quantising it anew would change W for good; ``to_linear(merge=True)`` gives the dense sum.
    """

    base_type = QuantizedLinear  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("QuantizedLoRALinear: use LoRALinear.from_linear on a QuantizedLinear")

    @classmethod
    def from_dense(cls, layer: LoRALinear, format: str = "nf4", **options: Any) -> QuantizedLoRALinear:
        """A layer with the very adapters of ``layer`` on its weight quantised.

        Args:
            layer: a :class:`LoRALinear`, left as it is.
            format: as of :func:`lora_kernels.quantize`.
            options: of the same.

        Raises:
            TypeError: no plain :class:`LoRALinear`.
            ValueError: it is merged, or it has a DoRA; or no such format or option.
        """
        if type(layer) is not LoRALinear:
            raise TypeError(f"layer: expected a LoRALinear, got {type(layer).__name__}")
        if layer.merged:
            raise ValueError(f"layer: {', '.join(layer.merged)} is merged; call unmerge() first")
        for adapter in layer.adapters.values():
            _refuse(adapter)
        if layer._taker is not None and not layer._taking:
            raise ValueError(
                f"layer: expected {layer._taker!r}, which has taken its start out of W, to be active"
            )
        made = _quantized(cls, layer, format, options)
        made._taker, made._taking, made._buffers["_other_weight"] = None, False, None  # W itself is not kept
        return made

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            got = f"got shape {tuple(x.shape)}"
            raise ValueError(f"x: expected last dimension {self.in_features} (in_features), {got}")

    def _takes(self, x: Tensor) -> bool:
        return x.is_floating_point()

    def _base(self, x: Tensor, weight: Any) -> Tensor:
        return QuantizedLinear.forward(self, x)  # type: ignore[arg-type]

    def make_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """An adapter that fits this layer; methods that start from W see what its codes stand for."""
        weight = self.weight
        dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
        dense = where.pop("weight", None)
        dense = dequantize(weight, dtype) if dense is None else dense
        adapter = self._place(config, dense, dtype, where)
        _refuse(adapter)
        return adapter

    def _sizes(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def add_adapter(self, name: str, config: LoRAConfig | Adapter, *, activate: bool | None = None) -> None:
        """As of :class:`LoRALinear`; what needs a dense W is refused, as DoRA.

        Raises:
            ValueError: the name is taken or no name, or a DoRA.
        """
        if isinstance(config, Adapter):
            _refuse(config)
        super().add_adapter(name, config, activate=activate)

    def reset_parameters(self) -> None:
        """Draws the adapters anew; the codes stay."""
        for adapter in self.adapters.values():
            adapter.reset_parameters(dequantize(self.weight, torch.float32))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + Σ ΔW_i over the active adapters, dense, in the dtype that W had."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight = dequantize(self.weight, wide)
        total = weight.clone()
        for name in self.active:
            total = self.adapters[name].merged(total, weight)
        return total.to(self.weight.dtype)

    def merge(self) -> None:
        """Refused where there is something to merge.

        Raises:
            RuntimeError: an adapter is active.
        """
        if self.active:
            raise RuntimeError(
                "cannot merge into a quantised weight: quantising the sum would change the base for good;"
                " to_linear(merge=True) or remove_lora(model, merge=True) gives dense linears"
            )

    def to_base(self, *, merge: bool = False) -> nn.Module:
        """The :class:`QuantizedLinear` this layer was, or with ``merge`` a dense ``nn.Linear``."""
        if not merge:
            return _transplant(QuantizedLinear, self, OWN)
        linear = _dense(self, self.merged_weight())
        for name, bias in self._base_bias(merge).items():
            linear.register_parameter(name, bias)
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """The LoRA linear's, and the format."""
        return f"{LoRALinear.extra_repr(self)}, {_words(self)}"


def _refuse(adapter: Adapter) -> None:
    if not adapter.over_quantized:
        name = "use_dora: DoRA" if adapter.method == "dora" else f"method: {adapter.method}"
        raise ValueError(f"{name} needs a dense base weight, and this one is quantised")
    if adapter.rest is not None:
        raise ValueError(f"method: {adapter.method} takes its start out of W, and this one is quantised")
