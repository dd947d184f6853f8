"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Methods whose class says ``peft`` are written so that PEFT reads them. Others carry a peft_type that PEFT
refuses, since it would load only half of them. A tensor that layers share is written once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..adapters import METHODS, Adapter, LoRAConfig
from ..adapters.token_rows import TokenRows
from ..init import GIVEN
from ..nn import owned
from ..nn.adapted import is_combined, lora_configs, lora_layers, lora_state_dict
from ..nn.install import check_place, check_retune, install, reinstall, retune
from ..nn.layer_weights import fill_
from ..nn.planned import PlannedAdapter, plan_adapter
from ..nn.quantized import QuantizedLinear, QuantizedLoRALinear
from ..nn.wrappers import plain_key, plain_names, unwrapped
from .checkpoint_config import CONFIG, config_text, read_start
from .checkpoint_fit import Slot, fitted, value_of, whole
from .checkpoint_keys import PREFIX, factor_key, factor_shape, owned_key, renamed
from .layouts import foreign_file, read_foreign
from .starts import doubled, split

WEIGHTS = "adapter_model.safetensors"
_QUANTIZED = (QuantizedLinear, QuantizedLoRALinear)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    save_embedding_layers: bool = False,
) -> None:
    """Writes one adapter of ``model`` so that ``PeftModel.from_pretrained`` or :func:`load_adapter` reads it.

    Args:
        model: a model that :func:`apply_lora` adapted, or what ``torch.compile``, DDP or FSDP made of it or
            of parts of it: their names are left out.
        directory: the folder, made where it is missing. Each file is replaced in one step.
        adapter_name: which adapter.
        save_embedding_layers: whether the input and output embeddings of a Transformers model go with it, for
            one that was resized before training, whose new rows no other model has.

    An adapter whose start was taken out of W (PiSSA, OLoRA, CorDA, …) is written as what it changes W by:
    LoRA of twice the rank, for the untouched base. :func:`load_adapter` makes of it what it was. One of
    LoftQ is written as it is, for the base that LoftQ left.

    Of a model that is split over processes (FSDP2, tensor parallelism) every process must call this; each
    writes the whole.

    Raises:
        ValueError: no such adapter, or a model that does not name its embeddings.

    Examples:
        >>> import os, tempfile
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    write_files(directory, file_contents(model, adapter_name, save_embedding_layers))


class Contents(NamedTuple):
    """What an adapter's two files hold."""

    tensors: dict[str, Tensor]
    config: str


def file_contents(model: nn.Module, adapter_name: str, save_embedding_layers: bool = False) -> Contents:
    """What :func:`save_adapter` writes, gathered from all processes that a model is split over.

    Raises:
        ValueError: as :func:`save_adapter`.
    """
    configs = lora_configs(model)
    if adapter_name not in configs:
        raise ValueError(
            f"adapter_name: expected one of {', '.join(configs) or 'none'}, got {adapter_name!r}"
        )
    found = dict(_embedding_tensors(model, adapter_name)) if save_embedding_layers else {}
    found |= dict(_file_tensors(model, adapter_name))
    tensors = _alone({key: whole(value) for key, value in found.items()})
    taken = any(key.rpartition(".")[2] in GIVEN for key in tensors)
    # PEFT goes by the type of each layer and writes down what it found.
    transposed = any(layer.fan_in_fan_out for layer in lora_layers(model).values())
    text = config_text(configs[adapter_name], transposed, taken)
    return Contents(doubled(tensors) if taken else tensors, text)


def write_files(directory: str | os.PathLike[str], contents: Contents) -> None:
    """Both files, each replaced in one step."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, text = contents
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _file_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Key in the file -> tensor."""
    plain, layers = plain_names(model), lora_layers(model)
    layers = {at: layer for at, layer in layers.items() if adapter_name in layer.adapters}
    state = {plain_key(key): value for key, value in lora_state_dict(model, adapter_name).items()}
    written: set[int] = set()
    for at, layer in layers.items():
        adapter = layer.adapters[adapter_name]
        if isinstance(adapter, TokenRows) and adapter.tied:  # its rows are the embedding's
            continue
        for parameter, tensor in adapter.state_dict(keep_vars=True).items():
            if id(tensor) in written:
                continue
            written.add(id(tensor))
            value = whole(state[plain_key(f"{at}.adapters.{adapter_name}.{parameter}")])
            shape = factor_shape(layer, parameter, value.shape)
            yield factor_key(plain[at], layer, adapter, parameter), value.reshape(shape)
    for (at, name), key in owned.state_keys(model, adapter_name).items():
        yield owned_key(plain[at], name, at in layers), state[plain_key(key)]


def _embedding_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Key in the file -> the model's own weight, of its input and its output embedding."""
    base, plain = unwrapped(model), plain_names(model)
    if not callable(getattr(base, "get_input_embeddings", None)):
        raise ValueError("save_embedding_layers: expected a model that has get_input_embeddings, got none")
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]  # type: ignore[operator]
    for name, module in model.named_modules():
        if any(module is one for one in ends):
            adapted = adapter_name in getattr(module, "adapters", ())
            yield owned_key(plain[name], "weight", adapted), owned.base_tensor((module, "weight"))


