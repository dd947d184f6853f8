"""Plans for three LoRA linears that share x, against three frozen ones and three of PEFT's.

    y_i = x W_iᵀ + s · drop_i(x) A_iᵀ B_iᵀ,  i = 1, 2, 3        W frozen; gradients to x, A and B

The three frozen linears' backward pass adds up three gradients of x, as autograd does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import lora_linear, lora_linear_group, use_backend

from . import providers
from .checks import MAX_ROWS_CPU, errors, judge
from .measure import BACKWARD, BOTH, FORWARD, PEAK_MEMORY, SAVED_BYTES
from .providers import FROZEN, PEFT, SCALING, Case, needs
from .suites import TRAINING, Benchmark, Goal, Plan, Provider, Runner

OP = "lora_linear_group"
MEMBERS = 3
TIMED = tuple(mode.name for mode in (FORWARD, BACKWARD, BOTH))
PROBE = 64


@dataclass(frozen=True)
class Problem:
    """Three problems of one linear that share ``x``; all weights and all dy as tuples."""

    case: Case
    x: Tensor
    singles: tuple[providers.Problem, ...]

    @property
    def weight(self) -> tuple[Tensor, ...]:
        return tuple(single.weight for single in self.singles)

    @property
    def dy(self) -> tuple[Tensor, ...]:
        return tuple(single.dy for single in self.singles)

    def factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        pairs = [single.factors() for single in self.singles]
        return [a for a, _ in pairs], [b for _, b in pairs]


def make_problem(case: Case) -> Problem:
    singles = [providers.make_problem(case, seed) for seed in range(MEMBERS)]
    return Problem(case, singles[0].x, tuple(singles))


def _frozen(problem: Problem) -> Runner:
    weights = problem.weight
    return Runner(lambda x: tuple(F.linear(x, weight) for weight in weights))


def _peft_layers(problem: Problem, build: Callable[[providers.Problem], Runner]) -> Runner:
    runners = [build(single) for single in problem.singles]
    factors = [runner.factors for runner in runners]
    return Runner(
        lambda x: tuple(runner.call(x) for runner in runners),
        (*(a for a, _ in factors), *(b for _, b in factors)),
    )


def _each(build: Callable[[providers.Problem], Runner]) -> Callable[[Problem], Runner]:
    return lambda problem: _peft_layers(problem, build)


def _ours(backend: str) -> Callable[[Problem], Runner]:
    def build(problem: Problem) -> Runner:
        weights, p = problem.weight, problem.case.dropout_p
        lora_as, lora_bs = problem.factors()

        def call(x: Tensor) -> tuple[Tensor, ...]:
            return lora_linear_group(x, weights, lora_as, lora_bs, SCALING, dropout_p=p)

        return Runner(call, (*lora_as, *lora_bs), lambda: use_backend(backend))

    return build


def _ours_singles(problem: Problem) -> Runner:
    weights, p = problem.weight, problem.case.dropout_p
    lora_as, lora_bs = problem.factors()

    def call(x: Tensor) -> tuple[Tensor, ...]:
        members = zip(weights, lora_as, lora_bs, strict=True)
        return tuple(lora_linear(x, *member, SCALING, dropout_p=p) for member in members)

    return Runner(call, (*lora_as, *lora_bs))


class _Projections(nn.Module):
    """A parent whose forward calls three linears on one x."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (single.linear() for single in problem.singles)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def _ours_module(problem: Problem) -> Runner:
    from lora_kernels import LoRAConfig, apply_lora

    case = problem.case
    options = {"r": case.rank, "lora_alpha": SCALING * case.rank, "lora_dropout": case.dropout_p}
    model = apply_lora(_Projections(problem), LoRAConfig(**options, target_modules="all-linear"))
    model.to(case.dtype).train()
    adapters = [model.get_submodule(f"{c}_proj").adapters["default"] for c in "qkv"]
    lora_as, lora_bs = problem.factors()
    for adapter, a, b in zip(adapters, lora_as, lora_bs, strict=True):
        adapter.lora_A, adapter.lora_B = a, b
    return Runner(model, (*lora_as, *lora_bs))


def outputs(runner: Runner, problem: Problem) -> tuple[Tensor, ...]:
    """Each y, the gradient of x, and those of each A and each B."""
    with runner.context():
        ys = runner.call(problem.x)
        inputs = (problem.x, *runner.factors)
        return (*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, problem.dy))


def oracle(problem: Problem, factors: bool) -> tuple[Tensor, ...]:
    """The same in fp64, by hand and without dropout; without ``factors`` of the frozen linears alone."""
    x, ys, das, dbs = problem.x.detach().double(), [], [], []
    dx = torch.zeros_like(x)
    for one in problem.singles:
        w, a, b, dy = (t.detach().double() for t in (one.weight, one.lora_a, one.lora_b, one.dy))
        h, dh = x @ a.T, SCALING * (dy @ b)
        ys.append(x @ w.T + (SCALING * (h @ b.T) if factors else 0))
        dx += dy @ w + (dh @ a if factors else 0)
        das.append(dh.T @ x)
        dbs.append(SCALING * (dy.T @ h))
    return (*ys, dx, *das, *dbs) if factors else (*ys, dx)


NAMES = ("y0", "y1", "y2", "dx", "dA0", "dA1", "dA2", "dB0", "dB1", "dB2")


@functools.lru_cache(maxsize=1)
def _reference(case: Case) -> tuple[Problem, tuple[Tensor, ...], tuple[Tensor, ...], list[float]]:
    problem = make_problem(case)
    want = oracle(problem, True)
    eager = errors(outputs(_each(providers._eager)(problem), problem), want)
    return problem, want, oracle(problem, False), eager


