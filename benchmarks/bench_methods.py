"""A training step of one linear with each registered structure, beside our LoRA of the same rank.

Also beside the same method with its ΔW formed densely, as a plain implementation would, and beside PEFT's and
LyCORIS' own of it. Options and side inputs of a method are those that its tests use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import methods
from lora_kernels.nn import LoRALinear, side_inputs
from lora_kernels.testing.method_cases import case as side_case

from .checks import errors, judge
from .measure import BOTH, SAVED_BYTES
from .providers import needs
from .suites import Benchmark, Goal, Plan, Provider, Runner

OP = "methods"
LORA, DENSE, PEFT_LORA, PEFT, LYCORIS = "lora", "dense", "peft_lora", "peft", "lycoris"
OURS = "ours"
ROWS, WIDTH, RANK = 512, 1024, 16


@dataclass(frozen=True)
class Case:
    """One point: a method, and the sizes of the linear that it is on."""

    method: str
    rows: int = ROWS
    width: int = WIDTH
    rank: int = RANK
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.method}/{self.rows}x{self.width}x{self.width}/float32/r{self.rank}"

    @property
    def title(self) -> str:
        return f"{self.method}, {self.rows}x{self.width}x{self.width}, float32, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.rows}x{self.width}x{self.width}"
        return {"method": self.method, "shape": shape, "dtype": "float32", "rank": self.rank}


@dataclass(frozen=True)
class Problem:
    """What all providers share."""

    case: Case
    x: Tensor
    weight: Tensor
    dy: Tensor

    def linear(self) -> nn.Linear:
        width = self.case.width
        linear = nn.Linear(width, width, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear


@functools.lru_cache(maxsize=1)
def _tensors(rows: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (width, width), (rows, width))
    x, weight, dy = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return x.requires_grad_(), weight * width**-0.5, dy


def make_problem(case: Case) -> Problem:
    """Random tensors; y is of order one."""
    return Problem(case, *_tensors(case.rows, case.width, case.device))


def _layer(problem: Problem, method: str) -> LoRALinear:
    """The layer with this method, its parameters off their start, where much would be zero."""
    torch.manual_seed(0)
    options = side_case(method).sized(problem.case.width)
    given = {"r": problem.case.rank, "lora_alpha": 2 * problem.case.rank, **options}
    layer = LoRALinear.from_linear(problem.linear(), method=method, **given).to(problem.case.device)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return layer


def _trained(layer: nn.Module) -> tuple[Tensor, ...]:
    return tuple(p for p in layer.parameters() if p.requires_grad)


def _call(layer: LoRALinear, method: str, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Any]:
    side = side_case(method).side(x)
    return layer, (lambda: side_inputs(layer, **side)) if side else contextlib.nullcontext


def _ours(problem: Problem, method: str | None = None) -> Runner:
    method = method or problem.case.method
    layer = _layer(problem, method)
    call, context = _call(layer, method, problem.x)
    return Runner(call, _trained(layer), context)


def _dense(problem: Problem) -> Runner:
    """y = x (W + ΔW)ᵀ with ΔW formed by the method, and differentiated."""
    layer = _layer(problem, problem.case.method)
    adapter = layer.adapters["default"]
    weight = layer.weight
    return Runner(lambda x: F.linear(x, adapter.merged(weight, weight)), _trained(layer))


def _dense_missing(case: Case, mode: str) -> str | None:
    if case.method == LORA:
        return None
    return None if _structure(case.method).mergeable else "it has no one weight"


def _structure(method: str) -> Any:
    return importlib.import_module("lora_kernels.adapters").METHODS[method]


def _peft_configs(case: Case) -> dict[str, Callable[[], Any]]:
    """PEFT's config of each method that it has too."""
    import peft

    r, common = case.rank, {"target_modules": ["linear"]}
    lora = {"r": r, "lora_alpha": 2 * r, **common}
    return {
        LORA: lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "vblora": lambda: peft.VBLoRAConfig(r=r, num_vectors=256, vector_length=64, topk=2, **common),
        "miss": lambda: peft.MissConfig(r=r, **common),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, **common),
        "loha": lambda: peft.LoHaConfig(r=r, alpha=2 * r, **common),
        "lokr": lambda: peft.LoKrConfig(r=r, alpha=2 * r, **common),
    }


