"""How the suite ``schedules`` builds a step with each optimiser and schedule, and the one without it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_kernels import LoRAConfig, apply_lora, optim, schedules

# Steps from one act to the next where none is to fall due, and of trainings that do not end.
NEVER = 10**9
LR = 1e-5
Step = Callable[[], Any]


@dataclass(frozen=True)
class Scene:
    """What the steps of one point share: the sizes of the Llama, and its tokens."""

    width: int
    rank: int
    tokens: Tensor

    def llama(self) -> nn.Module:
        """Two layers with random weights, the same each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": self.width, "intermediate_size": 11 * self.width // 4, "vocab_size": 1024}
        config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
        return LlamaForCausalLM(config).train().to(self.tokens.device)

    def adapted(self, method: str = "lora", targets: list[str] | str = "all-linear", **options: Any) -> Any:
        """The same with adapters."""
        fields = {"r": self.rank, "lora_alpha": 2 * self.rank, "exclude_modules": ["lm_head"], **options}
        return apply_lora(self.llama(), LoRAConfig(method=method, target_modules=targets, **fields))

    def loss(self, model: Any) -> Tensor:
        """Of the next token."""
        loss: Tensor = model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def batches(self) -> Iterator[Tensor]:
        """The same samples without end."""
        return itertools.repeat(self.tokens)


def adamw(model: nn.Module) -> Optimizer:
    """What the steps without an optimiser of ours take."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)


def training(
    scene: Scene,
    model: Any,
    optimizer: Optimizer | None = None,
    schedule: Any = None,
    loss: Callable[[], Tensor] | None = None,
    before: Callable[[], object] = lambda: None,
) -> Step:
    """A step of training; ``before`` the optimiser's step the gradients are there."""
    optimizer = optimizer or adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        (loss() if loss else scene.loss(model)).backward()
        before()
        optimizer.step()
        if schedule is not None:
            schedule.step()

    return step


@dataclass(frozen=True)
class Recipe:
    """A method's step in one phase, the step without it, and the most that the ratio of the two should be."""

    key: str
    phase: str
    limit: float
    step: Callable[[Scene], Step]
    without: Callable[[Scene], Step]
    # Whether both move weights for sure.
    moves: bool = True


# A step on which a method does not act, and one on which it does: the action is at most a step of its own.
QUIET, ACTING = ("quiet", 1.05), ("acting", 2.0)
# Where a method is several passes by definition: the step beside as many passes of the plain model.
PASSES = ("passes", 1.05)
Attach = Callable[[Any, Optimizer, Scene], Any]


def _lora(scene: Scene) -> Any:
    return scene.adapted()


def _whole(scene: Scene) -> Any:
    return scene.llama()


def _of(method: str, **options: Any) -> Callable[[Scene], Any]:
    return lambda scene: scene.adapted(method, **options)


def _scheduled(
    key: str, phase: tuple[str, float], attach: Attach, model_of: Callable[[Scene], Any] = _lora
) -> Recipe:
    """A schedule beside AdamW on the same model."""

    def step(scene: Scene) -> Step:
        model = model_of(scene)
        optimizer = adamw(model)
        return training(scene, model, optimizer, attach(model, optimizer, scene))

    return Recipe(key, *phase, step, lambda scene: training(scene, model_of(scene)))


def _optimised(
    key: str,
    phase: tuple[str, float],
    make: Callable[[Any], Optimizer],
    plain: Callable[[Scene], Any] = _lora,
) -> Recipe:
    """An optimiser beside AdamW; ``plain`` is the model that AdamW trains."""

    def step(scene: Scene) -> Step:
        model = _whole(scene) if key == "flora_opt" else _lora(scene)
        return training(scene, model, make(model))

    return Recipe(key, *phase, step, lambda scene: training(scene, plain(scene)))


def _passes(scene: Scene, count: int, model_of: Callable[[Scene], Any] = _lora) -> Step:
    """As many forward and backward passes, and one step of AdamW."""
    model = model_of(scene)
    optimizer = adamw(model)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(count):
            scene.loss(model).backward()
        optimizer.step()

    return step


