"""What a model with adapters has: its layers, configs, state and counts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..adapters import LoRAConfig
from . import owned
from .adapter_layer import AdapterLayer
from .groups import layer_groups
from .mlp import fused_mlps
from .wrappers import plain_key, unwrapped

CONFIGS = "_lora_configs"


def lora_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The config of each adapter that :func:`apply_lora` put on ``model``, by name.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> lora_configs(model)["default"].r
        2
    """
    return dict(vars(unwrapped(model)).get(CONFIGS, {}))


def lora_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Dotted name -> layer, each layer once.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> list(lora_layers(model))
        ['0']
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}


def is_combined(model: nn.Module) -> bool:
    """Whether anything of the model is computed together."""
    return bool(layer_groups(model) or fused_mlps(model))


def check_adapters(layers: dict[str, AdapterLayer], names: Iterable[str]) -> None:
    known = dict.fromkeys(name for layer in layers.values() for name in layer.adapters)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter: expected one of {', '.join(known) or 'none'}, got {name!r}")


def adapter_keys(model: nn.Module) -> tuple[str, ...]:
    """What the plain keys of adapters in the state dict of ``model`` start with, by name of each layer."""
    modules = model.named_modules(remove_duplicate=False)
    layers = [name for name, module in modules if isinstance(module, AdapterLayer)]
    return tuple(f"{plain_key(name)}.adapters." if name else "adapters." for name in layers)


def lora_state_dict(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that fine-tuning made, under the same keys.

    Adapter parameters are ``<layer>.adapters.<adapter name>.<parameter>``; with them come the biases and the
    ``modules_to_save`` that the adapter owns: under the model's own names where they act, and else under
    ``<module>.lora_owned.<adapter name>``. ``model.load_state_dict(…, strict=False)`` takes it back where the
    same adapters are active.

    Args:
        model: a model with :class:`LoRALinear` layers.
        adapter_name: one adapter; by default all of them.

    Raises:
        ValueError: no layer has that adapter.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> list(lora_state_dict(model))
        ['0.adapters.default.lora_A', '0.adapters.default.lora_B']
    """
    if adapter_name is not None:
        check_adapters(lora_layers(model), (adapter_name,))
    names = lora_configs(model) if adapter_name is None else (adapter_name,)
    # FSDP1's state dict leaves its wrappers out of the names.
    own = {plain_key(key) for name in names for key in owned.state_keys(model, name).values()}
    prefixes = adapter_keys(model)
    inside = prefixes if adapter_name is None else tuple(f"{prefix}{adapter_name}." for prefix in prefixes)

    def wanted(key: str) -> bool:
        return plain_key(key).startswith(inside) or plain_key(key) in own

    return {key: value for key, value in model.state_dict().items() if wanted(key)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> count_parameters(model)
        (16, 36)
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints both counts of :func:`count_parameters` and their ratio.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> print_trainable_parameters(model)
        trainable parameters: 16 of 36 (44.4444%)
    """
    trainable, total = count_parameters(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable parameters: {trainable:,} of {total:,} ({share:.4f}%)")
