"""Who adds the delta of a mixed batch: rivals and ours, built on the same adapters.

    y_m += (x_m A_iᵀ) B_iᵀ with i the adapter of row m, for one linear or several that share x

What a server prepares once a step (order of the rows, segments, plans) is prepared before the clock starts,
for everybody. Scalings are 1, as vLLM keeps them in B.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import (
    add_multi_lora_,
    plan_batch,
    slice_adapters,
    stack_adapters,
    use_backend,
)
from lora_kernels._backend import unavailable
from lora_kernels.integrations import sglang as sglang_bridge
from lora_kernels.integrations import vllm as vllm_bridge

from .suites import Provider, Runner

PATTERNS = ("identical", "distinct", "uniform", "zipf", "skewed")
MIXED = (8, 16, 32, 64)
CHUNK = 16


@dataclass(frozen=True)
class ServingCase:
    """A batch of ``rows`` rows that use adapters out of ``adapters``, on linears of widths ``outs``.

    ``rank`` 0: the adapters' ranks are 8, 16, 32 and 64 in turn.
    """

    rows: int
    adapters: int
    pattern: str
    rank: int = 16
    cols: int = 4096
    outs: tuple[int, ...] = (4096,)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def shape(self) -> str:
        return f"{self.cols}x{'+'.join(map(str, self.outs))}"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.rank or MIXED[i % len(MIXED)] for i in range(self.adapters))

    @property
    def label(self) -> str:
        rank = f"r{self.rank or 'mixed'}"
        return f"B{self.rows}-D{self.adapters}-{self.pattern}/{self.shape}/{rank}/{self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return (
            f"{self.rows} rows, {self.adapters} adapters ({self.pattern}, {len(used(self))} in use), r ="
            f" {self.rank or 'mixed'}, {self.shape}, {self.dtype_name}"
        )

    @property
    def columns(self) -> dict[str, object]:
        values = {"rows": self.rows, "adapters": self.adapters, "pattern": self.pattern, "shape": self.shape}
        return values | {
            "rank": self.rank or "mixed",
            "dtype": self.dtype_name,
            "bytes_floor": floor_bytes(self),
        }


@functools.lru_cache(maxsize=4096)
def row_adapters(case: ServingCase) -> tuple[int, ...]:
    """Each row's adapter, in an order as requests come.

    Punica's popularity patterns: all rows one adapter; each row its own; uniform over the resident ones;
    a Zipf law of exponent 1.5; half of the rows one adapter and the rest uniform.
    """
    generator = torch.Generator().manual_seed(case.rows)
    weights = torch.ones(case.adapters)
    if case.pattern == "identical":
        weights[1:] = 0
    elif case.pattern == "zipf":
        weights = torch.arange(1, case.adapters + 1).float().pow(-1.5)
    elif case.pattern == "skewed" and case.adapters > 1:
        weights[0] = case.adapters - 1
    elif case.pattern == "distinct":
        return tuple((torch.randperm(case.rows, generator=generator) % case.adapters).tolist())
    return tuple(torch.multinomial(weights, case.rows, True, generator=generator).tolist())


def used(case: ServingCase) -> list[int]:
    """The adapters that any row uses."""
    return sorted(set(row_adapters(case)))


def floor_bytes(case: ServingCase) -> int:
    """Bytes that must move: the factors of the adapters in use, x once, y read and written."""
    factors = sum(case.ranks[i] * (case.cols * len(case.outs) + sum(case.outs)) for i in used(case))
    activations = case.rows * (case.cols + 2 * sum(case.outs))
    return (factors + activations) * case.dtype.itemsize


@dataclass(frozen=True)
class ServingProblem:
    """The tensors that all providers share; ``factors[s][i]`` are (A, B) of adapter i in linear s."""

    case: ServingCase
    x: Tensor
    y: Tensor
    ids: Tensor
    factors: tuple[tuple[tuple[Tensor, Tensor], ...], ...]

    def padded(self) -> tuple[list[Tensor], list[Tensor]]:
        """vLLM's stacks: A [D, 1, r_max, K] and B [D, 1, N, r_max] a linear, zero beyond a rank."""
        case, most = self.case, max(self.case.ranks)
        options = {"dtype": case.dtype, "device": case.device}
        stacks_a = [torch.zeros(case.adapters, 1, most, case.cols, **options) for _ in case.outs]
        stacks_b = [torch.zeros(case.adapters, 1, out, most, **options) for out in case.outs]
        for s, pairs in enumerate(self.factors):
            for i, (a, b) in enumerate(pairs):
                stacks_a[s][i, 0, : len(a)], stacks_b[s][i, 0, :, : len(a)] = a, b
        return stacks_a, stacks_b

    def packed(self) -> tuple[Tensor, Tensor]:
        """SGLang's: A [D, linears · r_max, K], side by side at the live rank, and B [D, ΣN, r_max]."""
        case, most = self.case, max(self.case.ranks)
        options = {"dtype": case.dtype, "device": case.device}
        stack_a = torch.zeros(case.adapters, len(case.outs) * most, case.cols, **options)
        for i, rank in enumerate(case.ranks):
            stack_a[i, : len(case.outs) * rank] = torch.cat([pairs[i][0] for pairs in self.factors])
        return stack_a, torch.cat([b[:, 0] for b in self.padded()[1]], 1).contiguous()


