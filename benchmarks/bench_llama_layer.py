"""One decoder layer of Llama-3-8B with LoRA on its seven linears: forward and backward of a training step.

The layer is Transformers' own, with random weights; x and every A and B get gradients, the rest is frozen.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .measure import BACKWARD, BOTH, FORWARD, PEAK_MEMORY, SAVED_BYTES
from .providers import SCALING, Named, first_reason, needs, recomputing_function
from .suites import TRAINING, Benchmark, Derived, Goal, Plan, Provider, Row, Runner

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FROZEN, PEFT = "frozen", "peft"
MAX_TOKENS_CHECKED = 256


@dataclass(frozen=True)
class LayerCase(Named):
    """Sizes of the layer and of its input, one sequence after the other."""

    batch: int
    length: int
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.length}x{self.hidden}x{self.intermediate}"

    @property
    def title(self) -> str:
        sizes = f"Llama layer, {self.batch} sequences of {self.length} tokens, hidden {self.hidden}"
        return f"{sizes}, {self.dtype_name}, r={self.rank}, dropout {self.dropout_p:g}"


@dataclass(frozen=True)
class LayerProblem:
    """The frozen layer, its factors by name of the linear, and its activations."""

    case: LayerCase
    layer: nn.Module
    factors: dict[str, tuple[Tensor, Tensor]]
    x: Tensor
    dy: Tensor
    rotary: tuple[Tensor, Tensor]

    @property
    def weight(self) -> tuple[Tensor, ...]:
        return tuple(self.layer.parameters())


def _config(case: LayerCase) -> Any:
    config = importlib.import_module("transformers").LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        rope_theta=500000.0,
    )
    config._attn_implementation = "sdpa"
    return config


def make_problem(case: LayerCase, seed: int = 0) -> LayerProblem:
    """Weights of the scale that keeps activations of order one, and B of the scale of a trained one."""
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    config = _config(case)
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=case.device)
        return values.mul_(scale).to(case.dtype)

    with torch.device("meta"):
        layer = llama.LlamaDecoderLayer(config, 0)
    layer = layer.to_empty(device=case.device).to(case.dtype).requires_grad_(False)
    factors = {}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = parameter.shape[-1] ** -0.5
            matrix = parameter.dim() == 2
            parameter.copy_(normal(*parameter.shape, scale=scale) if matrix else torch.ones_like(parameter))
            if matrix:
                a = normal(case.rank, parameter.shape[1], scale=scale)
                b = normal(parameter.shape[0], case.rank, scale=0.1 * case.rank**-0.5)
                factors[name.removesuffix(".weight")] = (a, b)
    x, dy = (normal(case.batch, case.length, case.hidden) for _ in range(2))
    positions = torch.arange(case.length, device=case.device)[None]
    rotary = llama.LlamaRotaryEmbedding(config).to(case.device)(x, positions)
    return LayerProblem(case, layer, factors, x.requires_grad_(), dy, rotary)


def _own(problem: LayerProblem) -> nn.Module:
    """A layer of its own modules on the shared, frozen parameters."""
    shared = {id(p): p for p in problem.layer.parameters()}
    return copy.deepcopy(problem.layer, shared)


def _runner(problem: LayerProblem, layer: nn.Module, factors: tuple[Tensor, ...] = ()) -> Runner:
    def call(x: Tensor) -> Tensor:
        return layer(x, position_embeddings=problem.rotary)

    return Runner(call, factors)


def _frozen(problem: LayerProblem) -> Runner:
    return _runner(problem, _own(problem))


def _fill(problem: LayerProblem, layer: nn.Module, ends: tuple[str, str]) -> tuple[Tensor, ...]:
    """Puts A and B into the parameters ``<linear><end>`` and returns these in the order of the linears."""
    named, found = dict(layer.named_parameters()), []
    for name, values in problem.factors.items():
        for end, value in zip(ends, values, strict=True):
            parameter = named[f"{name}{end}"]
            parameter.data = value.clone()
            found.append(parameter.requires_grad_())
    return tuple(found)


def _peft_model(problem: LayerProblem, layer: nn.Module) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from peft import LoraConfig, inject_adapter_in_model

    case = problem.case
    options = {"r": case.rank, "lora_alpha": int(SCALING * case.rank), "lora_dropout": case.dropout_p}
    model = inject_adapter_in_model(LoraConfig(target_modules=list(LINEARS), **options), layer)
    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    return model.train(), _fill(problem, model, ends)


def _peft(problem: LayerProblem) -> Runner:
    return _runner(problem, *_peft_model(problem, _own(problem)))


def _peft_compiled(problem: LayerProblem) -> Runner:
    importlib.import_module("torch._functorch.config").donated_buffer = False
    torch._dynamo.reset()
    model, factors = _peft_model(problem, _own(problem))
    return _runner(problem, torch.compile(model, dynamic=False), factors)


def _peft_liger(problem: LayerProblem) -> Runner:
    """PEFT, with Liger's kernels for the norms and the gated activation."""
    liger = importlib.import_module("liger_kernel.transformers")
    layer, config = _own(problem), _config(problem.case)
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = liger.LigerRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        norm.weight = getattr(layer, name).weight
        setattr(layer, name, norm)
    with torch.device("meta"):
        mlp = liger.LigerSwiGLUMLP(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, getattr(layer.mlp, name))
    layer.mlp = mlp
    return _runner(problem, *_peft_model(problem, layer))