def _in_peft(problem: Problem, method: str) -> Runner:
    from peft import get_peft_model

    config = _peft_configs(problem.case)[method]()
    model = get_peft_model(nn.ModuleDict({"linear": problem.linear()}), config)
    layer = model.base_model.model["linear"].to(problem.case.device).train()
    return Runner(layer, tuple(p for p in model.parameters() if p.requires_grad))


def _peft_missing(case: Case, mode: str) -> str | None:
    why = needs("peft")(case, mode)
    return why or (None if case.method in _peft_configs(case) else "PEFT has no such method")


# The module and the class of each method that LyCORIS has too, and what it is told.
_LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    LORA: ("locon", "LoConModule", {}),
    "dora": ("locon", "LoConModule", {"weight_decompose": True}),
    "loha": ("loha", "LohaModule", {}),
    "lokr": ("lokr", "LokrModule", {}),
}


def _in_lycoris(problem: Problem) -> Runner:
    file, name, options = _LYCORIS[problem.case.method]
    module = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    r = problem.case.rank
    layer = (
        module("linear", problem.linear(), lora_dim=r, alpha=2 * r, **options).to(problem.case.device).train()
    )
    return Runner(layer, _trained(layer))


def _lycoris_missing(case: Case, mode: str) -> str | None:
    if case.method not in _LYCORIS:
        return "LyCORIS has no such method"
    why = needs("lycoris")(case, mode)
    return f"{why}; --rival-path names a folder that has it" if why else None


def _outputs(runner: Runner, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    with runner.context():
        y = runner.call(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *runner.factors), dy, allow_unused=True))


def check(provider: Provider, case: Case) -> str | None:
    """Why ours is wrong, or ``None``: y and dx against the dense form in fp64, twice its error in fp32."""
    if provider.name != OURS or not _structure(case.method).mergeable:
        return None
    problem = make_problem(case)
    wide = Problem(case, problem.x.detach().double().requires_grad_(), problem.weight, problem.dy.double())
    layer = _layer(problem, case.method).double()
    adapter = layer.adapters["default"]
    dense = Runner(lambda x: F.linear(x, adapter.merged(layer.weight, layer.weight)))
    want = _outputs(dense, wide.x, wide.dy)
    eager = errors(_outputs(Runner(_dense(problem).call), problem.x, problem.dy), want)
    ours = _ours(problem)
    got = _outputs(Runner(ours.call, context=ours.context), problem.x, problem.dy)
    allowed = [max(2 * error, 4 * torch.finfo(torch.float32).eps) for error in eager]
    return judge(got, want, allowed, ("y", "dx"))


def plans(device: str, quick: bool) -> list[Plan]:
    """Every structure of the register, LoRA first."""
    sizes = {"rows": 8, "width": 64, "rank": 4} if quick else {}
    cases = [Case(key, **sizes, device=device) for key in methods.structures()]
    return [Plan(case, mode.name, plotted=False) for case in cases for mode in (BOTH, SAVED_BYTES)]


GOALS = tuple(
    Goal(f"`{key}`, step / our LoRA's", Case(key).label, BOTH.name, LORA, 1.10, OURS)
    for key in methods.structures()
    if key != LORA
)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(BOTH, SAVED_BYTES),
    providers=(
        Provider(LORA, functools.partial(_ours, method=LORA)),
        Provider(OURS, _ours),
        Provider(DENSE, _dense, _dense_missing),
        Provider(PEFT_LORA, functools.partial(_in_peft, method=LORA), needs("peft")),
        Provider(PEFT, lambda problem: _in_peft(problem, problem.case.method), _peft_missing),
        Provider(LYCORIS, _in_lycoris, _lycoris_missing),
    ),
    baselines={
        LORA: "our LoRA",
        DENSE: "dense ΔW",
        PEFT_LORA: "PEFT's LoRA",
        PEFT: "PEFT's",
        LYCORIS: "LyCORIS'",
    },
    problem=make_problem,
    check=check,
    goals=GOALS,
)
