"""Several adapters trained at once on one base: every sample of a batch has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig
from ..ops.batch_plan import BatchPlan, plan_batch
from ..ops.multi_lora_linear import multi_lora_linear, stack_adapters
from . import owned
from .apply import apply_lora, lora_layers, set_adapter
from .linear import LoRALinear

BASE = "__base__"
_CHECKPOINT = "_gradient_checkpointing_func"  # where the modules of Transformers keep theirs
_Change = tuple[nn.Module, str, Any]  # (module, attribute, value)


def train_adapters(model: nn.Module, configs: Mapping[str, LoRAConfig]) -> dict[str, list[nn.Parameter]]:
    """Puts one adapter for each config on ``model`` and trains all of them; see :func:`mixed_adapters`.

    Args:
        model: any module; the linears that the configs target become :class:`LoRALinear`.
        configs: adapter name -> what it is. Rank, scale, dropout and targets may differ.

    Returns:
        Adapter name -> its parameters, for an optimiser of its own.

    Raises:
        ValueError: no config, or as :func:`apply_lora`; the adapters before the one that failed stay.
    """
    if not configs:
        raise ValueError("configs: expected at least one adapter, got none")
    for name, config in configs.items():
        apply_lora(model, config, name)
    set_adapter(model, list(configs))
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in configs}
    for layer in lora_layers(model).values():
        for name in configs:
            if name in layer.adapters:
                parameters[name] += [p for p in layer.adapters[name].parameters() if p.requires_grad]
    return parameters


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside the ``with`` block, sample i of every batch uses ``adapter_names[i]``, and no other adapter.

    For training: the gradient of each adapter is what its samples give, as if it were alone; one that no
    sample uses gets zeros. The backward pass may come after the block, also where a Transformers model
    checkpoints its activations; where you call :func:`torch.utils.checkpoint.checkpoint` yourself, it belongs
    into the block, since it computes the layers again. Each adapter has its own dropout, rank and scale. One
    batch at a time: the block changes the layers for every thread.

    Args:
        model: one whose adapters :func:`apply_lora` or :func:`train_adapters` put there.
        adapter_names: one a sample, ``"__base__"`` for none; samples are the inputs' first dimension.

    Raises:
        ValueError: no layer has an adapter of that name; a layer that is no linear, or a method that scales
            its output (DoRA), is asked for; or a batch has another number of samples.
        RuntimeError: a layer is merged.
    """
    names = list(adapter_names)
    layers = lora_layers(model)
    known = {name for layer in layers.values() for name in layer.adapters}
    for name in names:
        if name != BASE and name not in known:
            raise ValueError(f"adapter_names: expected {', '.join(sorted(known))} or {BASE}, got {name!r}")
    for name in sorted(owned.acting(model)):
        raise ValueError(f"adapter_names: {name!r} owns parameters of the model, which act for a whole batch")
    for place, layer in layers.items():
        layer._must_be_unmerged("mix adapters")
        if not isinstance(layer, LoRALinear) or not layer.plain_forward:
            raise ValueError(
                f"model: {place}: expected a LoRALinear, got {layer.base_type.__name__} with adapters"
            )
    plans: dict[tuple[object, ...], BatchPlan] = {}
    changes: list[_Change] = [
        (layer, "forward", partial(_forward, layer, names, plans)) for layer in layers.values()
    ]
    changes += [(layer, "_mixed", place) for place, layer in layers.items()]
    checkpoints: list[_Change] = [
        (module, _CHECKPOINT, partial(_checkpointed, changes, vars(module)[_CHECKPOINT]))
        for module in model.modules()
        if _CHECKPOINT in vars(module)
    ]
    with _changed(changes), _changed(checkpoints):
        yield


@contextlib.contextmanager
def _changed(changes: list[_Change]) -> Iterator[None]:
    """Inside the ``with`` block the modules have these attributes of their own."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            module.__dict__[name] = value
        yield
    finally:
        for module, name, former in before:
            if former is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = former


def _checkpointed(
    changes: list[_Change], checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """``checkpoint(function, …)`` whose second run, in the backward pass, has the batch of the first."""
    return checkpoint(partial(_run_changed, changes, function), *args, **kwargs)


def _run_changed(changes: list[_Change], function: Callable, *args: Any, **kwargs: Any) -> Any:
    with _changed(changes):
        return function(*args, **kwargs)


def _forward(layer: Any, names: list[str], plans: dict[tuple[object, ...], BatchPlan], x: Tensor) -> Tensor:
    """The layer on a batch whose samples use ``names``; layers alike in adapters and rows share a plan."""
    if x.shape[0] != len(names):
        raise ValueError(f"adapter_names: expected one for each of {x.shape[0]} samples, got {len(names)}")
    present = [name for name in dict.fromkeys([*names, *layer.adapters]) if name in layer.adapters]
    place = {name: i for i, name in enumerate(present)}
    ids = torch.tensor([place.get(name, -1) for name in names], device=x.device)
    rows = x.numel() // max(1, x.shape[-1])
    key = (rows, x.device, *present)
    if key not in plans:
        plans[key] = plan_batch(ids.repeat_interleave(rows // max(1, len(names))), len(present))
    lora_as, lora_bs, scalings = zip(*(_factors(layer.adapters[name]) for name in present), strict=True)
    stack = stack_adapters(lora_as, lora_bs, scalings)
    ps = [layer.adapters[name].lora_dropout for name in present]
    options: dict[str, Any] = {"dropout_ps": ps if any(ps) else None, "training": layer.training}
    weight = layer._own_weight
    if isinstance(weight, Tensor):
        return multi_lora_linear(x, weight, stack, ids, bias=layer.bias, plan=plans[key], **options)
    return layer._base(x, weight) + multi_lora_linear(x, None, stack, ids, plan=plans[key], **options)


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """A, B and s of an adapter, its gate taken into B."""
    if not adapter.plain:
        raise ValueError(f"adapter_names: {adapter.method} is more than A, B and s and cannot be mixed")
    update: Any = adapter.lower()
    lora_a, lora_b, scaling, gate, *_ = update
    return lora_a, lora_b if gate is None else lora_b * gate, scaling
