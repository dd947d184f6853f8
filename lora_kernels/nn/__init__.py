"""Modules and verbs on models."""

from __future__ import annotations

from ..adapters import LoRAConfig
from .adapted import count_parameters, lora_configs, lora_layers, lora_state_dict, print_trainable_parameters
from .apply import apply_lora
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding
from .experts import fill_experts
from .frozen_copy import frozen_copy
from .groups import group_layers, layer_groups, ungroup_layers
from .install import delete_adapter, remove_lora
from .linear import LoRALinear
from .low_rank import LowRankLinear
from .methods.colora import CoLoRALinear, CoLoRANet, evolve_gates
from .methods.compacter import CompacterAdapter, PHMLinear, insert_compacter
from .methods.elastic import Slice, elastic
from .methods.lofit import lofit_heads
from .methods.lors import LORSLinear, LORSMixing
from .methods.memvp import MemVPFFN, MemVPMemory, apply_memvp
from .methods.multitask import MultiTaskLinear
from .methods.offset_linear import OffsetLinear
from .methods.vlora import VLoRAGenerator
from .methods.wht import WHTLinear
from .mixed import mixed_adapters, train_adapters
from .mixture import LoRAMixtureLinear
from .mlp import fuse_mlps, fused_mlps, unfuse_mlps
from .pairs import Pair, lora_pairs
from .quantized import QuantizedLinear, QuantizedLoRALinear
from .quantized_base import quantize_base
from .serial import SerialAdapter
from .side_inputs import side_inputs
from .switch import (
    disable_adapters,
    mark_only_lora_as_trainable,
    merge_adapters,
    set_adapter,
    unmerge_adapters,
)

__all__ = [
    "CoLoRALinear",
    "CoLoRANet",
    "CompacterAdapter",
    "LORSLinear",
    "LORSMixing",
    "LoRAConfig",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAMixtureLinear",
    "LowRankLinear",
    "MemVPFFN",
    "MemVPMemory",
    "MultiTaskLinear",
    "OffsetLinear",
    "PHMLinear",
    "Pair",
    "QuantizedLinear",
    "QuantizedLoRALinear",
    "SerialAdapter",
    "Slice",
    "VLoRAGenerator",
    "WHTLinear",
    "apply_lora",
    "apply_memvp",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "elastic",
    "evolve_gates",
    "fill_experts",
    "frozen_copy",
    "fuse_mlps",
    "fused_mlps",
    "group_layers",
    "insert_compacter",
    "layer_groups",
    "lofit_heads",
    "lora_configs",
    "lora_layers",
    "lora_pairs",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_adapters",
    "mixed_adapters",
    "print_trainable_parameters",
    "quantize_base",
    "remove_lora",
    "set_adapter",
    "side_inputs",
    "train_adapters",
    "unfuse_mlps",
    "ungroup_layers",
    "unmerge_adapters",
]
