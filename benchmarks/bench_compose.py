"""One pass under several adapters, and a pool that takes the tensors of a training step.

    composite  [model(x; a) for a of four adapters]      beside a pass for each
    policy     model(x; policy) and model(x), no adapter  beside a pass for each
    refresh    an adapter's tensors into the pages of a pool  beside one copy of as many bytes

No gradients. The model of the first two is four linears with SiLU between them; refreshed are seven linears a
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, multi_lora_linear
from lora_kernels.compose import forward_each
from lora_kernels.nn import disable_adapters, set_adapter, train_adapters
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.testing.timers import Prepare, Run

from .checks import errors, judge
from .suites import Benchmark, Goal, Mode, Plan, Provider, Runner

OP = "compose"
OURS, APART, BYTES, TENSORS, UPDATE = "ours", "apart", "bytes", "tensors", "update"
RANK = 16
NAMES: dict[str, tuple[str | None, ...]] = {"composite": ("a", "b", "c", "d"), "policy": ("a", None)}
REFRESH = "refresh"


@dataclass(frozen=True)
class Case:
    """One point: what is done, for how many rows, or layers of a pool."""

    kind: str
    count: int
    width: int = 1024
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.count}x{self.width}/float32"

    @property
    def title(self) -> str:
        what = "layers of seven linears" if self.kind == REFRESH else "rows"
        return f"{self.kind}, {self.count} {what}, {self.width} wide, float32, r={RANK}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.count}x{self.width}"
        return {"kind": self.kind, "shape": shape, "dtype": "float32", "rank": RANK}


def _call(runner: Runner, problem: Any) -> tuple[Prepare, Run]:
    return lambda: None, lambda _: runner.call(problem)


PASS = Mode("pass", "timed", work=_call)


@dataclass(frozen=True, eq=False)
class Passes:
    """A model of four adapters, and the samples."""

    names: tuple[str | None, ...]
    model: nn.Module
    x: Tensor


@dataclass(frozen=True, eq=False)
class Refreshed:
    """A pool that holds an adapter, new tensors for it, and others of the same sizes to copy them to."""

    pool: AdapterPool
    new: dict[str, tuple[Tensor, Tensor]]
    old: dict[str, tuple[Tensor, Tensor]]
    source: Tensor
    target: Tensor


@functools.lru_cache(maxsize=2)
def make_problem(case: Case) -> Passes | Refreshed:
    """Random tensors; the model's output is of order one."""
    torch.manual_seed(0)
    if case.kind == REFRESH:
        return _refreshed(case)
    parts = (part for _ in range(4) for part in (nn.Linear(case.width, case.width), nn.SiLU()))
    model = nn.Sequential(*parts).to(case.device)
    config = LoRAConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    train_adapters(model, dict.fromkeys("abcd", config))
    return Passes(NAMES[case.kind], model, torch.randn(case.count, case.width, device=case.device))