def _in_passes(
    key: str, count: int, step: Callable[[Scene], Step], model_of: Callable[[Scene], Any] = _lora
) -> list[Recipe]:
    """A method of ``count`` passes: beside one step, and beside as many passes."""
    return [
        Recipe(key, *ACTING, step, lambda scene: training(scene, model_of(scene))),
        Recipe(key, *PASSES, step, lambda scene: _passes(scene, count, model_of)),
    ]


def _adalora(phase: tuple[str, float], every: int) -> Recipe:
    def step(scene: Scene) -> Step:
        model = scene.adapted("adalora")
        schedule = schedules.AdaLoRA(model, NEVER, target_r=scene.rank // 2, delta_t=every)
        return training(
            scene, model, None, schedule, lambda: scene.loss(model) + 0.5 * schedules.adalora_penalty(model)
        )

    return Recipe("adalora", *phase, step, lambda scene: training(scene, scene.adapted("adalora")))


def _delta_lora(phase: tuple[str, float]) -> Recipe:
    def attach(model: Any, optimizer: Optimizer, scene: Scene) -> Any:
        schedule = schedules.DeltaLoRA(model, lam=0.5, start_step=0)
        if phase is ACTING:  # every step is its K-th
            schedule.start_step = 1
            schedule.step = lambda: schedule.act(1)  # type: ignore[method-assign]
        return schedule

    return _scheduled("delta_lora", phase, attach, _of("delta_lora"))


def _rank_warmup(phase: tuple[str, float], steps: int) -> Recipe:
    def attach(model: Any, optimizer: Optimizer, scene: Scene) -> Any:
        schedule = schedules.RankWarmup(model, optimizer, r_lo=4, steps=steps)
        if phase is ACTING:  # every step ends the warm-up
            schedule.step = lambda: torch.no_grad()(schedule.act)(1)  # type: ignore[method-assign]
        return schedule

    return _scheduled("lora_asr_study", phase, attach)


def _warming_up(scene: Scene) -> Any:
    """Bayesian-LoRA before its gates count: outside of a schedule they do from the start."""
    model = scene.adapted("blora")
    schedules.BLoRA(model, warmup=NEVER)
    return model


def _bilevel(key: str) -> Callable[[Scene], Step]:
    cls = {"bilora": schedules.BiLoRA, "autolora_rank": schedules.AutoLoRA}[key]

    def step(scene: Scene) -> Step:
        model = _softmax(scene)
        schedule = cls(model, lambda _: scene.loss(model), scene.batches(), scene.batches(), lr=LR)
        return training(scene, model, None, schedule)

    return step


def _softmax(scene: Scene) -> Any:
    return scene.adapted("bilora", method_options={"values": "softmax"})


def _hiddenkey(scene: Scene, kl: float) -> Step:
    model = _lora(scene)
    layers = model.model.layers
    regulariser = schedules.HiddenKey([one.self_attn for one in layers], [one.mlp for one in layers], kl=kl)
    forward = lambda: model(input_ids=scene.tokens, labels=scene.tokens)  # noqa: E731
    return training(scene, model, loss=lambda: regulariser.loss(forward))


def _lampat(scene: Scene) -> Step:
    model = _lora(scene)
    optimizer = adamw(model)
    embeddings = model.get_input_embeddings()(scene.tokens).detach()

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), scene.tokens[:, 1:].flatten())

    def step() -> None:
        optimizer.zero_grad()
        schedules.adversarial_step(lambda e: model(inputs_embeds=e).logits, embeddings, loss)
        optimizer.step()

    return step


ASCENTS = 1


def _advlora(scene: Scene) -> Step:
    model = scene.adapted("advlora", init_lora_weights="clusters")
    embeddings = model.get_input_embeddings()(scene.tokens).detach()

    def loss(e: Tensor) -> Tensor:
        found: Tensor = model(inputs_embeds=e, labels=scene.tokens).loss
        return found

    options: dict[str, Any] = {"steps": ASCENTS, "bounds": None, "radius": 1e-2}
    return training(scene, model, loss=lambda: schedules.advlora_loss(loss, embeddings, **options))


