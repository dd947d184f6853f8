"""Single files of diffusion models' adapters: kohya's and LyCORIS' keys, and diffusers'.

kohya and LyCORIS: ``lora_unet_down_blocks_0_…_to_k.lora_down.weight``, the dots of the layer's name as
underscores. diffusers: ``unet.down_blocks.0.….to_k.lora_A.weight``, or what it wrote before it had PEFT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..nn.wrappers import plain_names
from .checkpoint_config import CONFIG, config_of
from .checkpoint_keys import PREFIX, mapped_name, mapping_rules

LAYOUTS = ("auto", "peft", "kohya", "diffusers")
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # where diffusers has PEFT's config in the file
# What PEFT's own layout has places for, and diffusers' has not.
_NOT_HERE = ("lora_bias", "alora_invocation_tokens", "target_parameters", "trainable_token_indices")
_PARTS = {
    "kohya": re.compile(r"(lora_(?:unet|te\d?|transformer|prior)|lycoris)_"),
    "diffusers": re.compile(r"((?:unet|text_encoder|transformer|prior)(?:_\d)?)\."),
}
_HADA, _LOKR = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("lokr_w1", "lokr_w2")
# How a key ends -> which tensor of a layer it is.
_ENDS = {
    **{end: "down" for end in ("lora_down.weight", "lora_A.weight", "lora.down.weight")},
    **{end: "up" for end in ("lora_up.weight", "lora_B.weight", "lora.up.weight")},
    **{f"lora_linear_layer.{way}.weight": way for way in ("down", "up")},
    **{end: "magnitude" for end in ("lora_magnitude_vector", "lora_magnitude_vector.weight")},
    "dora_scale": "dora_scale",
    **{name: name for name in (*_HADA, "hada_t1", "hada_t2", "lokr_t2", *_LOKR)},
    **{f"{name}_{half}": f"{name}_{half}" for name in _LOKR for half in "ab"},
    "lora_mid.weight": "mid",
    "alpha": "alpha",
}
# How many dimensions each may have: 2, with those of a kernel at most 5.
_MATRIX, _ANY, _CORE = range(2, 3), range(2, 6), range(3, 6)
_DIMS = {
    **{name: _MATRIX for name in (*_HADA, *(f"{name}_{half}" for name in _LOKR for half in "ab"))},
    **{"down": _ANY, "up": _ANY, "lokr_w1": _MATRIX, "lokr_w2": _ANY},
    **{name: _CORE for name in ("mid", "hada_t1", "hada_t2", "lokr_t2")},
    **{name: range(1, 6) for name in ("magnitude", "dora_scale")},
}
# A Tucker core, and whose first size is the core's second.
_CORES = {"mid": "down", "hada_t1": "hada_w1_b", "hada_t2": "hada_w2_b", "lokr_t2": "lokr_w2_b"}
# diffusers' attention processors held the adapters of the projections beside them.
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")
_Layer = dict[str, Tensor]


def foreign_file(path: Path, layout: str) -> Path | None:
    """The file to read where ``path`` is not PEFT's folder, else ``None``.

    Raises:
        ValueError: no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "peft" or (layout == "auto" and (path / CONFIG).exists()):
        return None
    if path.is_dir() and (layout != "auto" or (path / _DIFFUSERS_FILE).exists()):
        return path / _DIFFUSERS_FILE
    return path if path.suffix == ".safetensors" and not path.is_dir() else None


