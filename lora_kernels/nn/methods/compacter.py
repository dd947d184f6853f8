"""Compacter: bottleneck adapters whose two projections are sums of Kronecker products."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_RULE_STD = 1e-4


def phm(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H, H = Σ_i R_i ⊗ (L_i T_i) ``[in, out]``, in two products with n k columns; H is not made

    Args:
        x: ``[..., in]``.
        rule: R ``[n, n, n]``.
        left: L ``[n, in/n, k]``.
        right: T ``[n, k, out/n]``.
    """
    n, part, k = left.shape
    u = x.reshape(-1, n, part) @ left.transpose(0, 1).reshape(part, n * k)
    v = torch.einsum("taik,iab->tbik", u.unflatten(2, (n, k)), rule)
    y = v.flatten(2) @ right.reshape(n * k, -1)
    return y.reshape(*x.shape[:-1], n * y.shape[-1])


class PHMLinear(nn.Module):
    """y = x Σ_i R_i ⊗ (L_i T_i) + b

    A parametrised hypercomplex layer (Zhang et al., 2021, arXiv 2102.08597) of k (in + out) + out numbers
    beside the rule R ``[n, n, n]``, which layers may share. L and T start Xavier-uniform with gain √2, R at
    N(0, 10⁻⁸) and b at 0.

    Args:
        in_features: of x.
        out_features: of y.
        n: how many terms; it divides both.
        rank: k, of L_i T_i.
        rule: R of another layer, or ``None`` for one of its own.
        bias: whether there is a b.
        device: of all parameters.
        dtype: of all parameters.

    Raises:
        ValueError: n does not divide both sizes, a rank below 1, or a rule of another shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 4,
        rank: int = 1,
        rule: nn.Parameter | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, n, rank, rule)
        where: Any = {"device": device, "dtype": dtype}
        self.rule = new_rule(n, **where) if rule is None else rule
        self.left = nn.Parameter(torch.empty(n, in_features // n, rank, **where))
        self.right = nn.Parameter(torch.empty(n, rank, out_features // n, **where))
        self.bias = nn.Parameter(torch.zeros(out_features, **where)) if bias else None
        for factor in (*self.left.detach(), *self.right.detach()):
            nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in_features]``."""
        y = phm(x, self.rule, self.left, self.right)
        return y if self.bias is None else y + self.bias


class CompacterAdapter(nn.Module):
    """y = h + up(gelu(down(h))), down and up PHM layers, d = features / reduction in between

    Compacter (Karimi Mahabadi et al., 2021, arXiv 2106.04647): behind a sublayer. h and y are
    ``[..., features]``. It starts within rounding of h, as its rule is near zero.

    Args:
        features: of h.
        reduction: features over d.
        n: terms of each PHM layer.
        rank: k.
        rule: the rule that all adapters of a model share; ``None`` for one of its own.
        device: of all parameters.
        dtype: of all parameters.

    Raises:
        ValueError: ``reduction`` does not divide ``features``, or as of :class:`PHMLinear`.
    """

    def __init__(
        self,
        features: int,
        reduction: int = 32,
        n: int = 4,
        rank: int = 1,
        rule: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction < 1 or features % reduction:
            raise ValueError(f"reduction: expected a divisor of features = {features}, got {reduction}")
        inner, where = features // reduction, {"device": device, "dtype": dtype}
        self.down = PHMLinear(features, inner, n, rank, rule, **where)  # type: ignore[arg-type]
        self.up = PHMLinear(inner, features, n, rank, self.down.rule, **where)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        """y for h ``[..., features]``."""
        return h + self.up(F.gelu(self.down(h), approximate="tanh"))


def insert_compacter(
    model: nn.Module, target_modules: list[str], reduction: int = 32, n: int = 4, rank: int = 1
) -> nn.Parameter:
    """Puts a :class:`CompacterAdapter` behind linears, all on one rule, and trains these and the LayerNorms

    The linears are those whose dotted names end in one of ``target_modules``: the last ones of the attention
    and of the MLP sublayers for Compacter, of the MLPs alone for Compacter++. An adapter is its linear's
    ``compacter`` and acts in a hook on it.

    Returns:
        The rule.

    Raises:
        ValueError: nothing matches, a match has a ``compacter`` or is no linear, or an option does not fit.
            The model is then as it was.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> rule = insert_compacter(model, ["0"], reduction=2, n=2)
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if any(name == end or name.endswith(f".{end}") for end in target_modules)
    }
    if not found:
        raise ValueError(f"target_modules: expected ends of names of linears, got {target_modules}")
    rule = None
    made = []
    for name, module in found.items():
        if not isinstance(module, nn.Linear) or hasattr(module, "compacter"):
            raise ValueError(f"target_modules: expected linears without a compacter, got {name}")
        where: Any = {"device": module.weight.device, "dtype": module.weight.dtype}
        adapter = CompacterAdapter(module.out_features, reduction, n, rank, rule, **where)
        rule = adapter.down.rule
        made.append((module, adapter))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.requires_grad_(True)
    for module, adapter in made:
        module.add_module("compacter", adapter)
        module.register_forward_hook(_behind)
    return rule


def _behind(module: Any, args: Any, output: Tensor) -> Tensor:
    return module.compacter(output)


def new_rule(n: int, **where: Any) -> nn.Parameter:
    """R ``[n, n, n]`` at its start, for :class:`PHMLinear` layers to share."""
    return nn.Parameter(torch.empty(n, n, n, **where).normal_(std=_RULE_STD))


def _check(in_features: int, out_features: int, n: int, rank: int, rule: Tensor | None) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if n < 1 or size % n:
            raise ValueError(f"n: expected a divisor of {name} = {size}, got {n}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if rule is not None and rule.shape != (n, n, n):
        raise ValueError(f"rule: expected shape {(n, n, n)}, got {tuple(rule.shape)}")