def make_problem(case: ServingCase) -> ServingProblem:
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=case.device)
        return drawn.mul_(scale).to(case.dtype)

    factors = tuple(
        tuple(
            (normal(r, case.cols, scale=case.cols**-0.5), normal(out, r, scale=r**-0.5)) for r in case.ranks
        )
        for out in case.outs
    )
    x, y = normal(case.rows, case.cols), normal(case.rows, sum(case.outs))
    return ServingProblem(case, x, y, torch.tensor(row_adapters(case), device=case.device), factors)


def exact(problem: ServingProblem) -> Tensor:
    """y + the delta in fp64."""
    y = problem.y.double()
    _add_by_loop(y, problem.x.double(), problem, torch.float64)
    return y


def _rows_of(problem: ServingProblem) -> dict[int, Tensor]:
    return {i: (problem.ids == i).nonzero().flatten() for i in used(problem.case)}


def _add_by_loop(
    y: Tensor, x: Tensor, problem: ServingProblem, dtype: torch.dtype, rows: dict[int, Tensor] | None = None
) -> None:
    for i, own in (rows or _rows_of(problem)).items():
        mine = x[own]
        for view, pairs in zip(y.split(problem.case.outs, 1), problem.factors, strict=True):
            a, b = (t.to(dtype) for t in pairs[i])
            view.index_add_(0, own, (mine @ a.T) @ b.T)


def _runner(problem: ServingProblem, add: Callable[[Tensor], object], backend: str | None = None) -> Runner:
    """``add`` adds the delta to its argument; each runner has a y of its own, and adds to it again."""
    y = problem.y.clone()

    def call(x: Tensor) -> Tensor:
        add(y)
        return y

    context = (lambda: use_backend(backend)) if backend else torch.no_grad
    return Runner(torch.no_grad()(call), (), context)


def _loop(problem: ServingProblem) -> Runner:
    """One adapter after the other on its rows; which rows those are is known."""
    rows, dtype = _rows_of(problem), problem.case.dtype
    return _runner(problem, lambda y: _add_by_loop(y, problem.x, problem, dtype, rows))


class _Given(nn.Linear):
    """A base layer whose product is there already: what remains of a PEFT layer is the delta."""

    def forward(self, x: Tensor) -> Tensor:
        return self.given


def _peft_layer(problem: ServingProblem, s: int) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    case = problem.case
    base = _Given(case.cols, case.outs[s], bias=False, device="meta")
    base.weight = nn.Parameter(torch.empty(case.outs[s], case.cols, device=case.device, dtype=case.dtype))
    layer = None
    for i, (a, b) in enumerate(problem.factors[s]):
        options = {"r": len(a), "lora_alpha": len(a), "lora_dropout": 0.0, "init_lora_weights": False}
        config = LoraConfig(**options)
        if layer is None:
            layer = Linear(base, "a0", config, r=len(a), lora_alpha=len(a), init_lora_weights=False)
        else:
            layer.update_layer(f"a{i}", len(a), lora_alpha=len(a), config=config)
        with torch.no_grad():
            layer.lora_A[f"a{i}"].weight = nn.Parameter(a)
            layer.lora_B[f"a{i}"].weight = nn.Parameter(b)
    return layer.eval()


def _peft(problem: ServingProblem) -> Runner:
    """PEFT's mixed batch: the real layer, over a base whose product costs nothing."""
    layers = [_peft_layer(problem, s) for s in range(len(problem.case.outs))]
    names = [f"a{i}" for i in problem.ids.tolist()]

    def add(y: Tensor) -> None:
        for layer, view in zip(layers, y.split(problem.case.outs, 1), strict=True):
            layer.base_layer.given = view
            layer(problem.x, adapter_names=names)

    return _runner(problem, add)