def check_values(provider: Provider, case: Case) -> str | None:
    """Why an output or a gradient is wrong without dropout, or ``None``."""
    rows = case.rows if case.device != "cpu" else min(case.rows, MAX_ROWS_CPU)
    problem, want, plain, eager = _reference(replace(case, rows=rows, dropout_p=0.0))
    runner = provider.build(problem)
    got = outputs(runner, problem)
    allowed = [max(2 * error, 4 * torch.finfo(case.dtype).eps) for error in eager]
    if runner.factors:
        return judge(got, want, allowed, NAMES)
    # Without the branch the values are smaller, and the same error is a larger part of the largest.
    larger = [float(w.abs().max() / p.abs().max()) for w, p in zip(want, plain, strict=False)]
    return judge(got, plain, [a * more for a, more in zip(allowed, larger, strict=False)], NAMES)


def check_dropout(provider: Provider, case: Case) -> str | None:
    """Why the dropout is wrong, or ``None``: with W = 0 and A = B = I each y is s · drop(x)."""
    case = replace(case, rows=8 * PROBE, cols=PROBE, out=PROBE, rank=PROBE)
    plain = make_problem(case)
    eye = torch.eye(PROBE, device=case.device, dtype=case.dtype)
    x = (plain.x.detach().abs() + 1).requires_grad_()
    given = {"x": x, "weight": torch.zeros_like(eye), "lora_a": eye, "lora_b": eye}
    singles = tuple(replace(one, **given, dy=one.dy.abs() + 1) for one in plain.singles)
    problem = Problem(case, x, singles)
    runner = provider.build(problem)
    if not runner.factors:
        return None
    torch.manual_seed(0)
    got, p = outputs(runner, problem), case.dropout_p
    keeps = [(y != 0).double() for y in got[:MEMBERS]]
    for keep in keeps:
        if abs(float(keep.mean()) - (1 - p)) > 5 * (p * (1 - p) / keep.numel()) ** 0.5:
            return f"dropout keeps {float(keep.mean()):.4f} of the elements, expected {1 - p:.4f}"
    if any(torch.equal(keeps[0], other) for other in keeps[1:]):
        return "two of the linears have the same dropout mask"
    scaled = [keep * SCALING / (1 - p) for keep in keeps]
    dx = sum(one.dy.double() * scale for one, scale in zip(singles, scaled, strict=True))
    want = (*(x.detach().double() * scale for scale in scaled), dx)
    return judge(got[: MEMBERS + 1], want, [16 * torch.finfo(case.dtype).eps] * len(want), NAMES)


def check(provider: Provider, case: Case) -> str | None:
    """Why ``provider`` must not be reported for ``case``, or ``None``."""
    wrong = check_values(provider, case)
    return wrong or (check_dropout(provider, case) if case.dropout_p else None)


def cpu_plans(device: str, quick: bool) -> list[Plan]:
    """The figures of a CPU, in a suite of their own."""
    if device != "cpu":
        return []
    rows, width = (32, 128) if quick else (512, 1024)
    plans = [Plan(Case(rows, width, width, dropout_p=p), mode) for p in (0.0, 0.1) for mode in TIMED]
    saved = (128, 256, 256) if quick else (8192, 4096, 4096)
    half = [Case(*saved, dtype=torch.bfloat16, dropout_p=p) for p in (0.1, 0.0)]
    return plans + [Plan(case, SAVED_BYTES.name) for case in half]


def training_plans(device: str, quick: bool) -> list[Plan]:
    """On a GPU: three square projections at the headline shape."""
    if device != "cuda":
        return []
    size = (256, 512, 512) if quick else (8192, 4096, 4096)
    cases = [Case(*size, dtype=torch.bfloat16, dropout_p=p, device="cuda") for p in (0.1, 0.0)]
    return [Plan(case, mode.name, priority=1) for case in cases for mode in (BOTH, PEAK_MEMORY)]


def _gpu(label: str, p: str) -> Goal:
    return Goal(label, f"8192x4096x4096/bfloat16/r16/p{p}", "both", FROZEN, 1.0, "ours_group_triton")


GOALS = (
    Goal("fwd+bwd, fp32, / frozen", "512x1024x1024/float32/r16/p0", "both", FROZEN, 1.02, "ours_group_cpp"),
    Goal(
        "bytes saved, bf16, dropout 0.1, / PEFT with a byte mask",
        *("8192x4096x4096/bfloat16/r16/p0.1", "saved_bytes", "peft_byte_mask", 0.30, "ours_group_cpp"),
    ),
    _gpu("fwd+bwd on a GPU, dropout 0.1, / frozen", "0.1"),
    _gpu("fwd+bwd on a GPU, / frozen", "0"),
)
_missing = providers._backend_missing
_byte_mask = next(provider for provider in providers.PROVIDERS if provider.name == "peft_byte_mask")

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: cpu_plans, TRAINING: training_plans},
    modes=(FORWARD, BACKWARD, BOTH, SAVED_BYTES, PEAK_MEMORY),
    providers=(
        Provider(FROZEN, _frozen),
        Provider("eager", _each(providers._eager)),
        Provider(PEFT, _each(providers._peft), needs("peft")),
        Provider("peft_byte_mask", _each(_byte_mask.build), _byte_mask.missing),
        Provider("ours_singles", _ours_singles),
        Provider("ours_group_reference", _ours("reference"), _missing("reference")),
        Provider("ours_group_cpp", _ours("cpp"), _missing("cpp")),
        Provider("ours_group_triton", _ours("triton"), _missing("triton")),
        Provider("ours_module", _ours_module),
    ),
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
