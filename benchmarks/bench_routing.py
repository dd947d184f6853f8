"""A training step of one linear with a mixture, beside our LoRA of the rank that a row uses and plain loops.

    top2       y = x Wᵀ + s Σ_{j in the best 2 of 8} w_j B_j A_j x          beside LoRA of r = 16
    dense      the same over all 8                                           beside LoRA of r = 64
    fusion     y_n = x_n Wᵀ + s (Σ_j w_nj B_j) (Σ_j w_nj A_j) x_n            beside LoRA of r = 8
    generated  y_n = x_n Wᵀ + s B A_n x_n, A_n of a network                  beside LoRA of r = 16

Experts have r = 8; W is frozen; gradients to x, the experts, the router and the weights.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.nn import LoRALinear, side_inputs

from .checks import errors, judge
from .measure import BOTH, SAVED_BYTES
from .suites import Benchmark, Goal, Plan, Provider, Runner

OP = "routing"
LORA, OURS, LOOP, ALL = "lora", "ours", "loop", "loop_all"
EXPERTS, TOP_K, RANK, SAMPLES = 8, 2, 8, 8
# Of LoRA beside it, and its method.
KINDS = {
    "top2": (TOP_K * RANK, "mixlora"),
    "dense": (EXPERTS * RANK, "loramoe"),
    "fusion": (RANK, "saml"),
    "generated": (2 * RANK, "vlora"),
}


@dataclass(frozen=True)
class Case:
    """One point: what is mixed, and the sizes of the linear."""

    kind: str
    rows: int = 512
    width: int = 1024
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.rows}x{self.width}x{self.width}/float32"

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.rows}x{self.width}x{self.width}, float32"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.rows}x{self.width}x{self.width}"
        return {"kind": self.kind, "shape": shape, "dtype": "float32", "rank": KINDS[self.kind][0]}


@dataclass(frozen=True)
class Problem:
    """What all providers share; ``given`` is what the call has beside x."""

    case: Case
    x: Tensor
    dy: Tensor
    layer: LoRALinear
    given: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def factors(self) -> tuple[Tensor, ...]:
        own = self.layer.adapters["default"].parameters()
        return (*(p for p in own if p.requires_grad), *self.given.values())


@functools.lru_cache(maxsize=2)
def make_problem(case: Case) -> Problem:
    """Random tensors off their start; y is of order one."""
    torch.manual_seed(0)
    rank, method = KINDS[case.kind]
    rank = rank if method == "vlora" else RANK
    options = {} if method == "vlora" else {"experts": EXPERTS}
    layer = LoRALinear(
        case.width, case.width, rank, 2 * rank, bias=False, method=method, method_options=options
    )
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.normal_(std=0.05)
    samples = case.kind in ("fusion", "generated")
    lead = (SAMPLES, case.rows // SAMPLES) if samples else (case.rows,)
    x, dy = (torch.randn(*lead, case.width, device=case.device) for _ in range(2))
    given = {
        "fusion": lambda: {"expert_weights": torch.rand(SAMPLES, EXPERTS)},
        "generated": lambda: {"vlora_A": torch.randn(SAMPLES, rank, case.width) * case.width**-0.5},
    }.get(case.kind, dict)()
    given = {name: t.to(case.device).requires_grad_() for name, t in given.items()}
    return Problem(case, x.requires_grad_(), dy, layer.to(case.device), given)


def _ours(problem: Problem) -> Runner:
    layer, given = problem.layer, dict(problem.given)
    if "vlora_A" in given:
        side: dict[str, Any] = {"vlora_A": {"": given["vlora_A"]}}
    else:
        side = given
    return Runner(layer, problem.factors, lambda: side_inputs(layer, **side))


def _lora(problem: Problem) -> Runner:
    width, rank = problem.case.width, KINDS[problem.case.kind][0]
    linear = nn.Linear(width, width, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    layer = LoRALinear.from_linear(linear, r=rank, lora_alpha=rank)
    nn.init.normal_(layer.adapters["default"].lora_B, std=0.05)
    return Runner(layer, tuple(layer.adapters.parameters()))


def _experts(one: Any) -> list[tuple[Tensor, Tensor]]:
    split = (slice(j * RANK, (j + 1) * RANK) for j in range(EXPERTS))
    return [(one.lora_A[part], one.lora_B[:, part]) for part in split]


def _on_all(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Every expert, or sample, by itself, on all its rows."""
    layer, one = problem.layer, problem.layer.adapters["default"]

    def mixture(x: Tensor) -> Tensor:
        weights = F.linear(x, one.router).softmax(-1)
        if problem.case.kind == "top2":
            top, ids = weights.topk(TOP_K, -1)
            weights = torch.zeros_like(weights).scatter(-1, ids, top / top.sum(-1, keepdim=True))
        y = F.linear(x, layer.weight)
        for j, (a, b) in enumerate(_experts(one)):
            y = y + weights[:, j, None] * (one.scaling * (x @ a.T @ b.T))
        return y

    def by_sample(x: Tensor) -> Tensor:
        ys = []
        for n, part in enumerate(x):
            if problem.case.kind == "fusion":
                w = problem.given["expert_weights"][n]
                a, b = (sum(w[j] * pair[i] for j, pair in enumerate(_experts(one))) for i in (0, 1))
            else:
                a, b = problem.given["vlora_A"][n], one.lora_B
            ys.append(F.linear(part, layer.weight) + one.scaling * (part @ a.T @ b.T))
        return torch.stack(ys)

    return by_sample if problem.given else mixture