def _vllm_torch(problem: ServingProblem) -> Runner:
    """What vLLM does without Triton, after its published semantics: gather each row's weights, multiply."""
    stacks_a, stacks_b = problem.padded()
    ids, outs = problem.ids, problem.case.outs

    def add(y: Tensor) -> None:
        for view, a, b in zip(y.split(outs, 1), stacks_a, stacks_b, strict=True):
            h = torch.einsum("mk,mrk->mr", problem.x, a[:, 0][ids])
            view += torch.einsum("mr,mnr->mn", h, b[:, 0][ids])

    return _runner(problem, add)


def _vllm_meta(problem: ServingProblem) -> tuple[Tensor, ...]:
    """The metadata arguments of vLLM 0.33.0's kernels, with the grid for the adapters in use."""
    case, device = problem.case, problem.case.device
    ids, counts = problem.ids.unique(return_counts=True)
    active = torch.full((case.adapters + 1,), -1, dtype=torch.int32, device=device)
    lens, starts = (torch.zeros(case.adapters + n, dtype=torch.int32, device=device) for n in (1, 2))
    active[: len(ids)], lens[: len(ids)], starts[1 : len(ids) + 1] = ids.int(), counts.int(), counts.cumsum(0)
    order = problem.ids.sort(stable=True).indices.int()
    return (problem.ids.int(), order, lens, starts, active, torch.tensor([False]), torch.tensor([len(ids)]))


def _vllm_triton(problem: ServingProblem) -> Runner:
    ops = importlib.import_module("vllm.lora.ops.triton_ops")
    stacks_a, stacks_b = problem.padded()
    meta, case = _vllm_meta(problem), problem.case
    h = torch.empty(len(case.outs), case.rows, max(case.ranks), dtype=torch.float32, device=case.device)

    def add(y: Tensor) -> None:
        ops.lora_shrink(problem.x, stacks_a, h, *meta, 1.0)
        ops.lora_expand(h, stacks_b, y, *meta, offset_start=0, add_inputs=True)

    return _runner(problem, add)


def _vllm_bridge(problem: ServingProblem) -> Runner:
    (stacks_a, stacks_b), meta = problem.padded(), _vllm_meta(problem)
    return _runner(
        problem, lambda y: vllm_bridge.add_lora_linear(y, problem.x, stacks_a, stacks_b, *meta), "auto"
    )


@dataclass
class SglangBatch:
    """The fields of SGLang 0.5.23's LoRABatchInfo: sorted rows cut into chunks of at most 16."""

    num_segments: int
    seg_indptr: Tensor
    weight_indices: Tensor
    seg_lens: Tensor
    permutation: Tensor
    lora_ranks: Tensor
    scalings: Tensor
    bs: int
    max_len: int = CHUNK
    use_cuda_graph: bool = False


