"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Methods whose class says ``peft`` are written so that PEFT reads them. Others carry a peft_type that PEFT
refuses, since it would load only half of them. A tensor that sites share is written once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._version import __version__
from ..adapters import METHODS, LoRAConfig
from ..nn.apply import apply_lora, lora_configs, lora_layers, lora_state_dict, planned_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN_TYPE = "LORA_KERNELS"
_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
)
# Initialisers that leave the base weight alone: what they drew is in the checkpoint anyway.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
# Options of PEFT that change the function computed; a checkpoint that sets one is refused.
_REFUSED = (
    "lora_bias",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "megatron_config",
)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes one adapter of ``model`` so that ``PeftModel.from_pretrained`` or :func:`load_adapter` reads it.

    Args:
        model: a model that :func:`apply_lora` adapted.
        directory: the folder, made where it is missing. Each file is replaced in one step.
        adapter_name: which adapter.

    Of a model that is split over processes (FSDP2, tensor parallelism) every process must call this; each
    writes the whole.

    Raises:
        ValueError: no such adapter.
    """
    configs = lora_configs(model)
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name: expected one of {', '.join(configs) or 'none'}, got {adapter_name!r}"
        )
    config = configs[adapter_name]
    state, layers = _once(lora_state_dict(model, adapter_name)), lora_layers(model)
    embeddings, shapes = _embeddings(model), _peft_shapes(model, state, adapter_name)
    tensors = {}
    for key, value in state.items():
        name = _to_peft(key, adapter_name, layers, embeddings)
        tensors[name] = _whole(value.detach()).cpu().contiguous().view(shapes[key])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    # PEFT goes by the type of each layer and writes down what it found.
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    text = json.dumps(_config_dict(config, transposed), indent=2, sort_keys=True)
    _replace(folder / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _replace(target: Path, write: Any) -> None:
    """Writes beside ``target`` and renames, so that no reader ever sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _config_dict(config: LoRAConfig, fan_in_fan_out: bool) -> dict[str, Any]:
    plain = METHODS[config.method].peft
    values = {name: getattr(config, name) for name in _FIELDS} | {"fan_in_fan_out": fan_in_fan_out}
    ours = {"version": __version__, "method": config.method, "method_options": config.method_options}
    return {**values, "peft_type": "LORA" if plain else _OWN_TYPE, "lora_kernels": ours}


