"""One step of an optimiser over the adapters of a model, the gradients being there.

All providers step over the A and B of as many linears, which share one base weight, to keep memory low.
LoRA-FA's train B alone, and so do less; what they are compared with moves both factors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_kernels import LoRAConfig, apply_lora, optim

from .suites import Benchmark, Goal, Mode, Plan, Provider, Runner

OP = "optimizers"
FOREACH = "adamw_foreach"


@dataclass(frozen=True)
class Case:
    """One point: how many adapters, of which sizes."""

    adapters: int
    width: int
    rank: int
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.adapters}x{self.width}/float32/r{self.rank}"

    @property
    def title(self) -> str:
        return f"{self.adapters} adapters of {self.width}x{self.width}, float32, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        return {"adapters": self.adapters, "width": self.width, "rank": self.rank, "dtype": "float32"}


@dataclass(frozen=True)
class Problem:
    """What all providers share."""

    case: Case
    weight: Tensor


def make_problem(case: Case) -> Problem:
    """The base weight."""
    generator = torch.Generator().manual_seed(0)
    return Problem(case, torch.randn(case.width, case.width, generator=generator).to(case.device))


def _linears(problem: Problem) -> nn.Sequential:
    width, weight = problem.case.width, nn.Parameter(problem.weight)
    layers = [nn.Linear(width, width, bias=False, device="meta") for _ in range(problem.case.adapters)]
    for layer in layers:
        layer.weight = weight
    return nn.Sequential(*layers)


def _ours(problem: Problem) -> nn.Module:
    config = LoRAConfig(r=problem.case.rank, target_modules="all-linear", init_lora_weights=False)
    return apply_lora(_linears(problem), config)


def _peft(problem: Problem) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [str(i) for i in range(problem.case.adapters)]
    config = LoraConfig(r=problem.case.rank, target_modules=names, init_lora_weights=False)
    return get_peft_model(_linears(problem), config)


def _stepping(model: nn.Module, optimizer: Optimizer) -> Runner:
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return Runner(lambda _: optimizer.step(), tuple(trained))


def _provider(
    model_of: Callable[[Problem], nn.Module], make: Callable[[Any], Optimizer]
) -> Callable[[Problem], Runner]:
    def build(problem: Problem) -> Runner:
        model = model_of(problem)
        return _stepping(model, make(model))

    return build


def _adamw(**options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)


def _loraplus_of_peft(model: Any) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


def _lorafa_of_peft(model: Any) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    return create_lorafa_optimizer(model, config.r, config.lora_alpha, lr=1e-3)


def _riemannian_of_peft(model: Any) -> Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)


def _peft_missing(case: Case, mode: str) -> str | None:
    return None if importlib.util.find_spec("peft") else "peft is not installed"


def _work(runner: Runner, problem: Problem) -> tuple[Callable[[], None], Callable[[Any], Any]]:
    return lambda: None, runner.call


STEP = Mode("step", "timed", work=_work)


def check(provider: Provider, case: Case) -> str | None:
    """Why a step is wrong, or ``None``: all that trains moves, by no more than the rate allows."""
    runner = provider.build(make_problem(Case(2, 32, 4, case.device)))
    before = [p.detach().clone() for p in runner.factors]
    runner.call(None)
    moves = [(p - q).abs().max().item() for p, q in zip(runner.factors, before, strict=True)]
    return None if all(0 < move < 0.1 for move in moves) else f"parameters moved by {moves}"


def plans(device: str, quick: bool) -> list[Plan]:
    """A model of some thirty layers, with adapters on all linears."""
    case = Case(4, 32, 4, device) if quick else Case(200, 1024, 16, device)
    return [Plan(case, STEP.name)]


OURS = {
    "lora_plus": lambda model: optim.lora_plus(model, lr=1e-3, ratio=16),
    "lora_fa": lambda model: optim.LoRAFA(model, 1e-3),
    "riemannian": lambda model: optim.riemannian(model, lr=1e-3),
}
GOALS = tuple(
    Goal(f"200 adapters, {name} / AdamW(foreach=True)", "200x1024/float32/r16", STEP.name, FOREACH, 1.0, name)
    for name in OURS
)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(STEP,),
    providers=(
        Provider(FOREACH, _provider(_ours, _adamw(foreach=True))),
        Provider("adamw_fused", _provider(_ours, _adamw(fused=True))),
        *(Provider(name, _provider(_ours, make)) for name, make in OURS.items()),
        Provider("peft_lora_plus", _provider(_peft, _loraplus_of_peft), _peft_missing),
        Provider("peft_lora_fa", _provider(_peft, _lorafa_of_peft), _peft_missing),
        Provider("peft_riemannian", _provider(_peft, _riemannian_of_peft), _peft_missing),
    ),
    baselines={FOREACH: "AdamW(foreach)"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