def _refreshed(case: Case) -> Refreshed:
    d = case.width
    sizes = {"q": (d, d), "k": (d, d // 4), "v": (d, d // 4), "o": (d, d)}
    sizes |= {"gate": (d, 4 * d), "up": (d, 4 * d), "down": (4 * d, d)}
    linears = {f"{i}.{name}": size for i in range(case.count) for name, size in sizes.items()}
    pool = AdapterPool(linears, pages=2 * RANK, slots=2, max_rank=RANK, device=case.device)
    old, new = (
        {
            name: (torch.randn(RANK, k, device=case.device), torch.randn(n, RANK, device=case.device))
            for name, (k, n) in linears.items()
        }
        for _ in range(2)
    )
    pool.register("policy", old)
    pool.prefetch(["policy"])
    source = torch.cat([part.flatten() for pair in new.values() for part in pair])
    return Refreshed(pool, new, old, source, torch.empty_like(source))


def _together(problem: Passes) -> list[Tensor]:
    with torch.no_grad():
        return forward_each(problem.model, problem.names, problem.x, batch_dim=0)


def _apart(problem: Passes) -> list[Tensor]:
    return [_alone(problem, name) for name in problem.names]


@torch.no_grad()
def _alone(problem: Passes, name: str | None) -> Tensor:
    if name is None:
        with disable_adapters(problem.model):
            return problem.model(problem.x)  # type: ignore[no-any-return]
    set_adapter(problem.model, name)
    return problem.model(problem.x)  # type: ignore[no-any-return]


def _ours(problem: Passes | Refreshed) -> Runner:
    if isinstance(problem, Passes):
        return Runner(_together)
    return Runner(lambda at: at.pool.refresh("policy", at.new))


def _copy(at: Refreshed) -> None:
    at.target.copy_(at.source)


def _copy_each(at: Refreshed) -> None:
    for name, pair in at.new.items():
        for to, part in zip(at.old[name], pair, strict=True):
            to.copy_(part)


def _update(at: Refreshed) -> None:
    at.pool.update("policy", at.new)
    at.pool.prefetch(["policy"])


def _of(*kinds: str) -> Callable[[Any, str], str | None]:
    return lambda case, mode: None if case.kind in kinds else f"it has no {case.kind}"


def check(provider: Provider, case: Case) -> str | None:
    """Why the result is wrong, or ``None``: both against fp64, a pool by what it computes afterwards."""
    if case.kind == REFRESH:
        return _check_pool(provider, case)
    problem: Any = make_problem(case)
    got = tuple(provider.build(problem).call(problem))
    before = problem.model.state_dict()
    wide = make_problem.__wrapped__(case)
    wide.model.load_state_dict(before)
    want = tuple(_apart(Passes(wide.names, wide.model.double(), problem.x.double())))
    allowed = [max(2 * e, 1e-6) for e in errors(tuple(_apart(problem)), want)]
    return judge(got, want, allowed, [str(name) for name in problem.names])


def _check_pool(provider: Provider, case: Case) -> str | None:
    if provider.name in (BYTES, TENSORS):
        return None  # no pool is asked
    problem: Any = make_problem.__wrapped__(case)
    provider.build(problem).call(problem)
    name = next(iter(problem.new))
    lora_a, lora_b = problem.new[name]
    x = torch.randn(8, lora_a.shape[1], device=lora_a.device)
    with problem.pool.use(["policy"]) as slots:
        ids = torch.tensor(slots * 8, device=x.device)
        got = multi_lora_linear(x, None, problem.pool.stack(name), ids)
    want = (x.double() @ lora_a.double().T @ lora_b.double().T,)
    allowed = [max(2 * errors((x @ lora_a.T @ lora_b.T,), want)[0], 1e-6)]
    return judge((got,), want, allowed, ("delta",))


def plans(device: str, quick: bool) -> list[Plan]:
    """The rows and the pool of the figures."""
    rows, width = ((4,), 64) if quick else ((4, 16, 64, 256), 1024)
    cases = [Case(kind, count, width, device) for kind in NAMES for count in rows]
    pool = Case(REFRESH, 1 if quick else 32, 64 if quick else 2048, device)
    return [Plan(case, PASS.name) for case in (*cases, pool)]


def _goal(kind: str, count: int, width: int, base: str, limit: float) -> Goal:
    return Goal(f"`{kind}` / {base}", Case(kind, count, width).label, PASS.name, base, limit, OURS)


BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(PASS,),
    providers=(
        Provider(APART, lambda problem: Runner(_apart), _of(*NAMES)),
        Provider(BYTES, lambda problem: Runner(_copy), _of(REFRESH)),
        Provider(TENSORS, lambda problem: Runner(_copy_each), _of(REFRESH)),
        Provider(UPDATE, lambda problem: Runner(_update), _of(REFRESH)),
        Provider(OURS, _ours),
    ),
    baselines={APART: "passes apart", BYTES: "copy of the bytes", TENSORS: "tensor by tensor"},
    problem=make_problem,
    check=check,
    goals=(
        *(_goal("composite", rows, 1024, APART, 0.9) for rows in (4, 16, 64, 256)),
        *(_goal("policy", rows, 1024, APART, 0.95) for rows in (4, 16, 64, 256)),
        _goal(REFRESH, 32, 2048, BYTES, 2.0),
    ),
)
