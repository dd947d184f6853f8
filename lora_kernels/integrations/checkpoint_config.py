"""``adapter_config.json`` in PEFT's words: read into a :class:`LoRAConfig`, and written from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._version import __version__
from ..adapters import METHODS, LoRAConfig, PeftForm
from .starts import doubled_fields, own_fields

CONFIG = "adapter_config.json"
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
    "layers_to_transform",
    "layers_pattern",
    "use_dora",
    "ensure_weight_tying",
    "lora_bias",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)
# Initialisers that leave the base weight alone: what they drew is in the checkpoint anyway.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Those of PEFT that take the same out of it again when a checkpoint is loaded; those that freeze a factor.
_TAKEN_AGAIN = ("pissa", "olora")
_FREEZING = ("mica", "asym")
# Options that say nothing about the function computed, or only with another that does. One that is neither
# here nor above is refused where it is set: it may change that function.
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "lora_kernels",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)


def config_text(config: LoRAConfig, fan_in_fan_out: bool, taken: bool) -> str:
    """The file of ``config``; with ``taken``, of an adapter that is written in twice its rank."""
    plain = METHODS[config.method].peft
    values = {name: getattr(config, name) for name in _FIELDS} | {"fan_in_fan_out": fan_in_fan_out}
    # Without the initialiser's options, which only its start has.
    options = {k: v for k, v in config.method_options.items() if k in METHODS[config.method].options}
    ours = {"version": __version__, "method": config.method, "method_options": options}
    init = config.init_lora_weights
    if taken or init in (*_FREEZING, "loftq"):
        ours["start"] = own_fields(config)
    if taken:
        values |= doubled_fields(config)
    if init == "mica" and not config.use_dora:  # PEFT freezes B by it, and does not know both
        values["init_lora_weights"] = init
    values |= {"peft_type": "LORA" if plain else _OWN_TYPE}
    if config.alora_invocation_tokens:  # PEFT finds them in a causal model's input alone
        values |= {"task_type": "CAUSAL_LM"}
    form = METHODS[config.method].peft_form
    theirs = None if form is None else form.values(config)
    if theirs is not None:
        kept = values if theirs["peft_type"] == "LORA" else {"fan_in_fan_out": fan_in_fan_out}
        values = {**kept, **theirs}
    if "start" in ours or _config_from(values, Path()) != _config_from(
        values | {"lora_kernels": ours}, Path()
    ):
        values["lora_kernels"] = ours  # PEFT warns of a key that it does not know
    return json.dumps(values, indent=2, sort_keys=True)


def read_config(path: Path) -> LoRAConfig:
    """The config in PEFT's JSON of an adapter on the untouched base; a ValueError says what is wrong."""
    return _config_from(_read_json(path, _HARMLESS_INITS), path)


def read_start(path: Path, quantized: bool) -> tuple[LoRAConfig, bool]:
    """The config of the adapter as it goes on learning, and whether its file is one in twice its rank."""
    values = _read_json(path, (*_HARMLESS_INITS, *_TAKEN_AGAIN))
    start = (values.get("lora_kernels") or {}).get("start")
    init = values.get("init_lora_weights")
    if start is None:
        return _config_from(values, path, init if init in (*_TAKEN_AGAIN, "mica") else True), False
    if not isinstance(start, dict):
        raise ValueError(f"{path}: lora_kernels.start: expected an object, got {type(start).__name__}")
    init = start.get("init_lora_weights")
    if init == "loftq" and quantized:  # the base is what LoftQ left
        return _config_from(values, path), False
    return _config_from(values | start, path, init), init not in (*_FREEZING, "loftq")


def _read_json(path: Path, inits: tuple[Any, ...]) -> dict[str, Any]:
    """The file's options, those that may change the function refused."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, got a file that does not parse ({error})"
        ) from error
    return _known_options(values, path, inits)


def config_of(values: Any, source: Path) -> LoRAConfig:
    """The config that PEFT's options stand for, wherever they were written down."""
    return _config_from(_known_options(values, source, _HARMLESS_INITS), source)


def _known_options(values: Any, path: Path, inits: tuple[Any, ...]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if not isinstance(values.get("lora_kernels") or {}, dict):
        got = type(values["lora_kernels"]).__name__
        raise ValueError(f"{path}: lora_kernels: expected an object, got {got}")
    form = _form_of(values)
    if form is None and values.get("peft_type") not in ("LORA", _OWN_TYPE):
        raise ValueError(f"{path}: peft_type: expected 'LORA', got {values.get('peft_type')!r}")
    known = {*_FIELDS, *_HARMLESS, *(form[1].known() if form else ())}
    for name, value in values.items():
        if value and name not in known:
            raise ValueError(f"{path}: {name}: expected it unset (not supported), got {value!r}")
    if values.get("init_lora_weights", True) not in inits:
        init = values["init_lora_weights"]
        raise ValueError(
            f"{path}: init_lora_weights: expected one that leaves the base as it is, got {init!r}"
        )
    return values


def _form_of(values: dict[str, Any]) -> tuple[str, PeftForm] | None:
    """The method whose file of PEFT's this is, where that is none of LoRA."""
    forms = ((key, METHODS[key].peft_form) for key in METHODS)
    return next(((key, form) for key, form in forms if form is not None and form.reads(values)), None)


def _config_from(values: dict[str, Any], path: Path, init: Any = True) -> LoRAConfig:
    ours = values.get("lora_kernels") or {}
    options = values.get("method_options") or ours.get("method_options", {})
    method = "dora" if values.get("use_dora") else "lora"
    fields = {name: values[name] for name in _FIELDS if values.get(name) is not None}
    fields |= {"method": ours.get("method", method), "method_options": options}
    form = _form_of(values)
    if form is not None:
        fields |= {"method": form[0], **form[1].config_fields(values)}
    try:
        return LoRAConfig(**fields, init_lora_weights=init)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
