"""A linear over a quantised weight on a CPU, at the few rows of decoding: y = x Wᵀ, W of nf4 or int8 codes.

Every provider computes with the same W, what the codes stand for; the dense one holds it as float32.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import QuantizedWeight, dequantize, quantize, quantized_linear, use_backend
from lora_kernels._backend import unavailable

from .checks import errors, judge
from .measure import FORWARD
from .suites import Benchmark, Goal, Plan, Provider, Runner

OP = "quantized_linear"
DENSE, EAGER = "dense", "eager"
FORMATS = ("nf4", "int8")


@dataclass(frozen=True)
class Case:
    """One point: sizes and the weight's format; x is float32."""

    rows: int
    cols: int
    out: int
    format: str
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols}x{self.out}/float32/{self.format}"

    @property
    def title(self) -> str:
        return f"{self.rows}x{self.cols}x{self.out}, float32, {self.format}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.rows}x{self.cols}x{self.out}"
        return {"shape": shape, "dtype": "float32", "format": self.format}


@dataclass(frozen=True)
class Problem:
    """x, the codes, what they stand for, and the weight that they were made of."""

    case: Case
    x: Tensor
    codes: QuantizedWeight
    weight: Tensor
    original: Tensor


@functools.lru_cache(maxsize=1)
def _weights(cols: int, out: int, format: str) -> tuple[QuantizedWeight, Tensor, Tensor]:
    original = torch.randn(out, cols, generator=torch.Generator().manual_seed(0)) * cols**-0.5
    codes = quantize(original, format)
    return codes, dequantize(codes), original


def make_problem(case: Case) -> Problem:
    """Random tensors; y is of order one."""
    x = torch.randn(case.rows, case.cols, generator=torch.Generator().manual_seed(1))
    return Problem(case, x, *_weights(case.cols, case.out, case.format))


def _dense(problem: Problem) -> Runner:
    return Runner(lambda x: F.linear(x, problem.weight))


def _eager(problem: Problem) -> Runner:
    """Decodes in PyTorch's own operations at every call, then multiplies."""
    return Runner(lambda x: F.linear(x, dequantize(problem.codes)), (), lambda: use_backend("reference"))


def _ours(problem: Problem) -> Runner:
    return Runner(lambda x: quantized_linear(x, problem.codes), (), lambda: use_backend("cpp"))


def _ours_missing(case: Case, mode: str) -> str | None:
    return unavailable("cpp", case.device, torch.float32, 1)


def _bitsandbytes(problem: Problem) -> Runner:
    from bitsandbytes.nn import Linear4bit, Params4bit

    case = problem.case
    layer = Linear4bit(
        case.cols, case.out, bias=False, compute_dtype=torch.float32, compress_statistics=False
    )
    layer.weight = Params4bit(
        problem.original.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    return Runner(layer.to("cpu"))


def _bitsandbytes_missing(case: Case, mode: str) -> str | None:
    if case.format != "nf4":
        return "its int8 linear rounds x to int8 as well, which is another function"
    return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"


def check(provider: Provider, case: Case) -> str | None:
    """Why y is wrong, or ``None``: against fp64, twice the error of the dense product."""
    problem = make_problem(case)
    want = (problem.x.double() @ problem.weight.double().T,)
    (dense,) = errors((F.linear(problem.x, problem.weight),), want)
    runner = provider.build(problem)
    with runner.context():
        got = runner.call(problem.x)
    return judge((got,), want, [max(2 * dense, 4 * torch.finfo(torch.float32).eps)], ("y",))


def cpu_plans(device: str, quick: bool) -> list[Plan]:
    """Rows of decoding, at the square projection of a 7B model."""
    if device != "cpu":
        return []
    rows, width = ((1, 4), 128) if quick else ((1, 4, 8, 16, 32), 4096)
    return [Plan(Case(m, width, width, format), FORWARD.name) for format in FORMATS for m in rows]


GOALS = tuple(
    Goal(
        f"{m} rows, {format}, / eager dequantise and matmul",
        *(f"{m}x4096x4096/float32/{format}", FORWARD.name, EAGER, 0.5, "ours_cpp"),
    )
    for format in FORMATS
    for m in (1, 8)
)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: cpu_plans},
    modes=(FORWARD,),
    providers=(
        Provider(DENSE, _dense),
        Provider(EAGER, _eager),
        Provider("ours_cpp", _ours, _ours_missing),
        Provider("bitsandbytes", _bitsandbytes, _bitsandbytes_missing),
    ),
    baselines={DENSE: "dense", EAGER: "eager"},
    problem=make_problem,
    check=check,
    goals=GOALS,
)
