"""The forward of Transformers' expert modules with LoRA on their 3-D parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.expert_lora import ExpertFactors
from ..ops.grouped_lora_linear import grouped_lora_linear


class Routing(NamedTuple):
    """The (token, expert) pairs in the order of their experts."""

    # The place of each sorted pair among those of `index`, and of each of those among the sorted.
    order: Tensor
    place: Tensor
    # Where each expert's pairs begin [E + 1].
    offsets: Tensor

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Routing:
        """Of the experts ``[tokens, k]`` that each token goes to; ids from ``experts`` on are nobody's."""
        ids, order = torch.sort(index.reshape(-1), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=order.device)
        offsets = torch.searchsorted(ids, torch.arange(experts + 1, device=ids.device, dtype=ids.dtype))
        return cls(order, place, offsets)


def experts_forward(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, factors: Mapping[str, ExpertFactors]
) -> Tensor:
    """Σ_j w_tj · D_e act(U_e x_t) over the experts e = index_tj, with LoRA on the parameters in ``factors``.

    ``module`` is one that :func:`why_not_experts` knows; x ``[tokens, hidden]``, index and weights
    ``[tokens, k]``.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _experts_forward(module, x, index, weights, factors)


def _experts_forward(
    module: Any, x: Tensor, index: Tensor, weights: Tensor, factors: Mapping[str, ExpertFactors]
) -> Tensor:
    routing, k = Routing.of(index, module.num_experts), index.shape[1]
    rows = x.to(module.down_proj.dtype).index_select(0, routing.order // k)
    inner = _project(module, "gate_up_proj" if module.has_gate else "up_proj", rows, routing, factors)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    y = _project(module, "down_proj", inner, routing, factors)
    dtype = torch.promote_types(y.dtype, weights.dtype)
    y = y.index_select(0, routing.place).view(*index.shape, y.shape[-1])
    return (weights.to(dtype).unsqueeze(1) @ y.to(dtype)).squeeze(1).to(x.dtype)


def _project(
    module: Any, name: str, rows: Tensor, routing: Routing, factors: Mapping[str, ExpertFactors]
) -> Tensor:
    weight = getattr(module, name)
    weight = weight.mT if module.is_transposed else weight
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if name in factors:
        lora_a, lora_b, scaling = factors[name]
    else:  # rank 0: the product of the base alone
        lora_a = weight.new_empty(weight.shape[0], 0, weight.shape[2])
        lora_b, scaling = weight.new_empty(*weight.shape[:2], 0), 1.0
    return grouped_lora_linear(rows, weight, lora_a, lora_b, routing.offsets, scaling, bias)


_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")
# Those of Transformers that compute what ours does, each in its way.
_KNOWN = (None, "eager", "batched_mm", "grouped_mm")


def why_not_experts(module: Any) -> str | None:
    """Why :func:`experts_forward` does not compute what a module does, or ``None``."""
    kind = getattr(type(module), "base_type", type(module))  # below a layer with adapters
    decorated = hasattr(kind.forward, "__wrapped__") and hasattr(kind, "_apply_gate")
    if not decorated or not all(hasattr(module, flag) for flag in _FLAGS):
        return f"{kind.__module__}.{kind.__name__} is not one of Transformers' expert modules"
    if "forward" in vars(module):
        return "the forward of its experts was replaced"
    way = getattr(module.config, "_experts_implementation", None)
    if way not in _KNOWN:
        return f"its experts run by {way!r}"
    if getattr(module, "_is_expert_parallel", False) or type(module.down_proj).__name__ == "DTensor":
        return "its experts are split over processes"
    return "its experts have a norm" if getattr(module, "has_post_expert_norm", False) else None


def is_routed(args: tuple[Any, ...]) -> bool:
    """Whether these are x, the experts of each token and their weights."""
    if len(args) != 3 or not all(isinstance(one, Tensor) for one in args):
        return False
    x, index, weights = args
    return x.dim() == 2 and index.dim() == 2 and index.shape == weights.shape and len(x) == len(index)