def _loop_all(problem: Problem) -> Runner:
    return Runner(_on_all(problem), problem.factors)


def _loop(problem: Problem) -> Runner:
    """Expert after expert, each on the rows that chose it."""
    layer, one = problem.layer, problem.layer.adapters["default"]

    def call(x: Tensor) -> Tensor:
        top, ids = F.linear(x, one.router).softmax(-1).topk(TOP_K, -1)
        top = top / top.sum(-1, keepdim=True)
        y = F.linear(x, layer.weight)
        for j, (a, b) in enumerate(_experts(one)):
            rows, place = (ids == j).nonzero(as_tuple=True)
            part = one.scaling * (x[rows] @ a.T @ b.T)
            y = y.index_add(0, rows, top[rows, place, None] * part)
        return y

    return Runner(call, problem.factors)


def _chosen_alone(case: Case, mode: str) -> str | None:
    return None if case.kind == "top2" else "no rows are chosen"


def _outputs(runner: Runner, problem: Problem) -> tuple[Tensor, ...]:
    with runner.context():
        y = runner.call(problem.x)
        return (y.detach(), *torch.autograd.grad(y, (problem.x, *runner.factors), problem.dy))


def check(provider: Provider, case: Case) -> str | None:
    """Why the result is wrong, or ``None``: against the loop in fp64, twice its error in fp32."""
    if provider.name == LORA:
        return None
    problem = make_problem(case)
    given = {name: t.detach().double().requires_grad_() for name, t in problem.given.items()}
    x = problem.x.detach().double().requires_grad_()
    wide = Problem(case, x, problem.dy.double(), copy.deepcopy(problem.layer).double(), given)
    want = _outputs(_loop_all(wide), wide)
    eager = errors(_outputs(_loop_all(problem), problem), want)
    got = _outputs(provider.build(problem), problem)
    allowed = [max(2 * error, 8 * torch.finfo(torch.float32).eps) for error in eager]
    return judge(got, want, allowed, ("y", "dx", *(f"gradient {i}" for i in range(len(got) - 2))))


def plans(device: str, quick: bool) -> list[Plan]:
    """Each kind in the sizes of the figures."""
    sizes = {"rows": 32, "width": 64} if quick else {}
    cases = [Case(kind, **sizes, device=device) for kind in KINDS]
    return [Plan(case, mode.name, plotted=mode is BOTH) for case in cases for mode in (BOTH, SAVED_BYTES)]


def _goal(kind: str, base: str, limit: float) -> Goal:
    return Goal(f"`{kind}`, step / {base}", Case(kind).label, BOTH.name, base, limit, OURS)


BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(BOTH, SAVED_BYTES),
    providers=(
        Provider(LORA, _lora),
        Provider(OURS, _ours),
        Provider(LOOP, _loop, _chosen_alone),
        Provider(ALL, _loop_all),
    ),
    baselines={LORA: "our LoRA", LOOP: "loop over chosen rows", ALL: "loop over all"},
    problem=make_problem,
    check=check,
    goals=(
        _goal("top2", LORA, 1.25),
        _goal("top2", LOOP, 0.5),
        _goal("top2", ALL, 0.5),
        _goal("dense", LORA, 1.15),
        _goal("fusion", LORA, 1.25),
        _goal("generated", LORA, 1.10),
    ),
)
