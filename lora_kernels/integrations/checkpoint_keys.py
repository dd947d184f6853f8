"""The keys of ``adapter_model.safetensors``: PEFT's names for what an adapter consists of.

``base_model.model.<layer>.lora_A.weight`` is a factor, ``base_model.model.<module>.<name>`` a tensor of the
model that the adapter owns, with ``.base_layer`` before the name where the module is an adapted layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.expert_lora import ExpertLoRA
from ..adapters.token_rows import TokenRows
from ..init import GIVEN
from ..nn.adapter_layer import AdapterLayer
from ..nn.wrappers import plain_key, plain_names, unwrapped

PREFIX = "base_model.model."
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Value = TypeVar("_Value")


def factor_key(layer_name: str, layer: AdapterLayer, adapter: Adapter, parameter: str) -> str:
    """The key of an adapter's parameter; the factors of an embedding have a name of their own."""
    if adapter.peft_form is not None and parameter in adapter.peft_form.shared:
        return f"base_model.{parameter}"
    if isinstance(adapter, ExpertLoRA):
        depth, name = adapter.place_of(parameter)
        return f"{PREFIX}{layer_name}{'.base_layer' * depth}.{name}.weight"
    if isinstance(adapter, TokenRows):
        return f"{PREFIX}{layer_name}.token_adapter.{parameter}"
    if parameter == "lora_bias":
        return f"{PREFIX}{layer_name}.lora_B.bias"
    if parameter not in ("lora_A", "lora_B"):
        return f"{PREFIX}{layer_name}.{parameter}"
    if isinstance(layer, nn.Embedding):
        return f"{PREFIX}{layer_name}.lora_embedding_{parameter[-1]}"
    return f"{PREFIX}{layer_name}.{parameter}.weight"


def factor_shape(layer: AdapterLayer, parameter: str, shape: torch.Size) -> torch.Size:
    """The shape in the file, where the factors of a convolution are convolutions."""
    if not isinstance(layer, _CONVS):
        return shape
    ones = [1] * (layer.weight.dim() - 2)
    factors = {"lora_A": [shape[0], *layer.weight.shape[1:]], "lora_B": [*shape, *ones]}
    shapes = {
        **factors,
        **dict(zip(GIVEN, factors.values(), strict=True)),
        "lora_magnitude_vector": [1, *shape, *ones],
    }
    return torch.Size(shapes.get(parameter, shape))


def owned_key(module_name: str, name: str, adapted: bool) -> str:
    """The key of a tensor that the adapter owns."""
    return PREFIX + ".".join(filter(None, (module_name, "base_layer" if adapted else "", name)))


def model_name(key: str) -> tuple[str, str]:
    """The module and the name in it of the model's tensor that a key stands for."""
    module, _, name = key.removeprefix(PREFIX).rpartition(".")
    return module.removesuffix("base_layer").removesuffix("."), name


def renamed(
    tensors: dict[str, _Value], model: nn.Module, mapping: Mapping[str, str] | None, source: Any
) -> dict[str, _Value]:
    """The file's tensors under the names that ``model`` has for them.

    What wrappers put into a name is left out, and of ``mapping`` the first expression that is found in a name
    is replaced; by default the mapping is the one that Transformers gives a model whose names have changed.

    Raises:
        TypeError: ``mapping`` is none.
        ValueError: a key is not of PEFT's layout, an expression is none, or two keys become one.
    """
    rules = mapping_rules(mapping, model)
    keys = {key: plain_key(key.removeprefix("module.")) for key in tensors}
    foreign = sorted(key for key, plain in keys.items() if not plain.startswith(PREFIX))
    if foreign and len(foreign) == len(keys):
        raise ValueError(
            f"{source}: expected PEFT's layout, keys that start with {PREFIX!r}, got {foreign[0]!r}: another"
            " program's, which has to be converted first"
        )
    names = {key: plain.removeprefix(PREFIX) for key, plain in keys.items()}
    if "module" not in plain_names(model).values() and all(n.startswith("module.") for n in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    found = {}
    for key, tensor in tensors.items():
        name = key if key in foreign else PREFIX + mapped_name(names[key], rules)
        if name in found:
            raise ValueError(f"{source}: expected each tensor once, got two of {name!r}")
        found[name] = tensor
    return found


def mapping_rules(mapping: Mapping[str, str] | None, model: nn.Module) -> dict[re.Pattern[str], str]:
    """A key mapping, or the one that the model brings, ready to be used."""
    if mapping is None:
        mapping = getattr(unwrapped(model), "_checkpoint_conversion_mapping", None) or {}
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"key_mapping: expected a mapping of expressions to names, got {type(mapping).__name__}"
        )
    try:
        return {re.compile(expression): name for expression, name in mapping.items()}
    except (re.error, TypeError) as error:
        raise ValueError(
            f"key_mapping: expected regular expressions, got {list(mapping)} ({error})"
        ) from None


def mapped_name(name: str, rules: dict[re.Pattern[str], str]) -> str:
    """A name with the first expression that is found in it replaced."""
    for expression, replacement in rules.items():
        changed, count = expression.subn(replacement, name)
        if count:
            return changed
    return name
