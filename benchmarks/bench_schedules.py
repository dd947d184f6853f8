"""A whole training step of a Transformers Llama with each optimiser and schedule, beside the step without it.

Two layers, 256 wide, LoRA of rank 16 on the seven linears of each, fp32. A case is a method in a phase:
``quiet`` steps are those on which it does not act (an optimiser: all of them), ``acting`` ones those on which
it does, and ``passes`` sets a method of several passes beside as many of the plain model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .step_recipes import RECIPES, Recipe, Scene
from .suites import Benchmark, Goal, Mode, Plan, Provider, Runner

OP = "schedules"
WITH, WITHOUT = "ours", "without"
BY_LABEL = {f"{one.key}/{one.phase}": one for one in RECIPES}


@dataclass(frozen=True)
class Case:
    """A method in a phase."""

    label: str
    width: int = 256
    rank: int = 16
    tokens: tuple[int, int] = (4, 64)
    device: str = "cpu"

    @property
    def recipe(self) -> Recipe:
        return BY_LABEL[self.label]

    @property
    def title(self) -> str:
        rows, length = self.tokens
        shape = f"{rows} sequences of {length}, {self.width} wide"
        return f"{self.label}, Llama of 2 layers, {shape}, float32, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.tokens[0]}x{self.tokens[1]}x{self.width}"
        columns = {"method": self.recipe.key, "phase": self.recipe.phase, "shape": shape}
        return {**columns, "dtype": "float32", "rank": self.rank}


def make_problem(case: Case) -> Scene:
    """The tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1024, case.tokens, generator=generator)
    return _Scene(case.width, case.rank, ids.to(case.device), case)


@dataclass(frozen=True)
class _Scene(Scene):
    case: Case


def _built(part: str) -> Callable[[Any], Runner]:
    def build(scene: _Scene) -> Runner:
        step = getattr(scene.case.recipe, part)(scene)
        step()  # moments, hooks and first vectors are there
        return Runner(lambda _: step())

    return build


def _missing(case: Case, mode: str) -> str | None:
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def _work(runner: Runner, scene: Scene) -> tuple[Callable[[], None], Callable[[Any], Any]]:
    return lambda: None, runner.call


STEP = Mode("step", "timed", work=_work)


def check(provider: Provider, case: Case) -> str | None:
    """Why a step is wrong, or ``None``: it moves some weight of a small model, by a finite step."""
    small = Case(case.label, 32, 4, (2, 8), case.device)
    moved = moves(provider, small)
    least = 0.0 if case.recipe.moves else -1.0
    return None if moved is not None and least < moved < 0.5 else f"weights moved by {moved}"


def moves(provider: Provider, case: Case) -> float | None:
    """How far the farthest weight of a model goes in a step; ``None`` where none of the models shows it."""
    scene = make_problem(case)
    built: list[Any] = []
    make = type(scene).llama
    watched = type("Watched", (_Scene,), {"llama": lambda self: built.append(make(self)) or built[-1]})
    runner = provider.build(watched(scene.width, scene.rank, scene.tokens, case))
    before = [p.detach().clone() for p in _weights(built[0])]
    for _ in range(2):
        runner.call(None)
    after = _weights(built[0])
    if len(after) != len(before) or any(p.shape != q.shape for p, q in zip(after, before, strict=True)):
        return None
    return max((p.detach() - q).abs().max().item() for p, q in zip(after, before, strict=True))


def _weights(model: Any) -> list[Any]:
    """The parameters, but for frozen factors: GaLore's are vectors, whose signs are the library's."""
    return [p for name, p in model.named_parameters() if p.requires_grad or "lora" not in name]


def plans(device: str, quick: bool) -> list[Plan]:
    """Every recipe."""
    small: dict[str, Any] = {"width": 32, "rank": 4, "tokens": (2, 8)} if quick else {}
    return [Plan(Case(label, device=device, **small), STEP.name) for label in BY_LABEL]


GOALS = tuple(
    Goal(f"{label} / the step without it", label, STEP.name, WITHOUT, one.limit, WITH)
    for label, one in BY_LABEL.items()
)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(STEP,),
    providers=(
        Provider(WITHOUT, _built("without"), _missing),
        Provider(WITH, _built("step"), _missing),
    ),
    baselines={WITHOUT: "without"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
