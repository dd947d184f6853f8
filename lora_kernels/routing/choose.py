"""Parts of routers: the best k, a limit on what an expert takes, experts left out at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapters import Site
from .base import Routes


def whole_top_k(site: Site, experts: int, default: int | None) -> int:
    """The option ``top_k``, at most the number of experts; all of them where it is ``None``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    if site.option("top_k", default) is None:
        return experts
    top_k = site.whole_option("top_k", default or experts)
    if top_k > experts:
        raise ValueError(f"method_options: top_k: expected 1 to {experts}, got {top_k}")
    return top_k


def share_option(site: Site, name: str, default: float) -> float:
    """An option that is a probability below 1.

    Raises:
        ValueError: it is none.
    """
    value = site.option(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"method_options: {name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def best(scores: Tensor, k: int, normalised: bool = True) -> Routes:
    """The k largest of softmax(scores), where ``normalised`` divided by their sum; or all, if k is E."""
    if k == scores.shape[-1]:
        return Routes(scores.softmax(-1))
    if normalised:
        top, ids = scores.topk(k, -1)
        return Routes(top.softmax(-1), ids)
    return Routes(*scores.softmax(-1).topk(k, -1))


def within_capacity(routes: Routes, experts: int, capacity: int) -> Routes:
    """The same without what an expert would have to take beyond its first ``capacity`` rows."""
    weights, ids = routes
    assert ids is not None
    flat = ids.reshape(-1)
    ones = flat[:, None] == torch.arange(experts, device=ids.device)
    place = ones.cumsum(0).gather(1, flat.clamp(min=0)[:, None]).view(ids.shape)
    fits = place <= capacity
    return Routes(torch.where(fits, weights, 0), torch.where(fits, ids, -1))


def capacity_of(factor: float, k: int, rows: int, experts: int) -> int:
    """⌈factor · k · rows / E⌉: what each expert would take of an even load, times ``factor``."""
    return math.ceil(factor * k * rows / experts)


def leave_out(scores: Tensor, p: float, least: int, lead: tuple[int, ...] = ()) -> Tensor:
    """−∞ for experts left out with probability p, for all rows or for each of ``lead``; ``least`` remain."""
    draw = torch.rand(*lead, scores.shape[-1], device=scores.device)
    kept = draw.topk(least, -1).values[..., -1:].clamp(max=p)
    out = draw < kept
    while out.dim() < scores.dim() and lead:
        out = out.unsqueeze(-2)
    return scores.masked_fill(out, -torch.inf)
