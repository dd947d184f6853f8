"""Quantised base weights in place of a model's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import LoRAConfig
from . import owned
from .install import put_in_place
from .linear import LoRALinear
from .mlp import fuse_mlps, fused_mlps
from .quantized import QuantizedLinear, QuantizedLoRALinear
from .sites import LINEARS, Target, find_sites


def quantize_base(
    model: nn.Module,
    format: str = "nf4",
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    **options: Any,
) -> nn.Module:
    """Replaces the base weights of the targeted linears of ``model`` in place by quantised ones.

    An ``nn.Linear`` becomes a :class:`QuantizedLinear`, a :class:`LoRALinear` keeps its adapters as a
    :class:`QuantizedLoRALinear`; what is quantised already stays as it is. Follow with :func:`apply_lora`
    for QLoRA (arXiv 2305.14314). A weight that something else shares stays dense there.

    Args:
        model: any module that contains linears.
        format: ``nf4``, ``int8`` or ``fp8``.
        target_modules: as in :class:`LoRAConfig`; ``all-linear`` leaves the output head out.
        exclude_modules: as in :class:`LoRAConfig`.
        options: of :func:`lora_kernels.quantize`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing matches, or a match cannot be quantised (merged, DoRA). The model is then as it
            was.

    Examples:
        >>> model = quantize_base(nn.Sequential(nn.Linear(64, 64)), "int8")
        >>> type(model[0]).__name__
        'QuantizedLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    sites = find_sites(model, config, LINEARS)
    done = (QuantizedLinear, QuantizedLoRALinear)
    made = [
        (site, _quantized_layer(site, format, options)) for site in sites if not isinstance(site.linear, done)
    ]
    for site, layer in made:
        put_in_place(site, layer)
    if fused_mlps(model):  # of dense layers, some of which are no longer there
        fuse_mlps(model)
    return model


def _quantized_layer(site: Target, format: str, options: dict[str, Any]) -> nn.Module:
    linear = site.linear
    try:
        if owned.CHILD in linear._modules:
            raise ValueError("an adapter owns a version of its weight or bias, which has to stay dense")
        if isinstance(linear, LoRALinear):
            return QuantizedLoRALinear.from_dense(linear, format, **options)
        return QuantizedLinear.from_linear(linear, format, **options)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
