"""State dicts of loralib: which method each layer had, by the shapes, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..nn.adapted import lora_layers
from ..nn.apply import apply_lora

_NAMES = {"lora": ("lora_A", "lora_B"), "merged_linear": ("merged_A", "merged_B")}
_NAMES["mosa_conv"] = ("kernel_A", "kernel_B")


class _Layer(NamedTuple):
    method: str
    r: int
    lora_a: Tensor
    lora_b: Tensor


def load_loralib(
    model: nn.Module,
    state: Mapping[str, Tensor],
    lora_alpha: float = 1,
    adapter_name: str = "default",
    *,
    enable_lora: Sequence[bool] | None = None,
    lora_dropout: float = 0.0,
) -> nn.Module:
    """Puts the adapter of a loralib state dict (microsoft/LoRA, arXiv 2106.09685) on a plain model.

    Its ``Linear``, ``Embedding``, ``MergedLinear`` and ``Conv2d`` become ``lora``, ``merged_linear`` and
    ``mosa_conv``, on the layers of the same names. The file does not say what alpha was: give it.

    Args:
        model: the model without loralib's layers.
        state: what ``loralib.lora_state_dict(model)`` gave, read by
            ``torch.load(path, weights_only=True)``. Of a whole state dict the rest is for the model first.
        lora_alpha: loralib's, whose default is 1.
        adapter_name: the name the adapter gets.
        enable_lora: of ``MergedLinear``, where there are any: which parts.
        lora_dropout: of the adapter.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``state`` is no mapping of names to tensors.
        ValueError: a tensor that is none of loralib's, a layer that the model has not or that it does not
            fit, or several kinds of layers in one dict. The model is then as it was.
    """
    pairs = _pairs(state)
    found = {name: _layer(model, name, pair, enable_lora) for name, pair in pairs.items()}
    methods = {one.method for one in found.values()}
    if len(methods) != 1:
        raise ValueError(f"state: expected layers of one method, got {', '.join(sorted(methods)) or 'none'}")
    (method,) = methods
    r = min(one.r for one in found.values())
    options = {"enable_lora": list(enable_lora or ())} if method == "merged_linear" else {}
    config = LoRAConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=f"({'|'.join(_escaped(name) for name in found)})",
        rank_pattern={_escaped(name): one.r for name, one in found.items() if one.r != r},
        method=method,
        method_options=options,
    )
    apply_lora(model, config, adapter_name)
    _fill(model, adapter_name, found)
    return model


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _pairs(state: Any) -> dict[str, dict[str, Tensor]]:
    """Layer -> its lora_A and lora_B."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping of names to tensors, got {type(state).__name__}")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, _, name = key.rpartition(".")
        if name not in ("lora_A", "lora_B") or not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise ValueError(f"state: expected matrices lora_A and lora_B alone, got {key!r}")
        pairs.setdefault(layer, {})[name] = tensor
    for layer, pair in pairs.items():
        if len(pair) != 2:
            raise ValueError(f"state: {layer}: expected lora_A and lora_B, got {', '.join(pair)} alone")
    return pairs


def _layer(
    model: nn.Module, name: str, pair: dict[str, Tensor], enable_lora: Sequence[bool] | None
) -> _Layer:
    """The method that the shapes are of, and its rank."""
    base, lora_a, lora_b = dict(model.named_modules()).get(name), pair["lora_A"], pair["lora_B"]
    method, r, shapes = _expected(base, len(lora_a), tuple(enable_lora or ()))
    if (lora_a.shape, lora_b.shape) != shapes:
        hint = "" if enable_lora else " (of a MergedLinear, give enable_lora)"
        got = f"A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)}"
        raise ValueError(f"state: {name}: {got} do not fit the model's {type(base).__name__}{hint}")
    return _Layer(method, r, lora_a, lora_b)


def _expected(
    base: nn.Module | None, rows: int, enabled: tuple[bool, ...]
) -> tuple[str, int, tuple[Any, Any]]:
    """The method of loralib's layer for ``base``, its rank where A has so many rows, and both shapes."""
    if isinstance(base, nn.Conv2d):
        k = base.kernel_size[0]
        r = rows // k
        return "mosa_conv", r, ((r * k, base.in_channels * k), (base.out_channels * k, r * k))
    if isinstance(base, nn.Embedding):
        return "lora", rows, ((rows, base.num_embeddings), (base.embedding_dim, rows))
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return "", 0, ((), ())
    outs, ins = weight.T.shape if type(base).__name__ == "Conv1D" else weight.shape
    m = sum(enabled)
    if not m:
        return "lora", rows, ((rows, ins), (outs, rows))
    r = rows // m
    return "merged_linear", r, ((r * m, ins), (m * outs // len(enabled), r))


@torch.no_grad()
def _fill(model: nn.Module, adapter_name: str, found: Mapping[str, _Layer]) -> None:
    layers = lora_layers(model)
    for name, one in found.items():
        adapter = layers[name].adapters[adapter_name]
        for own, tensor in zip(_NAMES[one.method], (one.lora_a, one.lora_b), strict=True):
            getattr(adapter, own).copy_(tensor)
