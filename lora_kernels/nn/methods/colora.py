"""CoLoRA: solutions of a family of equations, whose low-rank part a small network moves through time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.lora_linear import lora_linear


class CoLoRALinear(nn.Linear):
    """y = x Wᵀ + b + B diag(a) A x

    CoLoRA (Berman and Peherstorfer, 2024, arXiv 2402.14646). W, A ``[r, in]`` (LeCun-normal), B ``[out, r]``
    and b (zeros) all train; the gate a comes with the call, one number or r for each row of x. In the base
    net, a = 0, B and A do nothing.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int = 3, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype)
        like = self.weight
        self.lora_A = nn.Parameter(like.new_empty(r, in_features))
        self.lora_B = nn.Parameter(like.new_zeros(out_features, r))
        for one in (self.weight, self.lora_A):
            nn.init.normal_(one, std=1 / math.sqrt(in_features))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """y for x ``[..., in]`` and a ``[..., 1]`` or ``[..., r]``, which broadcasts to the rows of x."""
        gate = gate.expand(*x.shape[:-1], gate.shape[-1])
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, 1.0, self.bias, gate=gate)


class Periodic(nn.Module):
    """y_j = mean over d of a_jd cos(2π x_d / period + φ_jd), plus b_j"""

    def __init__(
        self, in_features: int, out_features: int, period: float, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.period = period
        shape = out_features, in_features
        self.amplitude = nn.Parameter(torch.randn(*shape, dtype=dtype))
        self.phase = nn.Parameter(torch.randn(*shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out]`` for x ``[..., in]``."""
        waves = torch.cos(2 * math.pi / self.period * x[..., None, :] + self.phase)
        return (self.amplitude * waves).mean(-1) + self.bias


class CoLoRANet(nn.Module):
    """u(x; a_1 … a_L), a = h(μ, t): a net of :class:`CoLoRALinear` layers and the network h of their gates

    Berman and Peherstorfer, 2024, arXiv 2402.14646. x goes through :class:`Periodic` where there is a
    ``period``, else through a linear; then L layers, the last of them to ``outputs``, with SiLU between. h is
    three linears of width 15 and gives L numbers, or with ``full`` r for each layer. That is all that changes
    with (μ, t): :meth:`at` takes the gates themselves, and :func:`evolve_gates` finds them by the equation.
    """

    def __init__(
        self,
        space: int,
        parameters: int,
        outputs: int = 1,
        *,
        width: int = 25,
        depth: int = 8,
        r: int = 3,
        full: bool = False,
        period: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if period is None:
            self.first: nn.Module = nn.Linear(space, width, dtype=dtype)
        else:
            self.first = Periodic(space, width, period, dtype=dtype)
        sizes = [width] * depth + [outputs]
        self.layers = nn.ModuleList(CoLoRALinear(i, o, r, dtype=dtype) for i, o in itertools.pairwise(sizes))
        self.gates = depth, r if full else 1
        hidden = [
            nn.Linear(parameters, 15, dtype=dtype),
            nn.SiLU(),
            nn.Linear(15, 15, dtype=dtype),
            nn.SiLU(),
        ]
        self.hyper = nn.Sequential(*hidden, nn.Linear(15, math.prod(self.gates), dtype=dtype))

    def forward(self, x: Tensor, mu_t: Tensor) -> Tensor:
        """u ``[..., points, outputs]`` at x ``[..., points, space]`` for (μ, t) ``[..., parameters]``."""
        return self.at(x, self.hyper(mu_t).unflatten(-1, self.gates))

    def at(self, x: Tensor, gates: Tensor) -> Tensor:
        """u for gates ``[..., L, 1 or r]``."""
        y = self.first(x)
        for i, layer in enumerate(self.layers):
            y = layer(F.silu(y) if i else y, gates[..., i, None, :])
        return y


Rate = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def evolve_gates(net: CoLoRANet, gates: Tensor, rate: Rate, x: Tensor, times: Sequence[float]) -> Tensor:
    """ȧ = argmin ‖J ȧ - f(x, u(·; a))‖, J = ∂u(x; a)/∂a, by Runge and Kutta's fourth-order steps

    CoLoRA's equation mode (Berman and Peherstorfer, 2024, arXiv 2402.14646): no network of the gates, but
    the equation ∂u/∂t = f itself at the points x (a Neural Galerkin scheme; the authors' program has none,
    and this is written from the formula).

    Args:
        net: of which the gates alone move.
        gates: a at the first time, ``[L, 1 or r]``.
        rate: f, ``rate(u, x)`` for the function u and the points; it may differentiate u.
        x: ``[points, space]``, at least as many numbers of u as of gates.
        times: of which each but the first is a step's end.

    Returns:
        The gates at each time ``[times, L, 1 or r]``.

    Raises:
        ValueError: the gates are of another shape, or a rate of another than u.

    Examples:
        >>> net, start = CoLoRANet(1, 0, width=4, depth=2), torch.full((2, 1), 0.1)
        >>> gates = evolve_gates(net, start, lambda u, x: -u(x), torch.rand(6, 1), [0.0, 0.1])
    """
    if tuple(gates.shape) not in {(net.gates[0], width) for width in (1, net.gates[1])}:
        raise ValueError(f"gates: expected shape {net.gates}, got {tuple(gates.shape)}")
    found = [gates.detach()]
    for start, end in itertools.pairwise(times):
        found.append(_runge_kutta(lambda a: _velocity(net, a, rate, x), found[-1], end - start))
    return torch.stack(found)


def _velocity(net: CoLoRANet, gates: Tensor, rate: Rate, x: Tensor) -> Tensor:
    wanted = rate(lambda points: net.at(points, gates), x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda a: net.at(x, a), gates)
    if wanted.shape != jacobian.shape[: wanted.dim()]:
        raise ValueError(
            f"rate: expected the shape of u, {tuple(jacobian.shape[:2])}, got {tuple(wanted.shape)}"
        )
    matrix = jacobian.reshape(wanted.numel(), gates.numel())
    return (torch.linalg.pinv(matrix) @ wanted.flatten()).view_as(gates)


def _runge_kutta(velocity: Callable[[Tensor], Tensor], a: Tensor, step: float) -> Tensor:
    first = velocity(a)
    second = velocity(a + step / 2 * first)
    third = velocity(a + step / 2 * second)
    last = velocity(a + step * third)
    return a + step / 6 * (first + 2 * second + 2 * third + last)
