"""Plans for one DoRA linear against PEFT's.

    y = x Wᵀ + (c - 1) ⊙ (d Wᵀ) + c ⊙ (s d Aᵀ Bᵀ),  d = drop(x),  c = m / ‖W + s B A‖ by row

W frozen; gradients to x, A, B and m.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_kernels import dora_linear, use_backend
from lora_kernels._arguments import DoraInputs
from lora_kernels.reference.dora_linear import composite

from . import providers
from .checks import MAX_ROWS_CPU, errors, judge, outputs
from .measure import BACKWARD, BOTH, FORWARD, PEAK_MEMORY, SAVED_BYTES
from .providers import FROZEN, PEFT, SCALING, Case, needs
from .suites import TRAINING, Benchmark, Goal, Plan, Provider, Runner

OP = "dora_linear"
NAMES = ("y", "dx", "dA", "dB", "dm")
TIMED = tuple(mode.name for mode in (FORWARD, BACKWARD, BOTH))
PROBE = 64


@dataclass(frozen=True)
class Problem(providers.Problem):
    """A LoRA problem with the lengths of the adapted weight's rows."""

    magnitude: Tensor

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (*self.factors(), nn.Parameter(self.magnitude.clone()))


def row_norms(problem: providers.Problem) -> Tensor:
    """‖W + s B A‖ by row, in fp64."""
    w, a, b = (t.detach().double() for t in (problem.weight, problem.lora_a, problem.lora_b))
    return (w + SCALING * b @ a).norm(dim=1)


def make_problem(case: Case) -> Problem:
    """c between 1/2 and 3/2."""
    plain = providers.make_problem(case)
    share = torch.linspace(0.5, 1.5, case.out, device=case.device, dtype=torch.float64)
    return Problem(**vars(plain), magnitude=(row_norms(plain) * share).to(case.dtype))


def _frozen(problem: Problem) -> Runner:
    return Runner(problem.linear())


def _eager(problem: Problem) -> Runner:
    a, b, m = problem.parameters()
    weight = problem.weight

    def call(x: Tensor) -> Tensor:
        scale = m / torch.linalg.norm(weight + SCALING * (b @ a), dim=1).detach()
        return composite(DoraInputs(x, weight, a, b, scale, scaling=SCALING))

    return Runner(call, (a, b, m))


def _peft_layer(problem: Problem) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    case = problem.case
    options = {"r": case.rank, "lora_alpha": int(SCALING * case.rank), "lora_dropout": case.dropout_p}
    config = LoraConfig(**options, target_modules=["linear"], use_dora=True)
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": problem.linear()})).linear
    a, b, m = problem.parameters()
    layer.lora_A.default.weight, layer.lora_B.default.weight = a, b
    layer.lora_magnitude_vector.default.weight = m
    return layer.train()


def _peft_runner(layer: nn.Module) -> Runner:
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return Runner(layer, tuple(part.default.weight for part in parts))


def _peft(problem: Problem) -> Runner:
    return _peft_runner(_peft_layer(problem))


def _ours_in_peft(problem: Problem) -> Runner:
    from lora_kernels.integrations.peft import accelerate

    layer = _peft_layer(problem)
    accelerate(nn.ModuleDict({"linear": layer}))
    return _peft_runner(layer)


def _ours(backend: str) -> Callable[[Problem], Runner]:
    def build(problem: Problem) -> Runner:
        a, b, m = problem.parameters()
        weight, p = problem.weight, problem.case.dropout_p
        return Runner(
            lambda x: dora_linear(x, weight, a, b, m, SCALING, dropout_p=p),
            (a, b, m),
            lambda: use_backend(backend),
        )

    return build


def _ours_module(problem: Problem) -> Runner:
    from lora_kernels.nn import LoRALinear

    case = problem.case
    options = {"r": case.rank, "lora_alpha": SCALING * case.rank, "lora_dropout": case.dropout_p}
    layer = LoRALinear.from_linear(problem.linear(), use_dora=True, **options).to(case.dtype).train()
    adapter = layer.adapters["default"]
    adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector = problem.parameters()
    return Runner(layer, tuple(adapter.parameters()))


@functools.lru_cache(maxsize=1)
def _reference(case: Case) -> tuple[Problem, tuple[Tensor, ...], tuple[Tensor, ...], list[float]]:
    """The problem, its results in fp64 with and without the adapter, and eager's errors."""
    problem = make_problem(case)
    x, w, a, b, dy = (
        t.detach().double() for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b, problem.dy)
    )
    norm = row_norms(problem)
    z = x @ (w + SCALING * b @ a).T
    scale = problem.magnitude.double() / norm
    dz = dy * scale
    h, dh = x @ a.T, SCALING * (dz @ b)
    want = (z * scale, dz @ w + dh @ a, dh.T @ x, SCALING * (dz.T @ h), (dy * z).sum(0) / norm)
    eager = errors(outputs(_eager(problem), problem.x, problem.dy), want)
    return problem, want, (x @ w.T, dy @ w), eager