def read_foreign(
    file: Path, model: nn.Module, layout: str, part: str | None, mapping: Mapping[str, str] | None
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The adapter's config for ``model``, and its tensors under PEFT's keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, has keys or layers that are not known, or several structures or parts.
    """
    tensors, metadata = _read(file)
    layers = _layers(_of_part(tensors, part, file, layout), model, mapping, file)
    methods = {_method(name, layer, file) for name, layer in layers.items()}
    if len(methods) != 1:
        raise ValueError(f"{file}: expected layers of one structure, got {', '.join(sorted(methods))}")
    (method,) = methods
    for name, layer in layers.items():
        _check_shapes(name, layer, file)
    modules = {plain: model.get_submodule(name) for name, plain in plain_names(model).items()}
    said = _said(metadata, part, file)
    sizes: dict[str, tuple[int, float]] = {}
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        alpha = layer.pop("alpha", None)
        r, own = _own_tensors(name, layer, modules[name], method, file)
        sizes[name] = r, _alpha(None if alpha is None else float(alpha), r, said, name)
        found |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in own.items()}
    if method == "lokr":
        sizes |= {name: _lokr_rank(layer, *sizes[name]) for name, layer in layers.items()}
    return _config(sizes, method, _options(layers, method)), found


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected the adapter's weights, got no such file")
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a safetensors file, got one that is damaged ({error})") from error


def _of_part(tensors: dict[str, Tensor], part: str | None, file: Path, layout: str) -> dict[str, Tensor]:
    """The keys of one part of a pipeline, without its name."""
    looked = {name: _PARTS[name] for name in _PARTS if layout in ("auto", name)}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = next(filter(None, (pattern.match(key) for pattern in looked.values())), None)
        parts.setdefault(match[1] if match else "", {})[key[match.end() :] if match else key] = tensor
    if part is None and len(parts) == 1:
        return next(iter(parts.values()))
    if part not in parts:
        named = ", ".join(sorted(parts)) or "none"
        raise ValueError(f"part: expected one of those of {file}, {named}, got {part!r}")
    return parts[part]


def _layers(
    tensors: dict[str, Tensor], model: nn.Module, mapping: Mapping[str, str] | None, file: Path
) -> dict[str, _Layer]:
    """Plain name of each layer -> its tensors."""
    rules, names = mapping_rules(mapping, model), list(plain_names(model).values())
    flat: dict[str, set[str]] = {}
    for name in names:
        flat.setdefault(name.replace(".", "_"), set()).add(name)
    layers: dict[str, _Layer] = {}
    unknown = []
    for key, tensor in tensors.items():
        at, what = _split(key)
        at = mapped_name(at, rules)
        fits = [at] if at in names else sorted(flat.get(at.replace(".", "_"), ()))
        if not what or len(fits) != 1:
            unknown.append(key)
        else:
            layers.setdefault(fits[0], {})[what] = tensor
    if unknown or not layers:
        what = f"{len(unknown)} unknown keys {sorted(unknown)[:5]}" if unknown else "none"
        raise ValueError(f"{file}: expected tensors of layers of the model, got {what}")
    return layers


def _split(key: str) -> tuple[str, str]:
    """A layer's name and which of its tensors the key is, "" for none that is known."""
    old = _PROCESSOR.fullmatch(key)
    if old:
        return f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}", old[3]
    for dot in re.finditer(r"\.", key):  # the longest ending first
        if key[dot.end() :] in _ENDS:
            return key[: dot.start()], _ENDS[key[dot.end() :]]
    return key, ""


def _method(name: str, layer: _Layer, file: Path) -> str:
    """The structure that a layer's tensors are of."""
    given = layer.keys() - {"alpha"}
    loras = {"down", "up"}
    kinds = {
        "lora": given in (loras, loras | {"mid"}),
        "dora": given - {"mid"} in (loras | {"magnitude"}, loras | {"dora_scale"}),
        "loha": given in (set(_HADA), {*_HADA, "hada_t1", "hada_t2"}),
        "lokr": given - {"lokr_t2"} in _lokr_sets(),
    }
    found = next((kind for kind, fits in kinds.items() if fits), None)
    if found is None:
        raise ValueError(f"{file}: {name}: expected the tensors of LoRA, LoHa or LoKr, got {sorted(given)}")
    return found


def _check_shapes(name: str, layer: _Layer, file: Path) -> None:
    """Raises where a tensor cannot be what its key says, before anything is computed of it."""
    for what, tensor in layer.items():
        alpha, got = what == "alpha", f"got {tensor.dtype} {tuple(tensor.shape)}"
        if alpha and (tensor.numel() != 1 or tensor.is_complex()):
            raise ValueError(f"{file}: {name}: alpha: expected one number, {got}")
        if not alpha and not (tensor.is_floating_point() and tensor.numel() and tensor.dim() in _DIMS[what]):
            dims = " to ".join(dict.fromkeys((str(min(_DIMS[what])), str(max(_DIMS[what])))))
            raise ValueError(f"{file}: {name}: {what}: expected floating numbers of {dims} dimensions, {got}")
    for core, factor in _CORES.items():
        if core in layer and layer[core].shape[1] != layer[factor].shape[0]:
            sizes = f"{tuple(layer[core].shape)} and {tuple(layer[factor].shape)}"
            raise ValueError(f"{file}: {name}: expected a {core} that {factor} fits, got {sizes}")


def _lokr_sets() -> list[set[str]]:
    halves = [({name}, {f"{name}_a", f"{name}_b"}) for name in _LOKR]
    return [one | two for one in halves[0] for two in halves[1]]


