"""Which adapters of a model act, train or are merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from . import owned
from .adapted import adapter_keys, check_adapters, lora_layers
from .wrappers import plain_key


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes ``model`` but for its active adapters, what they own, and the biases asked for.

    Args:
        model: a model with :class:`LoRALinear` layers.
        bias: ``"none"``, ``"all"``, or ``"lora_only"`` for those of the adapted linears: those that act now,
            whoever owns them.

    Raises:
        ValueError: no such ``bias``.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> mark_only_lora_as_trainable(model, bias="lora_only")
        >>> model[0].bias.requires_grad
        True
    """
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias: expected 'none', 'all' or 'lora_only', got {bias!r}")
    for parameter in model.parameters():
        parameter.requires_grad = False  # the method is not for a lazy layer's
    for layer in lora_layers(model).values():
        for name, adapter in layer.adapters.items():
            adapter.set_trainable(name in layer.active)
        own_bias = getattr(layer, "bias", None)
        if bias == "lora_only" and own_bias is not None:
            own_bias.requires_grad_(True)
    inside = adapter_keys(model)
    for name, parameter in model.named_parameters():
        if bias == "all" and name.rpartition(".")[2] == "bias" and not plain_key(name).startswith(inside):
            parameter.requires_grad_(True)
    owned.choose(model, owned.acting(model))


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Makes these adapters the active ones in every layer that has them, and inactive all others.

    What the adapters own beside it, ``modules_to_save`` and trained biases, acts with them.

    Raises:
        ValueError: no layer has an adapter of that name, or several own parameters of one module.
        RuntimeError: a layer is merged, or FSDP2 has taken over parameters that would be switched.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> model = apply_lora(apply_lora(nn.Sequential(nn.Linear(4, 4)), config, "a"), config, "b")
        >>> set_adapter(model, ["a", "b"])
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    layers = lora_layers(model)
    check_adapters(layers, names)
    owned.check_choice(model, names)
    for layer in layers.values():
        layer._must_be_unmerged("choose other adapters")
    for layer in layers.values():
        layer.set_adapter([name for name in names if name in layer.adapters])
    owned.choose(model, names)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block ``model`` computes what its base does.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> with disable_adapters(model):
        ...     base = model(torch.randn(3, 4))
    """
    resume = owned.suspend(model)
    with contextlib.ExitStack() as scope:
        scope.callback(resume)
        for layer in lora_layers(model).values():
            scope.enter_context(layer.disable_adapters())
        yield


def merge_adapters(model: nn.Module) -> None:
    """Merges every layer's active adapters into its weight; see :meth:`LoRALinear.merge`.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> merge_adapters(model)
        >>> model[0].merged
        ('default',)
    """
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Undoes :func:`merge_adapters`, bit for bit.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> merge_adapters(model)
        >>> unmerge_adapters(model)
    """
    for layer in lora_layers(model).values():
        layer.unmerge()