def check_values(provider: Provider, case: Case) -> str | None:
    """Why the output or a gradient is wrong without dropout, or ``None``."""
    rows = case.rows if case.device != "cpu" else min(case.rows, MAX_ROWS_CPU)
    problem, want, plain, eager = _reference(replace(case, rows=rows, dropout_p=0.0))
    runner = provider.build(problem)
    got = outputs(runner, problem.x, problem.dy)
    allowed = [max(2 * error, 4 * torch.finfo(case.dtype).eps) for error in eager]
    return judge(got, want if runner.factors else plain, allowed, NAMES)


def check_dropout(provider: Provider, case: Case) -> str | None:
    """Why the dropout is wrong, or ``None``: with W = I, B = 0 and m = 2 it shows, as y = x + drop(x)."""
    case = replace(case, rows=8 * PROBE, cols=PROBE, out=PROBE)
    plain = make_problem(case)
    eye = torch.eye(PROBE, device=case.device, dtype=case.dtype)
    x = (plain.x.detach().abs() + 1).requires_grad_()
    given = {"x": x, "dy": plain.dy.abs() + 1, "weight": eye, "lora_b": torch.zeros_like(plain.lora_b)}
    problem = replace(plain, **given, magnitude=torch.full_like(plain.magnitude, 2.0))
    runner = provider.build(problem)
    if not runner.factors:
        return None
    torch.manual_seed(0)
    y, dx, *_, dm = outputs(runner, problem.x, problem.dy)
    keep = (y - x.detach()) > 0.5
    rate, p = float(keep.double().mean()), case.dropout_p
    if abs(rate - (1 - p)) > 5 * (p * (1 - p) / keep.numel()) ** 0.5:
        return f"dropout keeps {rate:.4f} of the elements, expected {1 - p:.4f}"
    wide, dy = x.detach().double(), problem.dy.double()
    dropped = wide * keep / (1 - p)
    want = (wide + dropped, dy * (1 + keep.double() / (1 - p)), (dy * dropped).sum(0))
    bound = 16 * torch.finfo(case.dtype).eps
    return judge((y, dx, dm), want, [bound] * 3, ("y", "dx", "dm"))


def check(provider: Provider, case: Case) -> str | None:
    """Why ``provider`` must not be reported for ``case``, or ``None``."""
    wrong = check_values(provider, case)
    return wrong or (check_dropout(provider, case) if case.dropout_p else None)


def cpu_plans(device: str, quick: bool) -> list[Plan]:
    """The figures of a CPU, in a suite of their own."""
    if device != "cpu":
        return []
    sizes = ((32, 128, 128),) if quick else ((512, 2048, 2048), (128, 2048, 2048))
    cases = [Case(*size, dropout_p=p) for size in sizes for p in (0.0, 0.1)]
    plans = [Plan(case, mode) for case in cases for mode in TIMED]
    return plans + [Plan(case, SAVED_BYTES.name) for case in cases[:2]]


def training_plans(device: str, quick: bool) -> list[Plan]:
    """On a GPU: Llama-3-8B's square projection and its widest, both with and without dropout."""
    if device != "cuda":
        return []
    rows, widths = (256, ((512, 512),)) if quick else (8192, ((4096, 4096), (4096, 14336)))
    cases = [
        Case(rows, k, n, dtype=torch.bfloat16, dropout_p=p, device="cuda")
        for k, n in widths
        for p in (0.1, 0.0)
    ]
    modes = (BOTH.name, PEAK_MEMORY.name)
    return [Plan(case, mode, priority=3) for case in cases for mode in modes]


GOALS = tuple(
    Goal(
        f"fwd+bwd, fp32, dropout {p}, / PEFT",
        f"512x2048x2048/float32/r16/p{p}",
        "both",
        PEFT,
        0.6,
        "ours_module",
    )
    for p in ("0", "0.1")
)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: cpu_plans, TRAINING: training_plans},
    modes=(FORWARD, BACKWARD, BOTH, SAVED_BYTES, PEAK_MEMORY),
    providers=(
        Provider(FROZEN, _frozen),
        Provider("eager", _eager, lambda case, mode: "it has no dropout" if case.dropout_p else None),
        Provider(PEFT, _peft, needs("peft")),
        Provider("ours_reference", _ours("reference"), providers._backend_missing("reference")),
        Provider("ours_cpp", _ours("cpp"), providers._backend_missing("cpp")),
        Provider("ours_triton", _ours("triton"), providers._backend_missing("triton")),
        Provider("ours_module", _ours_module),
        Provider("ours_in_peft", _ours_in_peft, needs("peft")),
    ),
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