def _own_tensors(
    name: str, layer: _Layer, module: nn.Module, method: str, file: Path
) -> tuple[int, dict[str, Tensor]]:
    """The rank, and our tensors by the ends of PEFT's keys; Tucker cores are folded into the down side."""
    if method == "loha":
        for one in ("1", "2"):
            _fold(layer, f"hada_w{one}", f"hada_t{one}")
        return layer["hada_w1_b"].shape[0], {key: layer[key] for key in _HADA}
    if method == "lokr":
        _fold(layer, "lokr_w2", "lokr_t2")
        ranked = next((layer[key] for key in ("lokr_w2_b", "lokr_w1_b") if key in layer), None)
        return 0 if ranked is None else ranked.shape[0], dict(layer)
    down, up, weight = layer["down"], layer["up"], getattr(module, "weight", None)
    if "mid" in layer:
        down = torch.einsum("mn...,nj->mj...", layer["mid"].flatten(2), down.flatten(1))
    r = down.shape[0]
    if isinstance(weight, Tensor):  # one kernel of 1 × 1 is a linear to some
        down = _shaped(down, (r, *weight.shape[1:]))
        up = _shaped(up, (up.shape[0], r, *[1] * (weight.dim() - 2)))
    own = {"lora_A.weight": down, "lora_B.weight": up}
    if method == "dora":
        own["lora_magnitude_vector"] = _magnitude(name, layer, up, file)
    return r, own


def _magnitude(name: str, layer: _Layer, up: Tensor, file: Path) -> Tensor:
    """Of each output, in PEFT's shape; LyCORIS may also have one of each input."""
    out, lycoris = up.shape[0], layer.get("dora_scale")
    magnitude = layer["magnitude"] if lycoris is None else lycoris
    if magnitude.numel() != out or (lycoris is not None and len(lycoris) != out):
        got = tuple(magnitude.shape)
        raise ValueError(f"{file}: {name}: expected a magnitude for each of {out} outputs, got {got}")
    return magnitude.reshape(1, out, *[1] * (up.dim() - 2)) if up.dim() > 2 else magnitude.flatten()


def _fold(layer: _Layer, factor: str, core: str) -> None:
    """Takes a Tucker core into the factor's down side, and turns the up side as it is without one."""
    if core in layer:
        t = layer.pop(core).flatten(2)
        layer[f"{factor}_a"] = layer[f"{factor}_a"].T
        layer[f"{factor}_b"] = torch.einsum("ijk,jr->irk", t, layer[f"{factor}_b"]).flatten(1)


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(shape) if tensor.numel() == torch.Size(shape).numel() else tensor


def _lokr_rank(layer: _Layer, r: int, alpha: float) -> tuple[int, float]:
    """Where both factors are whole, a rank that says so; the scale is then 1, as LyCORIS has it."""
    if r:
        return r, alpha
    r = max(layer["lokr_w2"].shape[:2])
    return r, float(r)


def _options(layers: dict[str, _Layer], method: str) -> dict[str, Any]:
    if method != "lokr":
        return {}
    first = {name: layer.get("lokr_w1", layer.get("lokr_w1_a")) for name, layer in layers.items()}
    last = {name: layer.get("lokr_w1", layer.get("lokr_w1_b")) for name, layer in layers.items()}
    sizes = {name: [len(first[name]), last[name].shape[1]] for name in layers}  # type: ignore[arg-type, union-attr]
    return {"decompose_both": any("lokr_w1_a" in layer for layer in layers.values()), "sizes": sizes}


def _said(metadata: Mapping[str, str], part: str | None, file: Path) -> LoRAConfig | None:
    """What diffusers wrote down of PEFT's config."""
    if _METADATA not in metadata:
        return None
    try:
        values = json.loads(metadata[_METADATA])
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: {_METADATA}: expected JSON, got what does not parse ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: {_METADATA}: expected an object, got {type(values).__name__}")
    if not values:
        return None
    parts = sorted({key.partition(".")[0] for key in values})
    wanted = part if part in parts else parts[0]
    own = {key.partition(".")[2]: v for key, v in values.items() if key.startswith(f"{wanted}.")}
    config = config_of({"peft_type": "LORA", **own}, file)
    if config.method not in ("lora", "dora"):
        raise ValueError(f"{file}: {_METADATA}: expected the options of LoRA, got those of {config.method}")
    for name in _NOT_HERE:
        if getattr(config, name):
            raise ValueError(f"{file}: {name}: expected it unset, got {getattr(config, name)!r}")
    return config


def _alpha(alpha: float | None, r: int, said: LoRAConfig | None, name: str) -> float:
    """The file's; without one that of diffusers' config, else the rank, which is a scale of 1."""
    if alpha is not None or said is None:
        return float(r) if alpha is None else alpha
    own = said.for_module(name)
    return own.lora_alpha * (r**0.5 if own.use_rslora else 1)


def _config(sizes: Mapping[str, tuple[int, float]], method: str, options: dict[str, Any]) -> LoRAConfig:
    r, alpha = next(iter(sizes.values()))
    return LoRAConfig(
        r=r,
        lora_alpha=alpha,
        target_modules="|".join(map(re.escape, sizes)),
        rank_pattern={re.escape(name): one for name, (one, _) in sizes.items() if one != r},
        alpha_pattern={re.escape(name): one for name, (_, one) in sizes.items() if one != alpha},
        method=method,
        method_options=options,
    )
