"""A compressed model from its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.low_rank import LowRankLinear
from .decompose import CONVS
from .factors import check_model, put
from .tucker import tucker2_conv


def load_compressed(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Gives a plain model's layers the shapes and the tensors that they have in a compressed one's state dict

    For what :func:`lorap`, :func:`factorise` and `schedules.RankReducer` leave: linears of two
    factors or of fewer rows and columns, and convolutions in three parts.

    Args:
        model: as it was before it was compressed, whatever its weights; changed in place.
        state: ``compressed.state_dict()``.

    Raises:
        TypeError: no module, or no mapping.
        ValueError: the state is not that of this model, compressed; the model is then as it was.

    Examples:
        >>> small = factorise(nn.Sequential(nn.Linear(8, 8)), {"0": 2})
        >>> model = load_compressed(nn.Sequential(nn.Linear(8, 8)), small.state_dict())
    """
    check_model(model)
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
    layers = dict(model.named_modules())
    plan = {name: new for name, layer in layers.items() if (new := _shaped(name, layer, state)) is not None}
    for name, new in plan.items():
        put(model, name, new)
    want, got = {k: v.shape for k, v in model.state_dict().items()}, {k: v.shape for k, v in state.items()}
    if want != got:
        for name in plan:
            put(model, name, layers[name])
        key = next(key for key in {**want, **got} if want.get(key) != got.get(key))
        shapes = [tuple(one[key]) if key in one else None for one in (want, got)]
        raise ValueError(f"state: {key}: expected shape {shapes[0]} of the model, got {shapes[1]}")
    model.load_state_dict(state)
    return model


@torch.no_grad()
def _shaped(name: str, layer: Any, state: Mapping[str, Tensor]) -> nn.Module | None:
    """The layer in the shapes that the state has for it; ``None`` where it stays."""

    def of(part: str) -> Tensor:
        return state[f"{prefix}{part}"].to(layer.weight)

    prefix = f"{name}." if name else ""
    have = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    if type(layer) is nn.Linear and {"down", "up"} <= have:
        return LowRankLinear(of("down"), of("up"), layer.bias)
    if type(layer) is nn.Linear and "weight" in have and of("weight").shape != layer.weight.shape:
        rows, columns = of("weight").shape
        where: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        return nn.Linear(columns, rows, bias=layer.bias is not None, **where)
    if type(layer) in CONVS and {"0.weight", "1.weight", "2.weight"} <= have:
        return tucker2_conv(layer, of("1.weight"), of("2.weight").flatten(1), of("0.weight").flatten(1).T)
    return None
