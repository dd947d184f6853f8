"""Gated MLPs of a model, found by their source and computed by ``lora_mlp``.

The module of Llama, Mistral, Qwen and Gemma is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``. Where all
three are LoRA layers its instance gets a forward of its own: one call of ``lora_mlp`` where each layer is one
plain fused linear at that moment, and the class's own forward in every other case.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .._arguments import LoraInputs
from ..ops.lora_mlp import LoRAProjection, fused_mlp
from .forward_source import source
from .groups import _fits, _groupable, touched

_LAYERS = ("gate_proj", "up_proj", "down_proj")
_EXPRESSION = "self.down_proj(self.act_fn(self.gate_proj({x})) * self.up_proj({x}))"
# The name that `lora_mlp` has for what torch's and Transformers' modules compute.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


class _Forward:
    """The forward of one MLP instance."""

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        # A compiler fuses the product itself and computes it anew for the backward pass: it keeps as little,
        # and gate and up are one call by the class's forward.
        parts = None if torch.compiler.is_compiling() else _arguments(mlp, x)
        if parts is not None:
            gate, up, down, activation = parts
            return fused_mlp(x, gate, up, down, activation)
        return type(mlp).forward(mlp, x)


def fuse_mlps(model: nn.Module) -> list[str]:
    """Lets the MLPs whose three layers have LoRA compute with ``lora_mlp``; returns their names.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> fuse_mlps(model)
        []
    """
    unfuse_mlps(model)
    for module in model.modules():
        if _is_gated_mlp(module) and all(_fusible(module._modules[name]) for name in _LAYERS):
            module.__dict__["forward"] = _Forward(module)
    return fused_mlps(model)


def _fusible(layer: Any) -> bool:
    """Whether it is a LoRA layer over a dense weight, which is what ``lora_mlp`` takes."""
    weight = layer.weight if _groupable(layer) else None
    return isinstance(weight, Tensor) and weight.is_floating_point()


def fused_mlps(model: nn.Module) -> list[str]:
    """The names of the MLPs that :func:`fuse_mlps` found.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> fused_mlps(model)
        []
    """
    return [name for name, module in model.named_modules() if type(vars(module).get("forward")) is _Forward]


def unfuse_mlps(model: nn.Module) -> None:
    """Undoes :func:`fuse_mlps`.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> unfuse_mlps(model)
    """
    for module in model.modules():
        if type(vars(module).get("forward")) is _Forward:
            del module.__dict__["forward"]


def activation_name(module: Any) -> str | None:
    """What ``lora_mlp`` calls the activation, or ``None``."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    known = kind.__module__ == "transformers.activations" or kind is nn.SiLU
    return _ACTIVATIONS.get(kind.__name__) if known else None


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether the class's forward is that expression and nothing else."""
    parts = module._modules
    if any(parts.get(name) is None for name in (*_LAYERS, "act_fn")) or "forward" in vars(module):
        return False
    tree = source(module)
    match tree:
        case ast.Module([ast.FunctionDef(args=ast.arguments(args=[_, x]), body=body)]):
            want = ast.dump(ast.parse(_EXPRESSION.format(x=x.arg), mode="eval").body)
            return activation_name(module.act_fn) is not None and _returned(body) == want
    return False


def _returned(body: list[ast.stmt]) -> str | None:
    """The expression of ``return e`` or ``v = e; return v``."""
    match body:
        case [ast.Return(value)] if value is not None:
            return ast.dump(value)
        case [ast.Assign([ast.Name(one)], value), ast.Return(ast.Name(other))] if one == other:
            return ast.dump(value)
    return None


def _arguments(mlp: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What ``lora_mlp`` takes in place of the module's forward, or ``None`` where it cannot now."""
    layers: list[Any] = [mlp._modules[name] for name in _LAYERS]
    if type(x) is not Tensor or torch_module._has_any_global_hook():
        return None
    if any(touched(module) for module in (*layers, mlp._modules["act_fn"])):
        return None
    members: list[Any] = []
    for layer in layers:  # up to the first that does not fit, since each makes its update
        members.append(layer.group_member(x) if _groupable(layer) else None)
        if not _plain(members[-1]):
            return None
    gate, up, down = members
    fit = all(_fits(layer, member, x) for layer, member in zip(layers[:2], members[:2], strict=True))
    device = down.weight.device == x.device and type(down.weight) in (Tensor, nn.Parameter)
    widths = gate.weight.shape[0] == up.weight.shape[0] == down.weight.shape[1]
    activation = activation_name(mlp._modules["act_fn"])
    if not (fit and device and widths and activation):
        return None
    return *(_projection(member) for member in members), activation


def _projection(member: Any) -> LoRAProjection:
    factors = member.weight, member.lora_a, member.lora_b
    return LoRAProjection(*factors, member.scaling, member.bias, member.dropout_p)


def _plain(member: LoraInputs | None) -> bool:
    return member is not None and member.gate is None and isinstance(member.weight, Tensor)
