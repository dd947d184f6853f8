"""What every mixture is: experts side by side, and a router that says which of them a row uses."""

from __future__ import annotations

import contextlib
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Adapter, Call, LowRank, Routed, Site, Start
from ..ops._inputs import autocasts
from ..ops.adapter_stack import AdapterStack

# Under this name a call keeps what each layer's router said.
ROUTES = "routes"


class Routes(NamedTuple):
    """A router's word: how much of which experts."""

    # w [..., k], for each row of x, or [samples, k].
    weights: Tensor
    # Which experts, of the same shape, -1 for none. None: all of them, in their order.
    ids: Tensor | None = None


class Router(Protocol):
    """What decides: from a layer's input and the side inputs of the call to :class:`Routes`."""

    def __call__(self, x: Tensor, call: Call) -> Routes:
        """For x ``[..., in_features]``."""


class Seen(NamedTuple):
    """What a layer's router said in a pass, for the losses: its scores ``[..., E]``, and the ids it chose."""

    scores: Tensor
    ids: Tensor | None


class Experts(Adapter):
    """y = x Wᵀ + b + s · Σ_j w_j (drop(x) A_jᵀ) B_jᵀ over the experts j, with the weights w of :meth:`route`

    A method of this folder is a subclass with a router. Expert j owns ``lora_A[j·r:(j + 1)·r]`` of
    ``[E·r, in]`` and ``lora_B[:, j·r:(j + 1)·r]`` of ``[out, E·r]``. Where a router chooses, the chosen
    experts alone are computed, and each has a dropout mask of its own; where it weighs all, they are one
    adapter of rank E·r with w as a gate on its ranks, and share a mask. With ``fusion`` the factors are
    averaged before they are multiplied, s · (Σ_j w_j B_j) (Σ_j w_j A_j).

    ``method_options``: ``experts``, E; ``batch_invariant``: in inference y is the same, bit for bit, whoever
    else is in the batch, where the router's weights are.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    options = frozenset({"experts", "batch_invariant"})
    plain, mergeable, reads_x = False, False, True
    # E where the config says nothing.
    count: ClassVar[int] = 8
    fusion: ClassVar[bool] = False

    def build(self, site: Site) -> Start:
        """A at random, B of zeros, and what the router starts with."""
        self.experts = site.whole_option("experts", self.count)
        self.batch_invariant = bool(site.option("batch_invariant", False, (True, False)))
        rank = self.experts * self.r
        # Its columns lie side by side, as the multi-adapter op reads them.
        lora_b = site.zeros(rank, site.out_features).T
        return Start(
            {"lora_A": site.kaiming(rank, site.in_features), "lora_B": lora_b, **self.router_start(site)}
        )

    def router_start(self, site: Site) -> dict[str, Tensor]:
        """The router's tensors by name; none of one that comes with the call."""
        return {}

    def filled(self) -> None:
        """Called when experts that were trained elsewhere were put here."""

    def route(self, x: Tensor, call: Call) -> Routes:
        """What makes a layer's :class:`Router` of it."""
        raise NotImplementedError(f"{type(self).__name__}: route")

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank | Routed:
        """The experts that the router chose, or all of them with a gate."""
        assert x is not None and call is not None
        weights, ids = self.route(x, call)
        if ids is None and not self.fusion and not self.batch_invariant:
            return LowRank(self.lora_A, self.lora_B, self.scaling, self.gate(weights, x))
        if ids is None:
            ids = torch.arange(self.experts, device=x.device).expand(weights.shape)
        return Routed(self.stack(), ids, weights, self.fusion, self.batch_invariant and not self.training)

    def gate(self, weights: Tensor, x: Tensor) -> Tensor:
        """A weight for each expert as a gate ``[..., E·r]`` on all ranks, for the rows of x."""
        gate = weights[..., None].expand(*weights.shape, self.r).flatten(-2)
        while gate.dim() < x.dim():
            gate = gate.unsqueeze(-2)
        return gate

    def stack(self) -> AdapterStack:
        """The experts as pages: expert j has r of them from j·r on."""
        device = self.lora_A.device
        pages = torch.arange(self.experts * self.r, dtype=torch.int32, device=device)
        spans = F.pad(pages[:: self.r, None], (0, 1), value=self.r)
        whole = torch.promote_types(self.lora_A.dtype, torch.float32)
        scalings = torch.full((self.experts,), self.scaling, dtype=whole, device=device)
        return AdapterStack(self.lora_A, self.lora_B.T.contiguous(), pages, spans, scalings, self.r)


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """x Rᵀ in the router's dtype, under autocast too: ``[..., E]``."""
    whole = torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()
    with whole:
        return F.linear(x.to(weight.dtype), weight)


def pooled(x: Tensor) -> Tensor:
    """The mean of each sample of x ``[samples, ..., in]``; a matrix has samples of one row."""
    if x.dim() == 2:
        return x
    tokens = x.flatten(1, -2)
    return tokens.sum(1) / max(1, tokens.shape[1])  # and 0 of none


def seen(call: Call) -> dict[str, Seen]:
    """What each layer's router said inside the block of ``call``, by the layer's name.

    Raises:
        ValueError: no layer with a router ran in it.

    Examples:
        >>> from lora_kernels.nn import side_inputs
        >>> config = LoRAConfig(r=2, target_modules="all-linear", method="mixlora")
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), config)
        >>> with side_inputs(model) as call:
        ...     y = model(torch.randn(3, 4))
        >>> list(seen(call))
        ['0']
    """
    found: dict[str, Seen] = call.get(ROUTES, {})
    if not found:
        raise ValueError("call: expected one whose layers had a router, got none; open it by side_inputs")
    return found