def _sglang_batch(problem: ServingProblem) -> SglangBatch:
    case, device = problem.case, problem.case.device
    owners, lens = [], []
    for i, own in _rows_of(problem).items():
        cuts = [min(CHUNK, len(own) - first) for first in range(0, len(own), CHUNK)]
        owners, lens = owners + [i] * len(cuts), lens + cuts
    counts = torch.tensor(lens, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    return SglangBatch(
        *(
            len(lens),
            starts.to(device),
            torch.tensor(owners, dtype=torch.int32).to(device),
            counts.to(device),
        ),
        problem.ids.sort(stable=True).indices.int(),
        torch.tensor(case.ranks, dtype=torch.int32, device=device),
        torch.ones(case.adapters, device=device),
        len(lens),
    )


def _sglang_csgmv(split_k: int | None) -> Callable[[ServingProblem], Runner]:
    def build(problem: ServingProblem) -> Runner:
        dense = "sglang.kernels.ops.lora.dense"
        shrink = importlib.import_module(f"{dense}.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
        expand = importlib.import_module(f"{dense}.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
        (stack_a, stack_b), batch, outs = problem.packed(), _sglang_batch(problem), problem.case.outs
        offsets = torch.tensor([0, *outs], dtype=torch.int32).cumsum(0).int()
        on_device = offsets.to(problem.case.device)

        def add(y: Tensor) -> None:
            h = shrink(problem.x, stack_a, batch, len(outs), split_k=split_k)
            expand(h, stack_b, batch, on_device, max(outs), y, offsets if len(outs) > 1 else None)

        return _runner(problem, add)

    return build


def _sglang_triton_v2(problem: ServingProblem) -> Runner:
    """The plan of SGLang's table for the card and shape, on one stream: there is no base GEMM to overlap."""
    runner_module = importlib.import_module("sglang.srt.lora.dense.runner")
    plan_module = importlib.import_module("sglang.srt.lora.dense.plan")
    workspace = importlib.import_module("sglang.srt.lora.workspace").LoraWorkspace()
    phase = importlib.import_module("sglang.srt.lora.utils").Phase.DECODE
    case, device = problem.case, torch.device(problem.case.device)
    (stack_a, stack_b), batch = problem.packed(), _sglang_batch(problem)
    runner = runner_module.DenseLoraRunner(workspace, max_loras=case.adapters, device=device)
    runner.begin_batch(
        token_slots=problem.ids.int(),
        lora_ranks=batch.lora_ranks,
        scalings=batch.scalings,
        num_tokens=case.rows,
        phase=phase,
        graph_mode=False,
    )
    kind = plan_module.DenseLoraKind.LINEAR
    plan = runner.plan_for(kind, max(case.ranks), case.cols, sum(case.outs), num_tokens=case.rows)
    offsets = tuple([0, *torch.tensor(case.outs).cumsum(0).tolist()])

    def add(y: Tensor) -> None:
        bridge = runner.run_a(problem.x, stack_a, stack=len(case.outs), plan=plan)
        runner.run_b(bridge, stack_b, y, offsets=offsets, plan=plan)

    return _runner(problem, add)


def _sglang_bridge(problem: ServingProblem) -> Runner:
    (stack_a, stack_b), batch, outs = problem.packed(), _sglang_batch(problem), problem.case.outs
    return _runner(
        problem,
        lambda y: sglang_bridge.add_lora_linear(y, problem.x, stack_a, stack_b, batch, outs),
        "auto",
    )


def _ours(backend: str) -> Callable[[ServingProblem], Runner]:
    def build(problem: ServingProblem) -> Runner:
        stacks = [stack_adapters([a for a, _ in pairs], [b for _, b in pairs]) for pairs in problem.factors]
        adapters = stacks[0] if len(stacks) == 1 else slice_adapters(*stacks)
        plan = plan_batch(problem.ids, problem.case.adapters)
        ids = problem.ids
        return _runner(problem, lambda y: add_multi_lora_(y, problem.x, adapters, ids, plan=plan), backend)

    return build


def _needs(module: str) -> Callable[[ServingCase, str], str | None]:
    def missing(case: ServingCase, mode: str) -> str | None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} does not import ({error}); --rival-path names a folder that has it"
        return None

    return missing


def _cuda_rival(module: str) -> Callable[[ServingCase, str], str | None]:
    def missing(case: ServingCase, mode: str) -> str | None:
        if case.device != "cuda":
            return "its kernels are not timed in Triton's interpreter"
        return _needs(module)(case, mode)

    return missing


def _host_only(case: ServingCase, mode: str) -> str | None:
    if case.device != "cpu":
        return "it copies lists of row numbers to the card at each call, which a CUDA graph cannot hold"
    return _needs("peft")(case, mode)


def _backend_missing(backend: str) -> Callable[[ServingCase, str], str | None]:
    def missing(case: ServingCase, mode: str) -> str | None:
        if backend == "triton" and case.device == "cpu":
            return "its kernels are not timed in Triton's interpreter"
        if backend == "reference" and case.device == "cuda":
            return "it asks the card for the segments at each call, which a CUDA graph cannot hold"
        return unavailable(backend, case.device, case.dtype, max(case.ranks))

    return missing


PROVIDERS = (
    Provider("loop", _loop),
    Provider("peft", _peft, _host_only),
    Provider("vllm_torch", _vllm_torch),
    Provider("vllm_triton", _vllm_triton, _cuda_rival("vllm.lora.ops.triton_ops")),
    Provider(
        "sglang_csgmv", _sglang_csgmv(None), _cuda_rival("sglang.kernels.ops.lora.dense.chunked_sgmv_shrink")
    ),
    Provider(
        "sglang_csgmv_split",
        _sglang_csgmv(8),
        _cuda_rival("sglang.kernels.ops.lora.dense.chunked_sgmv_shrink"),
    ),
    Provider("sglang_triton_v2", _sglang_triton_v2, _cuda_rival("sglang.srt.lora.dense.runner")),
    Provider("ours_reference", _ours("reference"), _backend_missing("reference")),
    Provider("ours_cpp", _ours("cpp"), _backend_missing("cpp")),
    Provider("ours_triton", _ours("triton"), _backend_missing("triton")),
    Provider("ours_cuda", _ours("cuda"), _backend_missing("cuda")),
    Provider("ours_in_vllm", _vllm_bridge),
    Provider("ours_in_sglang", _sglang_bridge),
)
