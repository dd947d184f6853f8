"""A training step of one Llama block under each tuner of PEFT: PEFT's layers, ours after ``accelerate``.

Forward, backward and optimiser, adapters on the block's seven linears; x gets its gradient too. Beside both
our own LoRA of the same rank. A tuner that ``accelerate`` leaves to PEFT is a row too, with the reason.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.testing.peft_tuners import CASES, WITHOUT_A_STEP, mended

from .bench_llama_layer import LINEARS
from .measure import HOST_PEAK, PEAK_MEMORY, SAVED_BYTES
from .providers import first_reason, needs
from .suites import Benchmark, Goal, Mode, Plan, Provider, Runner

OP = "peft"
LORA, PEFT, OURS = "lora", "peft", "ours"
MAX_TOKENS_CHECKED = 32
# Who has a row of each tuner beside the baselines.
ONLY, WITH_A_STEP = frozenset[str](), dict.fromkeys(CASES, frozenset({OURS}))
# A width that those of a block divide into, by whether it is a tiny one.
BLOCK = {True: 64, False: 8}


@dataclass(frozen=True)
class Case:
    """One point: a tuner, and the sizes of the block and of its input."""

    tuner: str
    batch: int = 2
    length: int = 128
    hidden: int = 512
    inner: int = 1408
    heads: int = 8
    kv_heads: int = 4
    rank: int = 32
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def _name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def _shape(self) -> str:
        return f"{self.batch}x{self.length}x{self.hidden}x{self.inner}"

    @property
    def label(self) -> str:
        return f"{self.tuner}/{self._shape}/{self._name}/r{self.rank}"

    @property
    def title(self) -> str:
        return f"{self.tuner}, {self._shape}, {self._name}, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        return {"tuner": self.tuner, "shape": self._shape, "dtype": self._name, "rank": self.rank}


@dataclass(frozen=True)
class Problem:
    """PEFT's model, the block before PEFT had it, and its activations."""

    case: Case
    block: nn.Module
    model: Any
    x: Tensor
    dy: Tensor

    @property
    def weight(self) -> tuple[Tensor, ...]:
        return (*_frozen(self.model), *_frozen(self.block))


def _frozen(model: nn.Module) -> tuple[Tensor, ...]:
    return (*(p for p in model.parameters() if not p.requires_grad), *model.buffers())


def trained(model: nn.Module) -> tuple[Tensor, ...]:
    """The parameters that the step moves."""
    return tuple(p for p in model.parameters() if p.requires_grad)


def _block(case: Case) -> nn.Module:
    """A Llama of one block and hardly any words."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaModel(config).requires_grad_(False)
    return model.to(case.device, case.dtype)


@functools.lru_cache(maxsize=1)
def _models(case: Case) -> tuple[nn.Module, Any]:
    """The block alone, and in PEFT, its parameters off their start, where much would be zero."""
    block = _block(case)
    if case.tuner in WITHOUT_A_STEP:
        return block, block
    config = CASES[case.tuner].made(case.rank, BLOCK[case.hidden >= 512], target_modules=list(LINEARS))
    model = importlib.import_module("peft").get_peft_model(copy.deepcopy(block), config)
    model = model.to(case.device, case.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.02)
    return block, model


def make_problem(case: Case) -> Problem:
    """Random activations."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.length, case.hidden)
    x, dy = (torch.randn(shape, generator=generator).to(case.device, case.dtype) for _ in range(2))
    return Problem(case, *_models(replace(case, batch=1, length=1)), x.requires_grad_(), dy)


def _own(model: nn.Module) -> Any:
    """A model of its own modules and trained parameters; what is frozen it shares."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in _frozen(model)})


def _runner(problem: Problem, model: Any, **more: Any) -> Runner:
    return Runner(lambda x: model(inputs_embeds=x, **more).last_hidden_state, trained(model))


def _in_peft(problem: Problem, model: Any) -> Runner:
    return _runner(problem, model.base_model, **CASES[problem.case.tuner].call(problem.case.batch))


def _peft(problem: Problem) -> Runner:
    return _in_peft(problem, _own(problem.model).train())


def _ours(problem: Problem) -> Runner:
    model = _own(problem.model).train()
    importlib.import_module("lora_kernels").accelerate(model)
    return _in_peft(problem, model)


def _lora(problem: Problem) -> Runner:
    from lora_kernels import LoRAConfig, apply_lora

    options: dict[str, Any] = {"r": problem.case.rank, "lora_alpha": 2 * problem.case.rank}
    model = apply_lora(_own(problem.block), LoRAConfig(target_modules=list(LINEARS), **options)).train()
    return _runner(problem, model.to(problem.case.device, problem.case.dtype))


def _no_step(case: Case, mode: str) -> str | None:
    return WITHOUT_A_STEP.get(case.tuner)


def _no_row(case: Case, mode: str) -> str | None:
    return "PEFT's tuner has no step" if case.tuner in WITHOUT_A_STEP else None


def _left(case: Case, mode: str) -> str | None:
    """Why ``accelerate`` leaves every layer of this tuner to PEFT."""
    from lora_kernels import accelerate

    report = accelerate(_own(make_problem(case).model))
    reasons = dict.fromkeys(reason for _, reason in report.skipped)
    return None if report.accelerated else f"left to PEFT: {'; '.join(reasons)}"


def _step(runner: Runner, problem: Problem) -> tuple[Callable[[], None], Callable[[Any], Any]]:
    optimizer = torch.optim.AdamW(runner.factors, lr=1e-6, fused=True)

    def step(_: Any) -> None:
        problem.x.grad = None
        optimizer.zero_grad()
        runner.call(problem.x).backward(problem.dy)
        optimizer.step()

    return (lambda: None), step


# By the host's clock on a card too: what some tuners do no graph can hold.
STEP = Mode("step", "timed", work=_step, calls=1)


def outputs(runner: Runner, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dX and the gradients of what is trained, zeros where there is none."""
    y = runner.call(x)
    grads = torch.autograd.grad(y, (x, *runner.factors), dy, allow_unused=True)
    zeros = (torch.zeros_like(t) for t in (x, *runner.factors))
    return (y.detach(), *(zero if g is None else g for g, zero in zip(grads, zeros, strict=True)))