def _reducer(phase: tuple[str, float], every: int) -> Recipe:
    def step(scene: Scene) -> Step:
        model = scene.llama()
        reducer = schedules.RankReducer(model, every=every, eps=0.1)
        return training(scene, model, None, reducer, before=reducer.pull)

    return Recipe("tensor_rank_reduction", *phase, step, lambda scene: training(scene, scene.llama()))


class _Tagger(nn.Module):
    """A class for each sequence from its embedded tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=embeddings).logits[:, -1]
        return logits


PGD_STEPS = 2


def _robust(scene: Scene) -> Step:
    model = _lora(scene).requires_grad_(True)
    branches = schedules.TwoBranches(_Tagger(model))
    optimizer = adamw(model)
    labels = scene.tokens[:, -1]
    x = model.get_input_embeddings()(scene.tokens).detach().sigmoid()

    def loss() -> Tensor:
        attacked = schedules.pgd(branches.adversarial, x, labels, steps=PGD_STEPS)
        natural, adversarial = branches.natural(x), branches.adversarial(attacked)
        return schedules.two_branch_loss(natural, adversarial, labels, 0.5, 3.0)

    return training(scene, model, optimizer, loss=loss)


def _explora(scene: Scene, merging: bool) -> Step:
    """Merging needs the adapters anew: both are in the step that does."""
    model = scene.llama()

    def apply() -> None:
        schedules.apply_explora(model, model.model.layers, r=scene.rank)

    apply()
    step = training(scene, model)
    if not merging:
        return step

    def merge() -> None:
        step()
        schedules.merge_and_restart(model)
        model.requires_grad_(False)
        apply()

    return merge


def _inflora(scene: Scene, beginning: bool) -> Step:
    model = _lora(scene)
    schedule = schedules.InfLoRA(model, NEVER)
    batches = [scene.tokens]

    def begin() -> None:
        schedule.begin_task(lambda ids: model(input_ids=ids), batches)

    begin()
    step = training(scene, model)
    return (lambda: (step(), begin())) if beginning else step


def _dfo(scene: Scene) -> Step:
    model = _one_layer(scene)
    optimizer = optim.DerivativeFree(model, dim=16, popsize=POPULATION)
    return lambda: optimizer.step(lambda ids: _losses(model, ids), scene.tokens)


def _forwards(scene: Scene) -> Step:
    """The same population one by one: the present z, and each candidate."""
    model = _one_layer(scene)

    def step() -> None:
        with torch.no_grad():
            for _ in range(POPULATION + 1):
                _losses(model, scene.tokens)

    return step


POPULATION = 4


def _one_layer(scene: Scene) -> Any:
    return scene.adapted(targets=["layers.1.self_attn.q_proj"])


def _losses(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def _every(key: str, make: Callable[[Any, Optimizer, int], Any], model_of: Any = _lora) -> list[Recipe]:
    """A schedule that acts once in so many steps."""
    return [
        _scheduled(key, QUIET, lambda m, o, s: make(m, o, NEVER), model_of),
        _scheduled(key, ACTING, lambda m, o, s: make(m, o, 1), model_of),
    ]


def _aflora(model: Any, optimizer: Optimizer, window: int) -> Any:
    return schedules.AFLoRAFreezer(model, total_steps=NEVER, t_i=1, t_f=1, window=window)


def _rose(model: Any, begin: int) -> Any:
    return schedules.RoseLoRA(model, density=0.05, t_i=begin, t_f=begin + 20)


RECIPES: tuple[Recipe, ...] = (
    # Optimisers: they act on every step, and are held to a quiet step's figure.
    _optimised("lora_plus", QUIET, lambda m: optim.lora_plus(m, lr=LR, ratio=16)),
    _optimised("lora_fa_opt", QUIET, lambda m: optim.LoRAFA(m, LR)),
    _optimised("riemannian_lora", QUIET, lambda m: optim.riemannian(m, lr=LR)),
    _optimised("flora_opt", QUIET, lambda m: optim.Flora(m.parameters(), LR, beta1=0.9, kappa=NEVER), _whole),
    _optimised("flora_opt", ACTING, lambda m: optim.Flora(m.parameters(), LR, beta1=0.9, kappa=1), _whole),
    _optimised("galore", QUIET, lambda m: optim.GaLoreAdamW(m, LR, update_proj_gap=NEVER), _whole),
    _optimised("galore", ACTING, lambda m: optim.GaLoreAdamW(m, LR, update_proj_gap=1), _whole),
    Recipe("dfo_lora", *PASSES, _dfo, _forwards, moves=False),
    # Schedules.
    *_every("plora", lambda m, o, n: schedules.PeriodicLoRA(m, o, every=n)),
    *_every("lorasc", lambda m, o, n: schedules.LoRASC(m, o, every=n)),
    *_every("relora", lambda m, o, n: schedules.ReLoRA(m, o, every=n)),
    *_every("lisa", lambda m, o, n: schedules.LISA(m, m.model.layers, n_active=1, interval=n), _whole),
    *_in_passes("hiddenkey", 2, lambda scene: _hiddenkey(scene, 0.1)),
    Recipe(
        "hiddenkey", *QUIET, lambda scene: _hiddenkey(scene, 0.0), lambda scene: training(scene, _lora(scene))
    ),
    *_in_passes("autolora_robust", 2 + PGD_STEPS, _robust, lambda s: _lora(s).requires_grad_(True)),
    *_in_passes("lampat", 3, _lampat),
    Recipe("inflora", *QUIET, lambda s: _inflora(s, False), lambda s: training(s, _lora(s))),
    # A task's start sets B to zero again.
    Recipe("inflora", *ACTING, lambda s: _inflora(s, True), lambda s: training(s, _lora(s)), moves=False),
    Recipe("explora", *ACTING, lambda s: _explora(s, True), lambda s: _explora(s, False)),
    _scheduled(
        "lamda_freezer",
        QUIET,
        lambda m, o, s: schedules.LaMDAFreezer(m, max_steps=NEVER),
        _of("lamda"),
    ),
    *_every("aflora_freezer", _aflora, _of("aflora")),
    _scheduled("dylora_sampler", QUIET, lambda m, o, s: schedules.DyLoRASampler(m), _of("dylora")),
    _scheduled("sora_schedule", QUIET, lambda m, o, s: schedules.SoRASchedule(m, xis=(1e-6,)), _of("sora")),
    # Rank allocation and pruning.
    _adalora(QUIET, NEVER),
    _adalora(ACTING, 1),
    *_every("prilora", lambda m, o, n: schedules.PRILoRA(m, every=n)),
    _scheduled("roselora", QUIET, lambda m, o, s: _rose(m, NEVER)),
    _scheduled("roselora", ACTING, lambda m, o, s: _rose(m, 0)),
    _delta_lora(QUIET),
    _delta_lora(ACTING),
    _scheduled(
        "alora_alloc",
        QUIET,
        lambda m, o, s: schedules.ALoRAAllocator(m, lambda: s.loss(m), o, first=NEVER),
        _of("alora_alloc"),
    ),
    _scheduled("blora", QUIET, lambda m, o, s: schedules.BLoRA(m, warmup=NEVER), _warming_up),
    _scheduled("blora", ACTING, lambda m, o, s: schedules.BLoRA(m), _of("blora")),
    _rank_warmup(QUIET, NEVER),
    _rank_warmup(ACTING, 1),
    _reducer(QUIET, NEVER),
    _reducer(ACTING, 1),
    *_in_passes("advlora_loss", 2 + ASCENTS, _advlora, _of("advlora", init_lora_weights="clusters")),
    *_in_passes("bilora", 4, _bilevel("bilora"), _softmax),
    *_in_passes("autolora_rank", 5, _bilevel("autolora_rank"), _softmax),
)
# Of the register's steps those without a step of training of their own, and why.
WITHOUT_STEP = {
    "rank_adaptor": "a search over whole trainings",
    "lonas_search": "a search after training",
    "lorap": "a compression before training",
}
