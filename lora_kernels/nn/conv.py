"""The drop-in modules: ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with named adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Adapter, Dense, LoRAConfig, LowRank, Shifted, Update, apply_update, current_call
from ..ops.dora_linear import output_scale
from .adapter_layer import AdapterLayer, own_weight, refuse_reader

if TYPE_CHECKING:
    _Conv = nn.Conv2d
else:
    _Conv = object


class _LoRAConv(AdapterLayer, _Conv):
    """y = W ∗ x + b + Σ_i s_i · B_i (A_i ∗ drop_i(x)) over the active adapters i

    A convolution (it is one: same ``weight`` and ``bias``). The weight as a matrix is [out, in · kernel];
    A ``[r, in · kernel]`` convolves like W, B ``[out, r]`` maps channels, which is added in one pass. So
    ΔW = s B A, reshaped. A kernel of one element without stride or padding on channels-last memory is a
    linear on rows, and runs as one fused call. DoRA takes the norm of each output channel.

    x is ``[batch, in, *size]`` or ``[in, *size]`` of W's dtype. Adapters are float32 on a half-precision
    base.

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size: as in torch.
        r: rank of the first adapter.
        lora_alpha: numerator of its scale.
        lora_dropout: probability in [0, 1) on the branch's input.
        method: a name in ``lora_kernels.adapters.METHODS``.
        adapter_name: name of the first adapter.
        stride: as in torch; and so are padding, dilation, bias, padding_mode, device and dtype.
        padding: as in torch.
        dilation: as in torch.
        bias: whether there is a b.
        padding_mode: as in torch.
        device: of all parameters.
        dtype: of W and b.
        options: further fields of :class:`LoRAConfig`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        method: str = "lora",
        adapter_name: str = "default",
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        config = LoRAConfig(r, lora_alpha, lora_dropout=lora_dropout, method=method, **options)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        layout: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        super().__init__(
            in_channels, out_channels, kernel_size, bias=bias, padding_mode=padding_mode, **layout, **where
        )
        self._start()
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        config: LoRAConfig | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> _LoRAConv:
        """The same on the very parameters of ``conv``, which become frozen.

        Args:
            conv: a convolution of this class's dimension, without groups.
            config: what the adapter is; or its fields as keywords.
            adapter_name: the adapter's name.
            options: fields of :class:`LoRAConfig`, where no config is given.

        Raises:
            TypeError: another type of module, or both a config and options were given.
            ValueError: ``conv`` has groups.
        """
        return cls._wrap(conv, config, adapter_name, options)

    def make_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """An adapter that fits this layer; :meth:`add_adapter` adds it."""
        if self.groups != 1:
            raise ValueError(f"groups: expected 1 for an adapter of a convolution, got {self.groups}")
        refuse_reader(config, "a convolution")
        return super().make_adapter(config, **{"kernel": self.kernel_size, **where})

    def forward(self, input: Tensor) -> Tensor:
        """y for x ``[batch, in, *size]`` or ``[in, *size]``."""
        if not self.enabled:
            return self._conv_forward(input, self.bare_weight, self.bare_bias)
        if self.merged or not self.active:
            return self._conv_forward(input, self._own_weight, self.bias)
        active = [self.adapters[name] for name in self.active]
        ps = [adapter.lora_dropout if self.training else 0.0 for adapter in active]
        updates = [adapter.lower(None, current_call()) for adapter in active]
        return convolve(self, input, list(zip(updates, ps, strict=True)))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._own_weight.shape)


def convolve(conv: Any, x: Tensor, adapters: list[tuple[Update, float]]) -> Tensor:
    """y of ``conv`` with adapters of its weight as a matrix, and the dropout of each one's input."""
    if x.dim() == own_weight(conv).dim() - 1:
        return convolve(conv, x[None], adapters)[0]
    if len(adapters) == 1 and _is_linear(conv, x):
        return _as_linear(conv, x, *adapters[0])
    scaled = any(type(update) is LowRank and update.magnitude is not None for update, _ in adapters)
    weight: Tensor = own_weight(conv)
    if not scaled:  # what is dense and drops nothing is one convolution with W
        for update, p in adapters:
            if type(update) is Dense and not p:
                weight = weight + update.delta.to(weight.dtype).view_as(weight)
        adapters = [(update, p) for update, p in adapters if p or type(update) is not Dense]
    y = conv._conv_forward(x, weight, None if scaled else conv.bias)
    for update, p in adapters:
        y = _adapted(conv, y, x, update, p)
    return y + _by_channel(conv, conv.bias) if scaled and conv.bias is not None else y


def _adapted(conv: Any, y: Tensor, x: Tensor, update: Any, p: float) -> Tensor:
    """y with what one adapter adds to it or makes of it; with DoRA y is without the bias."""
    if type(update) is Shifted:
        return _adapted(conv, y, x, update.update, p) + _by_channel(conv, update.shift.to(y.dtype))
    d = F.dropout(x, p) if p else x
    if type(update) is Dense:
        return y + conv._conv_forward(d, update.delta.to(y.dtype).view_as(own_weight(conv)), None)
    lora_a, lora_b, scaling, gate, _, magnitude = update.numbered()
    down = lora_a.to(own_weight(conv).dtype).view(-1, *own_weight(conv).shape[1:])
    up = (lora_b if gate is None else lora_b * gate).to(own_weight(conv).dtype)
    h = conv._conv_forward(d, down, None).flatten(2)
    up = up.expand(len(h), -1, -1)
    if magnitude is None:
        return torch.baddbmm(y.flatten(2), up, h, alpha=scaling).view_as(y)
    scale = output_scale(own_weight(conv).flatten(1), lora_a, lora_b, magnitude, scaling)
    low = conv._conv_forward(d, own_weight(conv), None) if p else y
    changed = torch.baddbmm(low.flatten(2), up, h, alpha=scaling).view_as(y)
    changed = _by_channel(conv, scale.to(y.dtype)) * changed
    return y + (changed - low) if p else changed


def _by_channel(conv: Any, vector: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (own_weight(conv).dim() - 2))


def _is_linear(conv: Any, x: Tensor) -> bool:
    """Whether this is a linear on rows of x, which lie in memory one after the other."""
    dims = own_weight(conv).dim() - 2
    plain = conv.kernel_size == conv.stride == (1,) * dims and conv.padding == (0,) * dims
    return plain and x.movedim(1, -1).is_contiguous()


def _as_linear(conv: Any, x: Tensor, update: Update, p: float) -> Tensor:
    rows, weight = x.movedim(1, -1), own_weight(conv).flatten(1)
    return apply_update(rows, weight, conv.bias, update, p).movedim(-1, 1)


class LoRAConv1d(_LoRAConv, nn.Conv1d):  # type: ignore[misc]
    __doc__ = _LoRAConv.__doc__
    base_type = nn.Conv1d


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    __doc__ = _LoRAConv.__doc__
    base_type = nn.Conv2d


class LoRAConv3d(_LoRAConv, nn.Conv3d):  # type: ignore[misc]
    __doc__ = _LoRAConv.__doc__
    base_type = nn.Conv3d