class _Recomputing(nn.Module):
    """A linear as the in-place Function of ``providers.py``."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return recomputing_function(rows, self.weight, self.a, self.b).view(*x.shape[:-1], -1)


def _recomputing(problem: LayerProblem) -> Runner:
    layer, factors = _own(problem), []
    for name, (a, b) in problem.factors.items():
        linear = _Recomputing(layer.get_submodule(name).weight, a, b)
        layer.set_submodule(name, linear)
        factors += [linear.a, linear.b]
    return _runner(problem, layer, tuple(factors))


def _ours_model(problem: LayerProblem) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from lora_kernels import LoRAConfig, apply_lora

    case = problem.case
    options = {"r": case.rank, "lora_alpha": int(SCALING * case.rank), "lora_dropout": case.dropout_p}
    model = apply_lora(_own(problem), LoRAConfig(target_modules=list(LINEARS), **options)).train()
    return model, _fill(problem, model, (".adapters.default.lora_A", ".adapters.default.lora_B"))


def _ours(problem: LayerProblem) -> Runner:
    return _runner(problem, *_ours_model(problem))


def _ours_compiled(problem: LayerProblem) -> Runner:
    importlib.import_module("torch._functorch.config").donated_buffer = False
    torch._dynamo.reset()
    model, factors = _ours_model(problem)
    return _runner(problem, torch.compile(model, dynamic=False), factors)


def _ours_in_peft(problem: LayerProblem) -> Runner:
    from lora_kernels.integrations.peft import accelerate

    model, factors = _peft_model(problem, _own(problem))
    accelerate(model)
    return _runner(problem, model, factors)


def outputs(runner: Runner, problem: LayerProblem, x: Tensor | None = None) -> tuple[Tensor, ...]:
    x = problem.x if x is None else x
    y = runner.call(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *runner.factors), problem.dy))


def _double(problem: LayerProblem) -> LayerProblem:
    def wide(t: Tensor) -> Tensor:
        return t.detach().double()

    factors = {name: (wide(a), wide(b)) for name, (a, b) in problem.factors.items()}
    x, dy = wide(problem.x).requires_grad_(), wide(problem.dy)
    rotary = (wide(problem.rotary[0]), wide(problem.rotary[1]))
    return LayerProblem(problem.case, copy.deepcopy(problem.layer).double(), factors, x, dy, rotary)


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Of each, the norm of the error over the norm: a layer's largest errors are a matter of luck."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@functools.lru_cache(maxsize=1)
def _reference(case: LayerCase) -> tuple[LayerProblem, dict[bool, tuple[tuple[Tensor, ...], list[float]]]]:
    """The problem; and with factors or without, what fp64 gives and by how much PyTorch's layer is off."""
    problem, found = make_problem(case), {}
    for with_factors, build in ((True, _peft), (False, _frozen)):
        wide = _double(problem)
        want = outputs(build(wide), wide)
        found[with_factors] = (want, errors(outputs(build(problem), problem), want))
    return problem, found


