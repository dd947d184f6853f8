"""A layer of MiniLM's size with random weights, from samples to adapters: ours, and PEFT's own.

Each start that reads samples, CorDA, EVA and LoRA-GA, on the six linears of the layer. A copy of the model is
made before the clock starts. PEFT's EVA goes through the samples until its vectors stay, ours once.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, apply_lora, calibrate

from .suites import Benchmark, Goal, Mode, Plan, Provider, Runner

OP = "starts"
OURS, PEFT = "ours", "peft"
STATISTIC = {"corda": "covariance", "eva": "activation_svd", "lora_ga": "gradient"}
TARGETS = ("query", "key", "value", "dense")
# How far a start may be from PEFT's span of A, and from the output of the base.
NEAR = 1e-3


@dataclass(frozen=True)
class Case:
    """A start, and the sizes of the encoder and its samples."""

    start: str
    layers: int = 1
    width: int = 384
    rank: int = 16
    tokens: tuple[int, int, int] = (8, 1, 128)
    device: str = "cpu"

    @property
    def label(self) -> str:
        return self.start

    @property
    def title(self) -> str:
        batches, rows, length = self.tokens
        samples = f"{batches} batches of {rows}x{length} tokens"
        return f"{self.start}, {self.layers} layers, {self.width} wide, {samples}, r={self.rank}"

    @property
    def columns(self) -> dict[str, object]:
        shape = f"{self.layers}x{self.width}"
        return {"start": self.start, "shape": shape, "dtype": "float32", "rank": self.rank}


@dataclass(frozen=True)
class Problem:
    """The model, and its batches with a target each."""

    case: Case
    model: nn.Module
    batches: list[dict[str, Tensor]]

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Some loss of the last hidden states."""
        hidden = model(**batch).last_hidden_state
        # Not the same of every number: a norm is the last thing in the model.
        loss: Tensor = (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().mean()
        return loss


def make_problem(case: Case) -> Problem:
    """Random weights and tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": case.width, "intermediate_size": 4 * case.width, "vocab_size": 1000}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # PEFT's LoRA-GA trains
    config = BertConfig(**sizes, **still, num_hidden_layers=case.layers, num_attention_heads=case.width // 32)
    model = BertModel(config, add_pooling_layer=False)
    batches, rows, length = case.tokens
    ids = [torch.randint(0, 1000, (rows, length), device=case.device) for _ in range(batches)]
    # Inputs with directions that matter more than others, as those of a trained model have.
    with torch.no_grad():
        spread = torch.logspace(1, -1, case.width)
        model.embeddings.LayerNorm.weight.copy_(spread)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(5)
    return Problem(case, model.eval().to(case.device), [{"input_ids": one} for one in ids])


def _ours(problem: Problem) -> Runner:
    def start(model: Any) -> Any:
        init = problem.case.start
        run = problem.loss if init == "lora_ga" else (lambda model, batch: model(**batch))
        statistics = calibrate(
            model, problem.batches, STATISTIC[init], target_modules=list(TARGETS), forward=run
        )
        config = LoRAConfig(r=problem.case.rank, target_modules=list(TARGETS), init_lora_weights=init)
        return apply_lora(model, config, statistics=statistics)

    return Runner(start)


def _peft(problem: Problem) -> Runner:
    return Runner(lambda model: STARTS_OF_PEFT[problem.case.start](problem, model))


def _peft_config(problem: Problem, **fields: Any) -> Any:
    from peft import LoraConfig

    init = problem.case.start
    rank = problem.case.rank
    return LoraConfig(r=rank, target_modules=list(TARGETS), init_lora_weights=init, **fields)


def _corda_of_peft(problem: Problem, model: Any) -> Any:
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = _peft_config(problem, corda_config=CordaConfig(corda_method="ipm"))
    with torch.no_grad():
        preprocess_corda(model, config, lambda: [model(**batch) for batch in problem.batches])
    return get_peft_model(model, config)


def _eva_of_peft(problem: Problem, model: Any) -> Any:
    from peft import get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import EvaConfig

    adapted = get_peft_model(model, _peft_config(problem, eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(
        adapted,
        problem.batches,
        forward_fn=lambda model, batch: model(**batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0].flatten(0, -2),
        show_progress_bar=False,
    )
    return adapted


def _lora_ga_of_peft(problem: Problem, model: Any) -> Any:
    from peft import get_peft_model
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def train(model: Any) -> None:
        for batch in problem.batches:
            problem.loss(model, batch).backward()

    config = _peft_config(problem, lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, lambda: train(model))
    return get_peft_model(model, config)


STARTS_OF_PEFT: dict[str, Callable[[Problem, Any], Any]] = {
    "corda": _corda_of_peft,
    "eva": _eva_of_peft,
    "lora_ga": _lora_ga_of_peft,
}


def _missing(case: Case, mode: str) -> str | None:
    needed = ("transformers", "peft") + (("attr",) if case.start == "corda" else ())
    return next((f"{name} is not installed" for name in needed if not importlib.util.find_spec(name)), None)


def _work(runner: Runner, problem: Problem) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: copy.deepcopy(problem.model), runner.call


START = Mode("start", "timed", work=_work)


def spans(model: Any) -> dict[str, Tensor]:
    """Name of each layer -> an orthonormal basis of the rows of its A."""
    from lora_kernels.nn import lora_pairs

    return {
        pair.name.removeprefix("base_model.model."): torch.linalg.qr(pair.lora_a.detach().T).Q
        for pair in lora_pairs(model)
    }


def check(provider: Provider, case: Case) -> str | None:
    """Why a start is wrong, or ``None``: its A spans what the other's does, the output is the base's.

    Of EVA nine tenths of the span: PEFT's stops once its vectors hardly move.
    """
    if _missing(case, START.name):
        return None
    problem = make_problem(Case(case.start, 1, 32, 8, (12, 1, 64), case.device))
    build = (provider.build, _ours if provider.name == PEFT else _peft)
    one, other = (make(problem).call(copy.deepcopy(problem.model)) for make in build)
    with torch.no_grad():
        want, got = (model(**problem.batches[0]).last_hidden_state for model in (problem.model, one.eval()))
    if (want - got).abs().max() > NEAR * want.abs().max():
        return f"the output is off by {(want - got).abs().max():.1e}"
    rows, others = spans(one), spans(other)
    if rows.keys() != others.keys():
        return f"it adapts {', '.join(rows)}"
    for name, basis in rows.items():
        alike = torch.linalg.svdvals(basis.T @ others[name]).mean().item()
        if alike < (0.9 if case.start == "eva" else 1 - NEAR):
            return f"{name}: the rows of A are alike by {alike:.4f}"
    return None


def plans(device: str, quick: bool) -> list[Plan]:
    """The three starts."""
    small: dict[str, Any] = {"layers": 1, "width": 32, "rank": 4, "tokens": (4, 1, 16)} if quick else {}
    return [Plan(Case(start, device=device, **small), START.name) for start in STATISTIC]


BENCHMARK = Benchmark(
    op=OP,
    plans={OP: plans},
    modes=(START,),
    providers=(Provider(PEFT, _peft, _missing), Provider(OURS, _ours, _missing)),
    baselines={PEFT: "PEFT"},
    problem=make_problem,
    check=check,
    goals=tuple(
        Goal(f"{start}, calibrated and applied / PEFT", start, START.name, PEFT, 1.0, OURS)
        for start in STATISTIC
    ),
)
