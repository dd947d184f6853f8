"""A mixture's expert module with LoRA on its 3-D parameters, beside PEFT's ``target_parameters``.

    y_t = Σ_j w_tj · D_e (silu(G_e x_t) ⊙ U_e x_t),  e = index_tj        ΔW of rank 8 on [G; U] and on D

Mixtral's module of Transformers, whose products are torch's ``grouped_mm``, as in a model by default.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import errors, judge
from .measure import BACKWARD, BOTH, FORWARD, HOST_PEAK, SAVED_BYTES
from .providers import needs
from .suites import Benchmark, Goal, Plan, Provider, Runner

OP = "experts"
FROZEN, PEFT, OURS = "frozen", "peft", "ours"


@dataclass(frozen=True)
class Case:
    """One point: the mixture's sizes."""

    tokens: int = 512
    hidden: int = 512
    inner: int = 1024
    experts: int = 8
    top: int = 2
    rank: int = 8
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.inner}/e{self.experts}k{self.top}/float32/r{self.rank}"

    @property
    def title(self) -> str:
        shape = f"{self.tokens} tokens, {self.hidden}→{self.inner}→{self.hidden}"
        return f"{shape}, {self.experts} experts, top {self.top}, float32, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.tokens}x{self.hidden}x{self.inner}"
        return {"shape": shape, "experts": self.experts, "dtype": "float32", "rank": self.rank}


@dataclass(frozen=True)
class Problem:
    """What all providers share."""

    case: Case
    x: Tensor
    index: Tensor
    weights: Tensor
    weight: tuple[Tensor, Tensor]
    dy: Tensor


@functools.lru_cache(maxsize=1)
def make_problem(case: Case) -> Problem:
    """Random tensors; every token goes to ``top`` different experts."""
    torch.manual_seed(0)
    x, dy = (torch.randn(case.tokens, case.hidden) for _ in range(2))
    weights, index = torch.randn(case.tokens, case.experts).softmax(-1).topk(case.top)
    up = torch.randn(case.experts, 2 * case.inner, case.hidden) * case.hidden**-0.5
    down = torch.randn(case.experts, case.hidden, case.inner) * case.inner**-0.5
    return Problem(case, x.requires_grad_(), index, weights, (up, down), dy)


def _experts(problem: Problem) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    case = problem.case
    config = MixtralConfig(
        hidden_size=case.hidden, intermediate_size=case.inner, num_local_experts=case.experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, weight in zip(("gate_up_proj", "down_proj"), problem.weight, strict=True):
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return module


def _frozen(problem: Problem) -> Runner:
    module = _experts(problem)
    return Runner(lambda x: module(x, problem.index, problem.weights))


def _adapted(problem: Problem, ours: bool) -> Runner:
    import peft

    from lora_kernels import accelerate

    model = nn.ModuleDict({"experts": _experts(problem)})
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=problem.case.rank, lora_alpha=16, target_modules=[], target_parameters=targets)
    model = peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(1)
    factors = tuple(p for name, p in model.named_parameters() if "lora_" in name)
    for factor in factors:
        factor.data = torch.randn(factor.shape, generator=generator) * 0.05
    if ours:
        accelerate(model)
    layer: Any = model["experts"]
    return Runner(lambda x: layer(x, problem.index, problem.weights), factors)


def _outputs(runner: Runner, problem: Problem) -> tuple[Tensor, ...]:
    y = runner.call(problem.x)
    return (y.detach(), *torch.autograd.grad(y, (problem.x, *runner.factors), problem.dy))


@functools.lru_cache(maxsize=1)
def _bounds(case: Case) -> tuple[tuple[Tensor, ...], list[float]]:
    """In fp64, by the factors' own product, and twice PEFT's error."""
    problem = make_problem(case)
    runner = _adapted(problem, ours=False)
    eager = _outputs(runner, problem)
    exact = _exact(problem, runner.factors)
    return exact, [2 * error + 1e-6 for error in errors(eager, exact)]


def _exact(problem: Problem, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    case, wide = problem.case, [t.detach().double().requires_grad_() for t in (problem.x, *factors)]
    # PEFT nests the wrapper of down_proj inside that of gate_up_proj, or the other way: told by the sizes.
    x, *parts = wide
    made = {}
    for a, b in (parts[:2], parts[2:]):
        a_e = a.view(case.experts, -1, a.shape[1])
        b_e = b.view(b.shape[0], -1, case.experts).permute(2, 0, 1)
        made[b.shape[0]] = b_e @ a_e * (16 / case.rank)
    up = problem.weight[0].double() + made[2 * case.inner]
    down = problem.weight[1].double() + made[case.hidden]
    y = torch.zeros_like(x)
    for e in range(case.experts):
        token, at = torch.where(problem.index == e)
        gate, value = (x[token] @ up[e].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * value) @ down[e].T
        y = y.index_add(0, token, out * problem.weights[token, at, None])
    return (y.detach(), *torch.autograd.grad(y, wide, problem.dy.double()))


def _check(provider: Provider, case: Case) -> str | None:
    if provider.name == FROZEN:
        return None
    problem = make_problem(case)
    exact, allowed = _bounds(case)
    names = ("y", "dx", *(f"factor {i}" for i in range(4)))
    return judge(_outputs(provider.build(problem), problem), exact, allowed, names)


_MODES = (FORWARD, BACKWARD, BOTH, SAVED_BYTES, HOST_PEAK)


def _plans(device: str, quick: bool) -> list[Plan]:
    case = Case(tokens=32, hidden=16, inner=24) if quick else Case()
    return [Plan(case, mode.name) for mode in _MODES] if device == "cpu" else []


_missing = needs("transformers.integrations.moe")


BENCHMARK = Benchmark(
    op=OP,
    plans={"moe": _plans},
    modes=_MODES,
    providers=(
        Provider(FROZEN, _frozen, _missing),
        Provider(PEFT, functools.partial(_adapted, ours=False), _missing),
        Provider(OURS, functools.partial(_adapted, ours=True), _missing),
    ),
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=_check,
    goals=(
        Goal("the step against PEFT's", Case().label, "both", PEFT, 0.6, OURS),
        Goal("peak extra memory against PEFT's", Case().label, "peak_memory", PEFT, 0.2, OURS),
    ),
)