def _errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Of each, the norm of the error over the norm: a block's largest errors are a matter of luck."""
    norms = (w.norm().clamp_min(torch.finfo(w.dtype).tiny) for w in want)
    return [float((g.double() - w).norm() / n) for g, w, n in zip(got, want, norms, strict=True)]


@functools.lru_cache(maxsize=1)
def _reference(case: Case) -> tuple[Problem, tuple[Tensor, ...], list[float]]:
    """The problem, what PEFT's own layers give in fp64, and by how much they are off in the case's dtype."""
    problem = make_problem(case)
    wide = copy.deepcopy(problem.model).double().eval()
    x = problem.x.detach().double().requires_grad_()
    with mended():
        want = outputs(_in_peft(problem, wide), x, problem.dy.double())
        eager = outputs(_in_peft(problem, _own(problem.model).eval()), problem.x, problem.dy)
    return problem, want, _errors(eager, want)


def check(provider: Provider, case: Case) -> str | None:
    """Of ours: y and every gradient against PEFT's in fp64, twice PEFT's error in the case's dtype."""
    if provider.name != OURS:
        return None
    small = replace(case, length=max(1, min(case.length, MAX_TOKENS_CHECKED // case.batch)))
    problem, want, eager = _reference(small)
    model = _own(problem.model).eval()
    importlib.import_module("lora_kernels").accelerate(model)
    got = outputs(_in_peft(problem, model), problem.x, problem.dy)
    names = ["y", "dx", *(f"d{name}" for name, p in model.named_parameters() if p.requires_grad)]
    for name, error, base in zip(names, _errors(got, want), eager, strict=True):
        if not error <= max(2 * base, 16 * torch.finfo(case.dtype).eps):
            return f"{name} is off by {error:.1e} of its norm, PEFT by {base:.1e}"
    return None


def plans(device: str, quick: bool) -> list[Plan]:
    """Every tuner of PEFT; on a card Llama-3-8B's block in bf16, and a smaller one in fp32."""
    if quick:
        cases = [{"length": 4, "hidden": 32, "inner": 48, "heads": 4, "kv_heads": 2, "rank": 4}]
    elif device == "cpu":
        cases = [{}]
    else:
        large = {"batch": 4, "length": 1024, "hidden": 4096, "inner": 14336, "heads": 32}
        small = {"batch": 4, "length": 1024, "hidden": 2048, "inner": 5632, "heads": 16}
        cases = [{**large, "kv_heads": 8, "dtype": torch.bfloat16}, {**small, "dtype": torch.float32}]
    peak = HOST_PEAK if device == "cpu" else PEAK_MEMORY
    return [
        Plan(Case(tuner, device=device, **sizes), mode.name, WITH_A_STEP.get(tuner, ONLY), False, place)
        for place, sizes in enumerate(cases)
        for tuner in (*CASES, *WITHOUT_A_STEP)
        for mode in ((STEP,) if tuner in WITHOUT_A_STEP else (STEP, SAVED_BYTES, peak))
    ]


def _goals() -> Iterator[Goal]:
    for key, case in CASES.items():
        label = Case(key).label
        limit = 0.8 if case.dense else 0.95
        yield Goal(f"`{key}`, step / PEFT's", label, STEP.name, PEFT, limit, OURS)
        if case.low_rank:
            yield Goal(f"`{key}`, step / our LoRA's", label, STEP.name, LORA, 1.15, OURS)


_missing = first_reason(needs("transformers"), needs("peft"), _no_step)

BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(STEP, SAVED_BYTES, HOST_PEAK),
    providers=(
        Provider(PEFT, _peft, _missing),
        Provider(OURS, _ours, first_reason(needs("transformers"), needs("peft"), _left)),
        Provider(LORA, _lora, first_reason(needs("transformers"), _no_row)),
    ),
    baselines={PEFT: "PEFT's", LORA: "our LoRA"},
    problem=make_problem,
    check=check,
    goals=tuple(_goals()),
)
