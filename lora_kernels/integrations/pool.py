"""PEFT checkpoints into an :class:`AdapterPool`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._messages import warn
from ..adapters import METHODS, LoRAConfig
from ..nn.wrappers import plain_key
from ..serving.lowered import lower_adapter
from ..serving.pool import AdapterPool
from .checkpoint import WEIGHTS, load_adapter, read_weights
from .checkpoint_config import CONFIG, read_config

# The factors of a linear, or of an embedding: A [r, num_embeddings] and B [embedding_dim, r].
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_([AB])|([AB])\.weight)")


def load_into_pool(pool: AdapterPool, directory: str | os.PathLike[str], name: str) -> None:
    """Registers the adapter that PEFT or :func:`save_adapter` wrote; never unpickles.

    Any method that comes down to A, B and s is lowered to them here, once.

    Args:
        pool: where to.
        directory: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name in the pool.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds more than the adapter's tensors, is of a method that has no A and
            B, or does not fit the pool's linears; the pool is then as it was.
    """
    folder = Path(directory)
    config = read_config(folder / CONFIG)
    kind = METHODS[config.method]
    if config.bias != "none" or config.modules_to_save:
        what = f"bias={config.bias!r}, modules_to_save={config.modules_to_save}"
        raise ValueError(f"{folder / CONFIG}: expected a plain LoRA adapter, got {what}")
    if not (kind.peft and kind.plain):
        try:
            model = load_adapter(_skeleton(pool.linears), folder)
            lowered = lower_adapter(model)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: method={config.method!r}: {error}") from error
        pool.register(name, *lowered)
        return
    factors = _factors(read_weights(folder))
    pool.register(name, factors, {linear: _scaling(config, linear) for linear in factors})


def _skeleton(linears: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A model of linears of these names and sizes, whose weights are one number in memory."""
    root = nn.Module()
    for name, (cols, rows) in linears.items():
        *path, last = name.split(".")
        holder = root
        for part in path:
            holder._modules.setdefault(part, nn.Module())
            holder = holder.get_submodule(part)
        linear = nn.Linear(cols, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.zeros(()).expand(rows, cols), requires_grad=False)
        holder._modules[last] = linear
    return root


def _factors(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear -> (A, B)."""
    base = sorted(key for key in tensors if key.endswith(".base_layer.weight"))
    if base:  # PEFT writes the frozen embedding beside an adapter of it
        warn(f"{WEIGHTS}: not used: {', '.join(base)}; the model that the pool serves has to have it")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key in base:
            continue
        match = _KEY.fullmatch(plain_key(key))
        if match is None:
            raise ValueError(f"{WEIGHTS}: expected A and B of linears and embeddings, got {key!r}")
        halves.setdefault(match[1], {})[match[2] or match[3]] = tensor
    for linear, pair in halves.items():
        if len(pair) != 2 or any(t.dim() != 2 for t in pair.values()):
            raise ValueError(f"{WEIGHTS}: {linear}: expected an A and a B, got {', '.join(sorted(pair))}")
    return {linear: (pair["A"], pair["B"]) for linear, pair in halves.items()}


def _scaling(config: LoRAConfig, linear: str) -> float:
    own = config.for_module(linear)
    return own.lora_alpha / (own.r**0.5 if own.use_rslora else own.r)
