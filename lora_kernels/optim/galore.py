"""GaLore: W trains by a gradient of low rank, which a LoRA layer's backward pass gives as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..nn.pairs import Pair
from ._common import adamw_, check_adamw, check_count, check_number, evaluate, pairs_of, trainable
from ._vectors import leading_vectors

PROJECTIONS = ("std", "reverse_std", "right", "left", "full")


class GaLoreAdamW(Optimizer):
    """W ← W - η c · N(G Qᵀ) Q for out ≥ in, else W ← W - η c · P N(Pᵀ G); N: what AdamW makes of it

    GaLore (Zhao et al., 2024, arXiv 2403.03507). Q ``[r, in]`` (or P ``[out, r]``) holds the first singular
    vectors of G = ∂L/∂W, taken anew every ``update_proj_gap`` steps. Between those G is in memory nowhere:
    with A = Q frozen and B = 0 the gradient of B is s · G Qᵀ (with B = P and A = 0 that of A is s · Pᵀ G).
    So this trains the base weights of a model through its adapters: B (or A) is the step on its way into W,
    and zero between steps; the rank is the adapters'. A layer keeps h = x Aᵀ for its backward pass and, but
    for the steps that take new vectors, not x. Then one G at a time is in memory. The moments are
    not turned with the vectors, as in the paper's code. All else that trains gets AdamW.

    Afterwards ``remove_lora(model)`` gives the plain model of the trained weights. To go on later, save the
    model's state dict, which has the vectors, beside this one's. Where gradients are accumulated, the first
    backward pass after a step gives the new vectors. For one process: others would find other vectors.

    Args:
        model: one of :func:`apply_lora` or of PEFT, with linears whose adapters are still zero.
        lr: η.
        betas: of both moments.
        eps: ε, beside √v.
        weight_decay: λ, of W and all else, after the step.
        update_proj_gap: steps from one set of singular vectors to the next.
        scale: c.
        proj_type: ``std`` (as above), ``reverse_std`` (the other side), ``right`` (Q), ``left`` (P) or
            ``full``: W ← W - η c · P N(Pᵀ G Qᵀ) Q, whose moments are ``[r, r]``; P is in this one's state.
        correct_bias: whether the moments are corrected for their start at zero.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a layer is no linear over a dense weight, its adapter is not plain, drops out, has started
            to learn, is not alone or has a rank above both sides; or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        correct_bias: bool = True,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        check_count("update_proj_gap", update_proj_gap)
        check_number("scale", scale)
        if proj_type not in PROJECTIONS:
            raise ValueError(f"proj_type: expected one of {', '.join(PROJECTIONS)}, got {proj_type!r}")
        pairs = pairs_of(model)
        for pair in pairs:
            _check(pair, [other.layer for other in pairs])
        sites = [_BothSides(pair) if proj_type == "full" else _Site(pair, proj_type) for pair in pairs]
        factors = [factor for pair in pairs for factor in (pair.lora_a, pair.lora_b)]
        groups: list[dict[str, Any]] = [{"params": [site.moved for site in sites]}]
        groups.append({"params": trainable(model, factors)})
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options.update(update_proj_gap=update_proj_gap, scale=scale, correct_bias=correct_bias)
        super().__init__(groups, options)
        self._sites = {id(site.moved): site for site in sites}
        for site in sites:
            site.start()
        self._arm()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` gives."""
        loss = evaluate(closure)
        for site in self._sites.values():
            site.project()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in params]
            sites = [self._sites[id(p)] for p in params if id(p) in self._sites]
            if not sites:
                adamw_(params, [p.grad for p in params], states, group)
                continue
            grads = [site.moved.grad / site.pair.scaling for site in sites]
            # The factors are zero: what AdamW makes of them is the step.
            adamw_(params, grads, states, {**group, "weight_decay": 0.0})
            for site in sites:
                site.move_into_weight(group["scale"], group["lr"] * group["weight_decay"])
                site.keep(self.state[site.moved])
        self._arm()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, those of the factors too."""
        super().zero_grad(set_to_none)
        for site in self._sites.values():
            site.trained.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the moments back, and with them the step at which new vectors are due."""
        super().load_state_dict(state_dict)
        for site in self._sites.values():
            site.take_back(self.state.get(site.moved, {}))
        self._arm()

    def _arm(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._sites:
                    due = self.state.get(parameter, {}).get("step", 0) % group["update_proj_gap"] == 0
                    self._sites[id(parameter)].arm(due)


class _Site:
    """A layer: which factor holds the vectors, which takes the gradient, and G while it is needed."""

    def __init__(self, pair: Pair, proj_type: str) -> None:
        self.pair = pair
        tall = pair.lora_b.shape[0] >= pair.lora_a.shape[1]
        self.right = {"std": tall, "reverse_std": not tall}.get(proj_type, proj_type == "right")
        sides = (pair.lora_a, pair.lora_b) if self.right else (pair.lora_b, pair.lora_a)
        self.vectors, self.trained = sides
        # What AdamW moves.
        self.moved = self.trained
        self.gradient: Tensor | None = None
        self.handle: RemovableHandle | None = None

    @torch.no_grad()
    def start(self) -> None:
        """The one factor frozen, the other zero and watched."""
        self.vectors.requires_grad_(False)
        self.vectors.grad = None
        self.trained.zero_()
        self.trained.requires_grad_(True)
        self.trained.register_post_accumulate_grad_hook(self._take_vectors)

    def arm(self, due: bool) -> None:
        """Whether the next backward pass takes new vectors. No hook stays where it is not."""
        if self.handle is not None and not due:
            self.handle.remove()
            self.handle = None
        if self.handle is None and due:
            self.handle = self.pair.layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if torch.is_grad_enabled() and y.requires_grad:
            x = args[0].detach()
            y.register_hook(lambda dy: self._add(dy, x))

    def _add(self, dy: Tensor, x: Tensor) -> None:
        gradient = dy.flatten(0, -2).T @ x.flatten(0, -2).to(dy.dtype)
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)

    @torch.no_grad()
    def _take_vectors(self, trained: Tensor) -> None:
        """Called with the layer's whole gradient: its vectors, and the gradient in them."""
        if self.gradient is None:
            return
        gradient, self.gradient = self.gradient.to(trained.dtype), None
        found = self.turn(gradient)
        projected = gradient @ found.T if self.right else found.T @ gradient
        trained.grad = projected.mul_(self.pair.scaling)
        self.arm(False)
        # Where A and B are two nodes of the graph, the one that holds the vectors may still be needed.
        engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        engine.queue_callback(lambda: self._place(found))

    @torch.no_grad()
    def _place(self, found: Tensor) -> None:
        """Called at the end of the backward pass."""
        self.vectors.copy_(found)

    def turn(self, gradient: Tensor) -> Tensor:
        """The vectors of a gradient."""
        return leading_vectors(gradient, self.pair.rank, self.right)

    def project(self) -> None:
        """The gradient of what AdamW moves, from that of the factor."""

    def keep(self, state: dict[str, Any]) -> None:
        """Notes what the model's state does not have."""

    def take_back(self, state: dict[str, Any]) -> None:
        """Undoes :meth:`keep`."""

    def move_into_weight(self, scale: float, decay: float) -> None:
        """W ← (1 - λη) (W + c B A), and the trained factor is zero again."""
        weight: Any = self.pair.weight
        if weight.dtype == self.trained.dtype:
            weight.addmm_(self.pair.lora_b, self.pair.lora_a, alpha=scale)
        else:
            weight.add_(self.pair.lora_b @ self.pair.lora_a, alpha=scale)
        if decay:
            weight.mul_(1 - decay)
        self.trained.zero_()


class _BothSides(_Site):
    """A = Q, and B is P C on its way into W; AdamW moves C ``[r, r]``."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair, "right")
        self.moved = nn.Parameter(self.trained.new_zeros(pair.rank, pair.rank))
        self.outer = torch.zeros_like(self.trained)

    def turn(self, gradient: Tensor) -> Tensor:
        self.outer = leading_vectors(gradient, self.pair.rank, False).contiguous()
        return super().turn(gradient)

    def project(self) -> None:
        if self.trained.grad is not None:
            self.moved.grad = self.outer.T @ self.trained.grad
            self.trained.grad = None

    def keep(self, state: dict[str, Any]) -> None:
        state["outer"] = self.outer

    def take_back(self, state: dict[str, Any]) -> None:
        self.outer = state.get("outer", self.outer)

    def move_into_weight(self, scale: float, decay: float) -> None:
        self.trained.copy_(self.outer @ self.moved)
        super().move_into_weight(scale, decay)
        self.moved.zero_()


def _check(pair: Pair, layers: list[nn.Module]) -> None:
    """Raises where W cannot train through this adapter."""
    base: Any = pair.base
    out, in_features = pair.lora_b.shape[0], pair.lora_a.shape[1]
    if pair.weight is None or pair.is_embedding or base.weight.dim() != 2:
        raise ValueError(f"model: {pair.name}: expected a linear over a dense weight, got {base}")
    if sum(layer is pair.layer for layer in layers) > 1:
        raise ValueError(f"model: {pair.name}: expected one active adapter, got several")
    if not pair.plain:
        raise ValueError(f"model: {pair.name}: expected an adapter that is s · B A and no more, got another")
    if pair.dropout_p:
        raise ValueError(f"lora_dropout: {pair.name}: expected 0, got {pair.dropout_p:g}")
    if pair.lora_a.count_nonzero() and pair.lora_b.count_nonzero():
        raise ValueError(f"model: {pair.name}: expected an adapter that is still zero, got one that is not")
    if pair.rank > min(out, in_features):
        raise ValueError(f"r: {pair.name}: expected at most {min(out, in_features)}, got {pair.rank}")
