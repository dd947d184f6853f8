"""``adapter_config.json`` in PEFT's words: read into a :class:`LoRAConfig`, and written from one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._version import __version__
from ..adapters import METHODS, LoRAConfig

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
    "use_dora",
    "ensure_weight_tying",
)
# Initialisers that leave the base weight alone: what they drew is in the checkpoint anyway.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
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


def config_text(config: LoRAConfig, fan_in_fan_out: bool) -> str:
    """The file of ``config``."""
    plain = METHODS[config.method].peft
    values = {name: getattr(config, name) for name in _FIELDS} | {"fan_in_fan_out": fan_in_fan_out}
    ours = {"version": __version__, "method": config.method, "method_options": config.method_options}
    values |= {"peft_type": "LORA" if plain else _OWN_TYPE, "lora_kernels": ours}
    return json.dumps(values, indent=2, sort_keys=True)


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
    for name, value in values.items():
        if value and name not in _FIELDS and name not in _HARMLESS:
            raise ValueError(f"{path}: {name}: expected it unset (not supported), got {value!r}")
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
