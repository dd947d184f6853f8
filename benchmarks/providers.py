"""Who is measured: every implementation of one LoRA linear, built on the same tensors.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ        W frozen; gradients to x, A and B

A provider that cannot run says why; one that runs is checked before it is timed (``checks.py``).
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

from lora_kernels import lora_linear, use_backend
from lora_kernels._backend import unavailable
from lora_kernels.planner import STRATEGIES, use_strategy

from .suites import Provider, Runner

SCALING = 2.0
HALF = (torch.float16, torch.bfloat16)


class Named:
    """How a point of a benchmark is called, by its shape, dtype, rank and dropout."""

    dtype: torch.dtype
    rank: int
    dropout_p: float

    @property
    def shape(self) -> str:
        raise NotImplementedError

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        return f"{self.shape}/{self.dtype_name}/r{self.rank}/p{self.dropout_p:g}"

    @property
    def columns(self) -> dict[str, object]:
        dropout = f"{self.dropout_p:g}"
        return {"shape": self.shape, "dtype": self.dtype_name, "rank": self.rank, "dropout": dropout}


@dataclass(frozen=True)
class Case(Named):
    """One point of the benchmark: sizes, dtype and dropout."""

    rows: int
    cols: int
    out: int
    rank: int = 16
    dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.cols}x{self.out}"

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.dtype_name}, r={self.rank}, dropout {self.dropout_p:g}"


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, which all providers share. x and dy stand for a layer's activations."""

    case: Case
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor

    def factors(self, dtype: torch.dtype | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        dtype = dtype or self.case.dtype
        copies = (t.detach().clone().to(dtype) for t in (self.lora_a, self.lora_b))
        a, b = (nn.Parameter(t) for t in copies)
        return a, b

    def linear(self) -> nn.Linear:
        linear = nn.Linear(self.case.cols, self.case.out, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear


def make_problem(case: Case, seed: int = 0) -> Problem:
    """Random tensors of the sizes that a trained layer has: y and both of its terms are of order one."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=case.device)
        return values.mul_(scale).to(case.dtype)

    return Problem(
        case,
        normal(case.rows, case.cols).requires_grad_(),
        normal(case.out, case.cols, scale=case.cols**-0.5),
        normal(case.rank, case.cols, scale=case.cols**-0.5),
        normal(case.out, case.rank, scale=case.rank**-0.5),
        normal(case.rows, case.out),
    )


def _frozen(problem: Problem) -> Runner:
    return Runner(problem.linear())


def _eager(problem: Problem) -> Runner:
    a, b = problem.factors()
    weight, p = problem.weight, problem.case.dropout_p

    def call(x: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(F.dropout(x, p, p > 0), a), b) * SCALING

    return Runner(call, (a, b))


def _peft_layer(
    problem: Problem, dtype: torch.dtype | None = None, base: nn.Module | None = None
) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    case = problem.case
    config = LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALING * case.rank),
        lora_dropout=case.dropout_p,
        target_modules=["linear"],
    )
    base = problem.linear() if base is None else base
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": base})).linear
    layer.lora_A.default.weight, layer.lora_B.default.weight = problem.factors(dtype)
    # PEFT made its own on the base layer's device; the dropout is all that is left of them.
    return layer.train()


def _peft_factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.lora_A.default.weight, layer.lora_B.default.weight


def _peft(problem: Problem) -> Runner:
    layer = _peft_layer(problem)
    return Runner(layer, _peft_factors(layer))


def _peft_fp32(problem: Problem) -> Runner:
    """What PEFT makes of a half-precision model: fp32 adapters, under autocast."""
    layer = _peft_layer(problem, torch.float32)
    device, dtype = problem.case.device, problem.case.dtype

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return layer(x)

    return Runner(call, _peft_factors(layer))


def _peft_compiled(problem: Problem) -> Runner:
    # A backward pass that is timed more than once keeps its buffers.
    importlib.import_module("torch._functorch.config").donated_buffer = False
    torch._dynamo.reset()
    layer = _peft_layer(problem)
    return Runner(torch.compile(layer, dynamic=False), _peft_factors(layer))


class _ByteMaskDropout(nn.Module):
    """``nn.Dropout`` with the kernel that it runs on CUDA, which saves one byte an element."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def _peft_byte_mask(problem: Problem) -> Runner:
    layer = _peft_layer(problem)
    layer.lora_dropout["default"] = _ByteMaskDropout(problem.case.dropout_p)
    return Runner(layer, _peft_factors(layer))


class _RecomputingFunction(torch.autograd.Function):
    """One Function a layer that accumulates in place and recomputes x Aᵀ in its backward pass.

    The scheme that Unsloth popularised, in code of our own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return (x @ weight.T).addmm_(x @ a.T, b.T, alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dh = (dy @ b).mul_(SCALING)
        db = (dy.T @ (x @ a.T)).mul_(SCALING)
        return (dy @ weight).addmm_(dh, a), None, dh.T @ x, db


recomputing_function = _RecomputingFunction.apply


def _recomputing(problem: Problem) -> Runner:
    a, b = problem.factors()
    weight = problem.weight
    return Runner(lambda x: recomputing_function(x, weight, a, b), (a, b))


def _lorafusion(problem: Problem) -> Runner:
    fused = importlib.import_module(LORAFUSION).fused_linear_lora
    a, b = problem.factors()
    weight, p = problem.weight, problem.case.dropout_p
    # It wants a batch of sequences, and the scale where others want alpha.
    return Runner(lambda x: fused(x[None], weight, a, b, SCALING, dropout_p=p)[0], (a, b))


def _lorafusion_limits(case: Case, mode: str) -> str | None:
    if case.device != "cuda":
        return "its kernels need CUDA"
    if not case.dropout_p:
        return "its backward pass reads a dropout mask that is not there without dropout"
    if case.rank < 16 or case.rank & (case.rank - 1):
        return "its kernels need a rank that is a power of two and at least 16"
    return None


def _peft_on_transformer_engine(problem: Problem) -> Runner:
    """PEFT's layer, its base GEMM through TransformerEngine's linear."""
    engine = importlib.import_module("transformer_engine.pytorch")
    case = problem.case
    base = engine.Linear(case.cols, case.out, bias=False, params_dtype=case.dtype, device=case.device)
    with torch.no_grad():
        base.weight.copy_(problem.weight)
    base.weight.requires_grad_(False)
    layer = _peft_layer(problem, base=base)
    return Runner(layer, _peft_factors(layer))


def _cuda_only(case: Case, mode: str) -> str | None:
    return None if case.device == "cuda" else "its kernels need CUDA"


def _ours(
    backend: str, dtype: torch.dtype | None = None, strategy: str = "auto"
) -> Callable[[Problem], Runner]:
    @contextlib.contextmanager
    def context():
        with use_backend(backend), use_strategy(strategy):
            yield

    def build(problem: Problem) -> Runner:
        a, b = problem.factors(dtype)
        weight, p = problem.weight, problem.case.dropout_p
        return Runner(
            lambda x: lora_linear(x, weight, a, b, SCALING, dropout_p=p),
            (a, b),
            context,
        )

    return build


def _ours_module(problem: Problem) -> Runner:
    from lora_kernels.nn import LoRALinear

    case = problem.case
    options = {"r": case.rank, "lora_alpha": SCALING * case.rank, "lora_dropout": case.dropout_p}
    layer = LoRALinear.from_linear(problem.linear(), **options).to(case.device, case.dtype).train()
    named = dict(layer.named_parameters())
    factors = tuple(_only(named, letter) for letter in ("lora_A", "lora_B"))
    with torch.no_grad():
        for parameter, value in zip(factors, (problem.lora_a, problem.lora_b), strict=True):
            parameter.copy_(value)
    return Runner(layer, factors)


def _only(named: dict[str, nn.Parameter], part: str) -> nn.Parameter:
    found = [parameter for name, parameter in named.items() if part in name]
    if len(found) != 1:
        raise RuntimeError(f"expected one parameter with {part} in its name, got {sorted(named)}")
    return found[0]


def _ours_in_peft(problem: Problem) -> Runner:
    from lora_kernels.integrations.peft import accelerate

    layer = _peft_layer(problem)
    accelerate(nn.ModuleDict({"linear": layer}))
    return Runner(layer, _peft_factors(layer))


@functools.cache
def _import_problem(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a rival may refuse a card or a version in its own way
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        return f"{module} does not import: {kind}{error}"
    return None


def needs(module: str) -> Callable[[Any, str], str | None]:
    """Why a provider that imports ``module`` is missing."""
    return lambda case, mode: _import_problem(module)


def first_reason(*checks: Callable[[Case, str], str | None]) -> Callable[[Case, str], str | None]:
    return lambda case, mode: next((why for check in checks if (why := check(case, mode))), None)


def _half_only(case: Case, mode: str) -> str | None:
    return (
        None if case.dtype in HALF else "fp32 adapters differ from the others only on a half-precision base"
    )


def _no_dropout(case: Case, mode: str) -> str | None:
    return "its in-place path has no dropout" if case.dropout_p else None


def _bytes_only(case: Case, mode: str) -> str | None:
    if mode != "saved_bytes" or case.device != "cpu" or not case.dropout_p:
        return "only for the bytes that PEFT's dropout saves on CUDA, counted on a CPU"
    return None


def _backend_missing(backend: str) -> Callable[[Case, str], str | None]:
    def missing(case: Case, mode: str) -> str | None:
        if backend == "triton" and case.device == "cpu":
            return "its kernels are not timed in Triton's interpreter"
        return unavailable(backend, case.device, case.dtype, case.rank)

    return missing


_PEFT = needs("peft")
LORAFUSION = "lorafusion.ops.lora_v1"
_ENGINE = needs("transformer_engine.pytorch")
FROZEN, PEFT = "frozen", "peft"

PROVIDERS = (
    Provider(FROZEN, _frozen),
    Provider("eager", _eager),
    Provider(PEFT, _peft, _PEFT),
    Provider("peft_fp32_adapters", _peft_fp32, first_reason(_PEFT, _half_only)),
    Provider("peft_byte_mask", _peft_byte_mask, first_reason(_PEFT, _bytes_only)),
    Provider("peft_compiled", _peft_compiled, _PEFT),
    Provider("recomputing_function", _recomputing, _no_dropout),
    Provider(
        "lorafusion", _lorafusion, first_reason(_lorafusion_limits, needs(LORAFUSION)), needs_dropout=True
    ),
    Provider(
        "peft_transformer_engine", _peft_on_transformer_engine, first_reason(_cuda_only, _PEFT, _ENGINE)
    ),
    Provider("ours_reference", _ours("reference"), _backend_missing("reference")),
    Provider("ours_cpp", _ours("cpp"), _backend_missing("cpp")),
    *(
        Provider(f"ours_triton_{strategy}", _ours("triton", strategy=strategy), _backend_missing("triton"))
        for strategy in STRATEGIES
        if strategy != "auto"
    ),
    Provider("ours_fp32_adapters", _ours("auto", torch.float32), _half_only),
    Provider("ours_module", _ours_module, needs("lora_kernels.nn")),
    Provider("ours_in_peft", _ours_in_peft, first_reason(_PEFT, needs("lora_kernels.integrations.peft"))),
)
