"""One line that makes a live PEFT model use the fused ops."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._messages import warn
from ..nn.groups import group_layers, ungroup_layers, why_alone, why_alone_compiled
from ..nn.mlp import fuse_mlps, unfuse_mlps
from ..nn.weight_reads import weight_reads
from .peft_experts import FusedParamWrapper
from .peft_experts import why_not as why_not_parameter
from .peft_layers import FUSED as OTHERS
from .peft_layers import why_not as why_not_other
from .peft_linear import FusedLoraLinear
from .peft_linear import why_not as why_not_dense
from .tuners import TAKEOVERS as OF_TUNERS
from .tuners import why_left
from .tuners.base import Takeover

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Which layers :func:`accelerate` took over, and which stay PEFT's with the reason."""

    accelerated: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    # Layers that share an input and are computed together, and those beside others that are not.
    groups: list[tuple[str, ...]] = field(default_factory=list)
    alone: list[tuple[str, str]] = field(default_factory=list)
    # Layers of a group that compiled models compute one by one.
    alone_compiled: list[tuple[str, str]] = field(default_factory=list)
    # Layers that are not called, so that PEFT leaves out their adapters, and who reads their weight instead.
    read: list[tuple[str, str]] = field(default_factory=list)
    # Gated MLPs that are one call.
    mlps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"lora-kernels: {len(self.accelerated)} LoRA layers fused, {len(self.skipped)} left to PEFT"]
        if self.groups:
            lines[0] += (
                f"; {sum(map(len, self.groups))} of them in {len(self.groups)} groups that share an input"
            )
        if self.mlps:
            lines[0] += f"; {len(self.mlps)} gated MLPs in one call each"
        lines += [f"  {name}: {reason}" for name, reason in self.skipped]
        lines += [f"  {name}: without effect until merged, {reason}" for name, reason in self.read]
        lines += [f"  {name}: alone, {reason}" for name, reason in self.alone]
        lines += [f"  {name}: alone when compiled, {reason}" for name, reason in self.alone_compiled]
        return "\n".join(lines)


# PEFT's class of a layer -> what takes it over; and those of bitsandbytes' layers where PEFT has made any.
TAKEOVERS: dict[type[nn.Module], Takeover] = {
    PeftLinear: Takeover(FusedLoraLinear, why_not_dense),
    ParamWrapper: Takeover(FusedParamWrapper, why_not_parameter),
    **{peft: Takeover(fused, why_not_other) for peft, fused in OTHERS.items()},
    **OF_TUNERS,
}


def _takeovers() -> dict[type[nn.Module], Takeover]:
    if "peft.tuners.lora.bnb" not in sys.modules:
        return TAKEOVERS
    from . import peft_quantized as quantized  # not at the top: it imports bitsandbytes

    return TAKEOVERS | {peft: Takeover(one, quantized.why_not) for peft, one in quantized.FUSED.items()}


def accelerate(model: nn.Module) -> Report:
    """Makes the layers of a PEFT model compute with the fused ops, in place.

    Of LoRA those are ``Linear`` (also on a Transformers ``Conv1D``), ``Embedding`` and the convolutions, with
    DoRA too, and ``Linear`` over bitsandbytes' ``Linear4bit`` (NF4: QLoRA) and ``Linear8bitLt``, whose packed
    weight is read where it lies. Of the other tuners they are those of ``integrations/tuners/``.

    Expert parameters (``target_parameters``) of Transformers' mixtures (Mixtral, Qwen3-MoE, gpt-oss, DeepSeek
    and others of their interface) keep their W: the branch runs on the rows of each expert, where PEFT makes
    W + ΔW of all experts at every step.

    A layer whose parent computes with its weight and does not call it (Mamba's ``dt_proj``, the ``out_proj``
    of ``nn.MultiheadAttention``) is as in PEFT: its adapter does nothing until merged. A warning names it.

    Layers that a forward calls on one x (query, key and value; gate and up) are computed together, and
    the gated MLPs of Llama, Mistral, Qwen and Gemma with LoRA on all three dense layers by ``lora_mlp``.

    PEFT's API goes on working (``set_adapter``, ``disable_adapter``, ``merge_and_unload``,
    ``save_pretrained``), and so do pickling and copying. :func:`decelerate` reverses it.

    Args:
        model: a model of ``get_peft_model``, or any module that holds layers of PEFT's.

    Returns:
        Which layers are fused and, for the others, why not.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no layer of PEFT's.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> report = accelerate(model)
    """
    report, takeovers = Report(), _takeovers()
    ours = {one.fused for one in takeovers.values()}
    for name, layer in _tuner_layers(model):
        takeover = takeovers.get(type(layer))
        if type(layer) not in ours:
            reason = why_left(layer) if takeover is None else takeover.why_not(layer)
            if reason is not None:
                report.skipped.append((name, reason))
                continue
            layer.__class__ = takeover.fused
        report.accelerated.append(name)
    report.read = _read_layers(model)
    report.groups = group_layers(model)
    report.alone = why_alone(model, report.groups)
    report.alone_compiled = why_alone_compiled(model)
    report.mlps = fuse_mlps(model)
    logger.info("%s", report)
    return report


def _read_layers(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, reader) of those that are read; an attention that PEFT adapts whole sees to that itself."""
    layers, reads = _tuner_layers(model), weight_reads(model, fast_paths=True)
    whole = {id(layer.base_layer) for _, layer in layers}
    found = []
    for name, layer in layers:
        read = reads.get(id(layer))
        if read is not None and read.instead() and not any(id(reader) in whole for reader, _ in read.by):
            found.append((name, str(read)))
    if found:
        named = ", ".join(f"{name} ({reason})" for name, reason in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        warn(f"PEFT's adapters do nothing until merged in {named}{more}")
    return found


def decelerate(model: nn.Module) -> int:
    """Gives every layer back to PEFT; returns how many there were.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> report = accelerate(model)
        >>> decelerate(model)
        1
    """
    plain = {takeover.fused: peft for peft, takeover in _takeovers().items()}
    layers = [layer for _, layer in _tuner_layers(model) if type(layer) in plain]
    ungroup_layers(model)
    unfuse_mlps(model)
    for layer in layers:
        layer.__class__ = plain[type(layer)]
    return len(layers)


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            f"model: expected a model with layers of PEFT's, got {type(model).__name__} with none"
        )
    return layers