def _embeddings(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _peft_shapes(
    model: nn.Module, tensors: Mapping[str, Tensor | torch.Size], adapter_name: str
) -> dict[str, torch.Size]:
    """Key -> shape in PEFT, which keeps the factors of a convolution as convolutions."""
    shapes = {}
    for key, given in tensors.items():
        shape = given if isinstance(given, torch.Size) else given.shape
        layer, separator, parameter = key.partition(f".adapters.{adapter_name}.")
        module = model.get_submodule(layer) if separator else None
        if isinstance(module, _CONVS):
            kernel, ones = module.weight.shape[1:], [1] * (module.weight.dim() - 2)
            if parameter == "lora_A":
                shape = torch.Size([shape[0], *kernel])
            elif parameter == "lora_B":
                shape = torch.Size([*shape, *ones])
            elif parameter == "lora_magnitude_vector":
                shape = torch.Size([1, *shape, *ones])
        shapes[key] = shape
    return shapes


def _to_peft(key: str, adapter_name: str, layers: Container[str], embeddings: Container[str]) -> str:
    """``<layer>.adapters.<name>.lora_A`` -> ``base_model.model.<layer>.lora_A.weight``.

    The bias of one of the adapted ``layers`` is its base layer's in PEFT, and the factors of one of the
    ``embeddings`` have a name of their own.
    """
    layer, separator, parameter = key.partition(f".adapters.{adapter_name}.")
    if not separator:  # a trained bias, or part of a module saved whole
        owner, _, name = key.rpartition(".")
        return f"{_PREFIX}{owner}.base_layer.{name}" if owner in layers else _PREFIX + key
    if layer in embeddings and parameter in ("lora_A", "lora_B"):
        return f"{_PREFIX}{layer}.lora_embedding_{parameter[-1]}"
    return f"{_PREFIX}{layer}.{parameter}" + (".weight" if parameter in ("lora_A", "lora_B") else "")


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> nn.Module:
    """Reads an adapter that PEFT or :func:`save_adapter` wrote; never unpickles.

    A model without that adapter is adapted first, as :func:`apply_lora` does. Everything is checked before
    anything changes: after an error the model is as it was.

    Args:
        model: a plain model, or one with adapters.
        directory: the folder with both files.
        adapter_name: the name the adapter gets, or has.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, sets an option that is not supported, or does not fit the model.
    """
    folder = Path(directory)
    config, tensors = read_config(folder / CONFIG), read_weights(folder)
    known = adapter_name in lora_configs(model)
    if known:
        layers: Container[str] = lora_layers(model)
        state = _once(lora_state_dict(model, adapter_name))
        expected = {key: value.shape for key, value in state.items()}
    else:
        layers, expected = _planned(model, config, adapter_name)
    embeddings, shapes = _embeddings(model), _peft_shapes(model, expected, adapter_name)
    by_key = {_to_peft(key, adapter_name, layers, embeddings): key for key in expected}
    _check_fit(tensors, {name: shapes[key] for name, key in by_key.items()})
    if not known:
        apply_lora(model, config, adapter_name)
    targets = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            _fill(targets[by_key[name]], tensor.view(expected[by_key[name]]))
    return model


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with each tensor that several sites share under the first of its keys alone."""
    first: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        place = (key,) if hasattr(value, "full_tensor") or not value.numel() else _place(value)
        first.setdefault(place, key)
    return {key: state[key] for key in first.values()}


def _place(value: Tensor) -> tuple[Any, ...]:
    return value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _fill(target: Any, value: Tensor) -> None:
    """Copies a whole tensor, into the own part of it where ``target`` is a DTensor."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        places, mesh = target.placements, target.device_mesh
        value = distribute_tensor(value.to(target.device), mesh, places, src_data_rank=None)
    target.copy_(value)


def _planned(
    model: nn.Module, config: LoRAConfig, adapter_name: str
) -> tuple[Container[str], dict[str, torch.Size]]:
    """The layers that ``apply_lora`` would adapt, and the keys and shapes that a checkpoint would hold."""
    adapters = planned_adapters(model, config, adapter_name)
    state = {
        f"{layer}.adapters.{adapter_name}.{key}": value
        for layer, adapter in adapters.items()
        for key, value in adapter.state_dict().items()
    }
    shapes = {key: value.shape for key, value in _once(state).items()}
    saved = tuple(config.modules_to_save or ())
    for key, value in model.state_dict().items():
        module, _, name = key.rpartition(".")
        trained = name == "bias" and (
            config.bias == "all" or (config.bias == "lora_only" and module in adapters)
        )
        whole = any(f".{module}.".find(f".{one}.") >= 0 for one in saved)
        if (trained or whole) and ".adapters." not in f".{key}":
            shapes[key] = value.shape
    return adapters, shapes


def read_config(path: Path) -> LoRAConfig:
    """The config in PEFT's JSON, or a ValueError that says what is wrong with it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, got a file that does not parse ({error})"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if values.get("peft_type") not in ("LORA", _OWN_TYPE):
        raise ValueError(f"{path}: peft_type: expected 'LORA', got {values.get('peft_type')!r}")
    for name in _REFUSED:
        if values.get(name):
            raise ValueError(f"{path}: {name}: expected it unset (not supported), got {values[name]!r}")
    if values.get("init_lora_weights", True) not in _HARMLESS_INITS:
        init = values["init_lora_weights"]
        raise ValueError(
            f"{path}: init_lora_weights: expected one that leaves the base as it is, got {init!r}"
        )
    return _config_from(values, path)


def _config_from(values: dict[str, Any], path: Path) -> LoRAConfig:
    ours = values.get("lora_kernels") or {}
    method = "dora" if values.get("use_dora") else "lora"
    fields = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    try:
        return LoRAConfig(
            **fields, method=ours.get("method", method), method_options=ours.get("method_options", {})
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's safetensors file; anything else is refused.

    Beside the adapter of an embedding or an output head PEFT writes its frozen base weight, which the model
    has: that is left out.
    """
    path = folder / WEIGHTS
    if not path.exists():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise ValueError(f"{pickle}: expected {WEIGHTS}, got a pickle, which is never loaded")
        raise FileNotFoundError(f"{path}: expected the adapter's weights, got no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that is damaged ({error})") from error
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".base_layer.weight")}


def _check_fit(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> None:
    """Raises where a key is missing or unknown, or a shape or dtype differs."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{WEIGHTS}: expected the adapter's {len(expected)} tensors, got {len(missing)} missing"
            f" {missing[:3]} and {len(unknown)} unknown {unknown[:3]}"
        )
    for name, shape in expected.items():
        got = tensors[name]
        if got.shape != shape or not got.is_floating_point():
            raise ValueError(
                f"{WEIGHTS}: {name}: expected a floating tensor of shape {tuple(shape)},"
                f" got {got.dtype} {tuple(got.shape)}"
            )
