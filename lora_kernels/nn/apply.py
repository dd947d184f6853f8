"""Adapters on a whole model, in one call."""

from __future__ import annotations

import logging

from torch import nn

from .._messages import warn
from ..adapters import LoRAConfig
from . import owned
from .adapted import lora_configs
from .adapter_layer import _check_name
from .install import install
from .planned import Statistics, check_types, plan_adapter

logger = logging.getLogger(__name__)


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    adapter_name: str = "default",
    *,
    fuse: bool = True,
    statistics: Statistics | None = None,
) -> nn.Module:
    """Replaces the targeted layers of ``model`` in place by ones with adapters and freezes the rest.

    A target is an ``nn.Linear``, ``nn.Embedding`` or ``nn.Conv1d``, ``2d`` or ``3d``; it becomes a
    :class:`LoRALinear`, :class:`LoRAEmbedding`, … on the same parameters; so do a
    :class:`QuantizedLinear`, the ``Conv1D`` of Transformers' GPT-2 and, by ``target_parameters``, its modules
    of experts. A layer that is shared by several
    parents is replaced once, in all of them. A second call with another ``adapter_name`` adds an adapter to
    the layers, inactive until :func:`set_adapter`. Linears that a forward calls on one x (query, key and
    value; gate and up) are computed together; :func:`layer_groups` lists them.

    Args:
        model: any module that contains such layers.
        config: what to adapt and how.
        adapter_name: name of the new adapter.
        fuse: whether linears that share an input, and gated MLPs, are computed together, which
            :func:`group_layers` and :func:`fuse_mlps` also do later. ``False`` leaves the model's classes
            and forwards as they are.
        statistics: of :func:`lora_kernels.calibrate`, for initialisers that start from samples.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: not a module, or not a config.
        ValueError: no layer matches ``target_modules``, a match cannot be adapted, the name is taken, or the
            statistics that the initialiser needs are not there. The model is then as it was.
        RuntimeError: FSDP2 or tensor parallelism has taken over the parameters.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = apply_lora(model, LoRAConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        >>> model(torch.randn(3, 4)).sum().backward()
    """
    check_types(model, config)
    _check_name(adapter_name, lora_configs(model))
    plan = plan_adapter(model, config, statistics=statistics)
    for _, layer, _ in plan.layers:
        _check_name(adapter_name, layer.adapters)
    install(model, config, adapter_name, plan, fuse=fuse)
    logger.info("adapter %s: %s of %d layers", adapter_name, config.method, len(plan.layers))
    for one in config.modules_to_save or ():
        if not any(name.endswith(one) for name in owned.saved_modules(model, config)):
            warn(f"modules_to_save: no module's name ends in {one!r}")
    return model