def check(provider: Provider, case: LayerCase) -> str | None:
    """Values and all gradients against fp64, dropout off; with dropout, that it acts and repeats."""
    length = min(case.length, MAX_TOKENS_CHECKED // case.batch)
    case = replace(case, length=max(1, length))
    problem, found = _reference(replace(case, dropout_p=0.0))
    runner = provider.build(problem)
    got, (want, eager) = outputs(runner, problem), found[bool(runner.factors)]
    names = ["y", "dx", *(f"d{letter} of {name}" for name in problem.factors for letter in "AB")]
    for name, error, base in zip(names, errors(got, want), eager, strict=False):
        if not error <= max(2 * base, 4 * torch.finfo(case.dtype).eps):
            return f"{name} is off by {error:.1e} of its norm, eager PyTorch by {base:.1e}"
    return _check_dropout(provider, case, got) if case.dropout_p and runner.factors else None


def _check_dropout(provider: Provider, case: LayerCase, plain: tuple[Tensor, ...]) -> str | None:
    """The masks themselves are checked on single linears."""
    problem = make_problem(case)
    runner = provider.build(problem)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(outputs(runner, problem)[0])
    if torch.equal(runs[0], plain[0]) or torch.equal(runs[0], runs[2]):
        return "dropout does not act"
    return None if torch.equal(runs[0], runs[1]) else "dropout does not follow torch's seed"


def _no_dropout(case: LayerCase, mode: str) -> str | None:
    return "its in-place path has no dropout" if case.dropout_p else None


def _cuda_only(case: LayerCase, mode: str) -> str | None:
    return None if case.device == "cuda" else "its kernels need CUDA"


def tokens_per_second(row: Row) -> float | None:
    """Of forward and backward together."""
    return row.plan.case.tokens / row.time.median * 1e6 if row.time and row.plan.mode == BOTH.name else None


_PEFT: Callable[[Any, str], str | None] = first_reason(needs("transformers"), needs("peft"))
PROVIDERS = (
    Provider(FROZEN, _frozen, needs("transformers")),
    Provider(PEFT, _peft, _PEFT),
    Provider("peft_compiled", _peft_compiled, _PEFT),
    Provider("peft_liger", _peft_liger, first_reason(_PEFT, _cuda_only, needs("liger_kernel.transformers"))),
    Provider("recomputing_function", _recomputing, first_reason(needs("transformers"), _no_dropout)),
    Provider("ours_apply_lora", _ours, needs("transformers")),
    Provider("ours_compiled", _ours_compiled, needs("transformers")),
    Provider("ours_in_peft", _ours_in_peft, _PEFT),
)
COMPILED = frozenset({"peft_compiled", "ours_compiled"})
UNCOMPILED = frozenset(provider.name for provider in PROVIDERS) - COMPILED


def training_plans(device: str, quick: bool) -> list[Plan]:
    small = LayerCase(2, 16, 64, 96, 4, 2, rank=8, dtype=torch.float32, device=device)
    if quick:
        cases = [replace(small, dropout_p=p) for p in (0.1, 0.0)]
        modes = (BOTH, FORWARD, BACKWARD, PEAK_MEMORY if device == "cuda" else SAVED_BYTES)
        return [Plan(case, mode.name, UNCOMPILED) for case in cases for mode in modes]
    if device == "cpu":
        half = LayerCase(1, 256, 1024, 3584, 8, 2, dtype=torch.float32)
        return [Plan(replace(half, dropout_p=p), BOTH.name, UNCOMPILED) for p in (0.1, 0.0)]
    plans = []
    for batch, rank, p in ((4, 16, 0.1), (4, 16, 0.0), (1, 16, 0.1), (4, 64, 0.1)):
        case = LayerCase(batch, 2048, rank=rank, dropout_p=p, device="cuda")
        main = (batch, rank) == (4, 16)
        plans.append(Plan(case, BOTH.name, None if main else UNCOMPILED, priority=1 if main else 3))
        plans.append(Plan(case, PEAK_MEMORY.name, UNCOMPILED, priority=1 if main else 3))
        if main:
            plans += [Plan(case, m.name, UNCOMPILED, False, priority=3) for m in (FORWARD, BACKWARD)]
    return plans


GOALS = (
    Goal(
        "Llama-3-8B layer, fwd+bwd on the H100, dropout 0.1, / frozen layer",
        *("4x2048x4096x14336/bfloat16/r16/p0.1", "both", FROZEN, 1.05, "ours_apply_lora"),
    ),
)

BENCHMARK = Benchmark(
    op="llama_layer",
    plans={TRAINING: training_plans},
    modes=(FORWARD, BACKWARD, BOTH, SAVED_BYTES, PEAK_MEMORY),
    providers=PROVIDERS,
    baselines={FROZEN: "frozen", PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=GOALS,
    derived=(Derived("tokens/s", tokens_per_second, 0),),
)