def _alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own, as safetensors takes them."""
    found, taken = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return found


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


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    key_mapping: Mapping[str, str] | None = None,
    layout: str = "auto",
    part: str | None = None,
) -> nn.Module:
    """Reads an adapter that PEFT, :func:`save_adapter`, kohya, LyCORIS or diffusers wrote; never unpickles.

    A model without that adapter is adapted first, as :func:`apply_lora` does; one that has it takes over all
    that the files say, rank, alpha and targets included. Base tensors beside the adapter (of embeddings that
    were resized) become the adapter's own, like ``modules_to_save``: they act while it is active. Everything
    is checked before anything changes: after an error the model is as it was.

    Of kohya's and LyCORIS' files LoRA and LoCon (also with ``dora_scale`` by output), LoHa and LoKr become
    ``lora``, ``dora``, ``loha`` and ``lokr``, on convolutions too; a Tucker core is multiplied into the
    factor beside it, which changes no ΔW. A layer without alpha has a scale of 1.

    Args:
        model: a plain model, or one with adapters; wrapped by ``torch.compile``, DDP or FSDP or not.
        directory: the folder with both of PEFT's files or with diffusers' ``pytorch_lora_weights``, or a
            safetensors file of another layout.
        adapter_name: the name the adapter gets, or has.
        key_mapping: expression -> replacement for the names of the file without ``base_model.model.``, where
            the model has other ones now; the first that is found in a name counts. By default the mapping
            that Transformers gives its models.
        layout: ``"peft"``, ``"kohya"`` (LyCORIS too), ``"diffusers"``, or ``"auto"`` for what is there.
        part: of a file for several models, which: ``"lora_unet"``, ``"lora_te"``, … or ``"unet"``,
            ``"text_encoder"``, ….

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, has keys that are not known, which are named, sets an option that is
            not supported, or does not fit the model.
        RuntimeError: a layer is merged of which the adapter has to be replaced, or that very adapter is; or
            FSDP2 has taken over the parameters, and other tensors than are there would have to come.

    Examples:
        >>> import tempfile
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     model = load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)
    """
    source = foreign_file(Path(directory), layout)
    statistics: dict[str, dict[str, Tensor]] = {}
    if source is not None:
        config, tensors = read_foreign(source, model, layout, part, key_mapping)
    else:
        source = _folder(directory) / WEIGHTS
        config, tensors, statistics = _read(source.parent, model, key_mapping)
    try:
        plan = plan_adapter(model, config, draw=False, statistics=statistics)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    plan, slots = fitted(model, plan, tensors, source)
    values = [value_of(slot, tensors) for slot in slots]
    there = _same_tensors(model, plan, slots, adapter_name)
    if there is not None:
        check_retune(plan, adapter_name)
    else:
        check_place(model, adapter_name)
    _fill_all([slot.target for slot in slots] if there is None else there, values)
    if there is not None:
        retune(model, config, adapter_name, plan)
    elif adapter_name in lora_configs(model):
        reinstall(model, config, adapter_name, plan)
    else:
        fuse = not lora_configs(model) or is_combined(model)
        install(model, config, adapter_name, plan, fuse=fuse)
    return model


def _read(
    folder: Path, model: nn.Module, key_mapping: Mapping[str, str] | None
) -> tuple[LoRAConfig, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Config, tensors and what the starts took out of W, of PEFT's folder."""
    quantized = any(isinstance(module, _QUANTIZED) for module in model.modules())
    config, taken = read_start(folder / CONFIG, quantized)
    tensors = renamed(read_weights(folder), model, key_mapping, folder / WEIGHTS)
    form = METHODS[config.method].peft_form
    tensors = tensors if form is None or form.decode is None else form.decode(tensors, config)
    tensors, starts = split(tensors) if taken else (tensors, {})
    return config, tensors, {name.removeprefix(PREFIX): start for name, start in starts.items()}


def _same_tensors(
    model: nn.Module, plan: PlannedAdapter, slots: list[Slot], adapter_name: str
) -> list[Tensor] | None:
    """The tensors for the slots in the adapter that is there, if it has these and no others."""
    there: dict[tuple[str, str], Tensor] = dict(owned.owned_tensors(model, adapter_name))
    if any((one.rest is not None) != (layer._taker == adapter_name) for _, layer, one in plan.layers):
        return None
    seen: set[int] = set()
    planned = {layer: _kind(adapter) for _, layer, adapter in plan.layers}
    for at, layer in lora_layers(model).items():
        if adapter_name in layer.adapters:
            adapter = layer.adapters[adapter_name]
            if planned.get(layer) != _kind(adapter):
                return None
            for name, value in adapter.state_dict(keep_vars=True).items():
                # Else one that layers share, or that the plan was made with.
                if id(value) not in seen and name not in GIVEN:
                    there[at, name] = value
                seen.add(id(value))
    wanted = {(slot.at, slot.name): slot.target.shape for slot in slots}
    if {place: tensor.shape for place, tensor in there.items()} != wanted:
        return None
    return [there[slot.at, slot.name] for slot in slots]


def _kind(adapter: Adapter) -> tuple[type[Adapter], set[str]]:
    """What a planned adapter has to share with the one whose tensors it fills."""
    return type(adapter), {name for name in GIVEN if name in adapter._buffers}


@torch.no_grad()
def _fill_all(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        fill_(target, value)


def _folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    if folder.is_file():
        raise ValueError(
            f"directory: expected a folder with {CONFIG} and {WEIGHTS}, or a safetensors file of kohya's or"
            f" diffusers' layout, got the file {folder}"
        )
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's safetensors file; anything else is refused."""
    path = folder / WEIGHTS
    if not path.exists():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise ValueError(f"{pickle}: expected {WEIGHTS}, got a pickle, which is never loaded")
        raise FileNotFoundError(f"{path}: expected the adapter's weights, got no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that is damaged ({error})") from error
