"""How large the inputs of neighbouring layers are, by which ResLoRA merges."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import each
from ..adapters.low_rank.reslora import ResLoRA
from ..nn.adapter_layer import AdapterLayer
from ..nn.side_inputs import side_inputs

_Layers = dict[str, tuple[AdapterLayer, ResLoRA]]


@torch.no_grad()
def estimate_reslora_merge(
    model: nn.Module,
    batches: Iterable[Any] = (),
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    """κ_i = f_{l-i} / f_l of every ResLoRA of mode is or ms, f the mean over the batches of a norm

    ‖x‖ for ``merge="input"``, ‖x Aᵀ‖ for ms's ``"scalar"``; is's ``"weight"`` has κ = f_{l-2} / f_{l-1} with
    f = ‖W + s B A‖, which reads no batch. κ is 1 where is has no such layer or a norm is 0, as in the
    authors' program (Shi et al., 2024, arXiv 2402.18039), and 0 for a first layer that does not double.

    Args:
        model: one with adapters of that mode; it runs in evaluation mode and ends up as it was.
        batches: of the training data; the paper's window is 100.
        forward: how to run the model on a batch, ``model(batch)`` by default.

    Raises:
        ValueError: no such adapter, or a layer that never ran and whose input is asked for.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> config = LoRAConfig(2, 2, "all-linear", method="reslora", method_options={"mode": "is"})
        >>> estimate_reslora_merge(apply_lora(model, config), [torch.randn(3, 4)])
    """
    layers: _Layers = {
        adapter.key: (layer, adapter)
        for layer in model.modules()
        if isinstance(layer, AdapterLayer)
        for adapter in layer.adapters.values()
        if isinstance(adapter, ResLoRA) and adapter.mode != "bs"
    }
    if not layers:
        raise ValueError("model: expected ResLoRA adapters of mode 'is' or 'ms', got none")
    norms = _input_norms(model, layers, batches, forward or (lambda model, batch: model(batch)))
    for _, adapter in layers.values():
        kappa = _kappa(adapter, layers, norms)
        adapter.kappa.copy_(torch.tensor(kappa, dtype=adapter.kappa.dtype))


def _input_norms(
    model: nn.Module, layers: _Layers, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object]
) -> dict[str, float]:
    """f of each layer."""
    norms = {key: _weight_norm(*one) for key, one in layers.items() if one[1].merge_by == "weight"}
    seen: dict[str, list[float]] = {key: [] for key in layers if key not in norms}
    before = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for key in seen:
            layer, adapter = layers[key]
            handle = layer.register_forward_pre_hook(partial(_note, seen[key], adapter))
            stack.callback(handle.remove)
        stack.callback(lambda: [module.train(mode) for module, mode in before.items()])
        model.eval()
        for batch in each("input norms", batches) if seen else ():
            with side_inputs(model):
                forward(model, batch)
    silent = [key.partition("#")[0] for key, values in seen.items() if not values]
    if silent:
        raise ValueError(f"batches: expected some that reach every layer, got none at {', '.join(silent)}")
    return norms | {key: sum(values) / len(values) for key, values in seen.items()}


def _note(values: list[float], adapter: ResLoRA, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    by_rank = adapter.merge_by == "scalar"
    values.append(float((x @ adapter.lora_A.T.to(x.dtype) if by_rank else x).norm()))


def _weight_norm(layer: AdapterLayer, adapter: ResLoRA) -> float:
    delta = adapter.scaling * adapter.lora_B @ adapter.lora_A
    return float((layer._matrix(layer.base_weight) + delta.to(layer.base_weight.dtype)).norm())


def _kappa(adapter: ResLoRA, layers: _Layers, norms: dict[str, float]) -> list[float]:
    if adapter.mode == "ms":
        return [_ratio(norms[key], norms[adapter.key]) for key in adapter.before] or [0.0]
    if not adapter.before:
        return [1.0 if adapter.doubles else 0.0]
    if adapter.merge_by == "input":
        return [_ratio(norms[adapter.before[0]], norms[adapter.key])]
    earlier = layers[adapter.before[0]][1].before
    return [_ratio(norms[earlier[0]], norms[adapter.before[0]]) if earlier else 1.0]


def _ratio(over: float, under: float) -> float:
    return over / under if over and under else 1.0
