"""Several adapters trained at once on one base: every sample of a batch has its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig
from ..ops.adapter_stack import AdapterStack, stack_adapters
from ..ops.batch_plan import BatchPlan, plan_batch
from ..ops.multi_lora_fusion import multi_lora_fusion
from ..ops.multi_lora_linear import multi_lora_linear
from . import owned
from .adapted import lora_layers
from .apply import apply_lora
from .linear import LoRALinear
from .rows import Samples, Trial, row_ids, trial
from .switch import set_adapter

BASE = "__base__"
_CHECKPOINT = "_gradient_checkpointing_func"  # where the modules of Transformers keep theirs
_SHOWN = "_lora_samples"  # where a model keeps what a trial showed of its layers
_Change = tuple[nn.Module, str, Any]  # (module, attribute, value)


def train_adapters(model: nn.Module, configs: Mapping[str, LoRAConfig]) -> dict[str, list[nn.Parameter]]:
    """Puts one adapter for each config on ``model`` and trains all of them; see :func:`mixed_adapters`.

    Args:
        model: any module; the linears that the configs target become :class:`LoRALinear`.
        configs: adapter name -> what it is. Rank, scale, dropout and targets may differ.

    Returns:
        Adapter name -> its parameters, for an optimiser of its own.

    Raises:
        ValueError: no config, or as :func:`apply_lora`; the adapters before the one that failed stay.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> trained = train_adapters(nn.Sequential(nn.Linear(4, 4)), {"a": config, "b": config})
        >>> optimizers = {name: torch.optim.AdamW(own) for name, own in trained.items()}
    """
    if not configs:
        raise ValueError("configs: expected at least one adapter, got none")
    for name, config in configs.items():
        apply_lora(model, config, name)
    set_adapter(model, list(configs))
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in configs}
    for layer in lora_layers(model).values():
        for name in configs:
            if name in layer.adapters:
                parameters[name] += [p for p in layer.adapters[name].parameters() if p.requires_grad]
    return parameters


@contextlib.contextmanager
def mixed_adapters(
    model: nn.Module,
    adapter_names: Sequence[str] | Sequence[Sequence[str]],
    repeats: Collection[int] = (),
    batch_dim: int | None = None,
    weights: Tensor | None = None,
    fusion: bool = False,
) -> Iterator[None]:
    """Inside the ``with`` block, sample i of every batch uses ``adapter_names[i]``, and no other adapter.

    With weights it uses several, ``adapter_names[i][j]`` with ``weights[i, j]``: their sum, or with
    ``fusion`` one adapter whose factors are the weighted sums of theirs (:func:`multi_lora_fusion`).

    For training: the gradient of each adapter is what its samples give, as if it were alone; one that no
    sample uses gets zeros. The backward pass may come after the block, also where a Transformers model
    checkpoints its activations; where you call :func:`torch.utils.checkpoint.checkpoint` yourself, it belongs
    into the block, since it computes the layers again. Each adapter has its own dropout, rank and scale. One
    batch at a time: the block changes the layers for every thread.

    The first call of ``model`` with different adapters runs it once more, on up to three samples, each given
    twice, without gradients, to see which dimension of each layer's input follows them, whether it is
    ``[B, T, H]`` or ``[T, B, H]``. A Transformers model has the samples first in its own inputs; for another
    one whose inputs are square, with as many tokens as samples, say ``batch_dim``.

    Args:
        model: one whose adapters :func:`apply_lora` or :func:`train_adapters` put there.
        adapter_names: one a sample, or a list of as many for each, ``"__base__"`` for none.
        repeats: how many rows next to each other may belong to one sample in a layer's input, besides one:
            the tokens of sequences that the model flattens to ``[samples · tokens, features]``.
        batch_dim: which dimension of every layer's input is the samples; no trial then.
        weights: ``[samples, k]``, where there are several a sample; differentiable.
        fusion: whether factors are averaged before they are multiplied; dropout has one mask then.

    Raises:
        TypeError: ``repeats`` or ``batch_dim`` are no ints.
        ValueError: ``weights`` are not one for each name; no layer has an adapter of that name; a layer that
            is no linear, or a method that scales its output (DoRA), is asked for; or nothing tells which
            rows of an input are which sample's.
        RuntimeError: a layer is merged.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> model = apply_lora(apply_lora(nn.Sequential(nn.Linear(4, 4)), config, "a"), config, "b")
        >>> with mixed_adapters(model, ["a", "b", "a"]):
        ...     y = model(torch.randn(3, 4))
    """
    used = _checked_names(adapter_names, weights, fusion)
    # With weights no two samples are alike, whatever their names.
    names = adapter_names if weights is None else [str(i) for i in range(len(weights))]
    samples = Samples.said(names, repeats, batch_dim)  # type: ignore[arg-type]
    layers = lora_layers(model)
    known = {name for layer in layers.values() for name in layer.adapters}
    for name in used:
        if name != BASE and name not in known:
            raise ValueError(f"adapter_names: expected {', '.join(sorted(known))} or {BASE}, got {name!r}")
    for name in sorted(owned.acting(model)):
        raise ValueError(f"adapter_names: {name!r} owns parameters of the model, which act for a whole batch")
    for place, layer in layers.items():
        layer._must_be_unmerged("mix adapters")
        if not isinstance(layer, LoRALinear) or not layer.plain_forward:
            raise ValueError(
                f"model: {place}: expected a LoRALinear, got {layer.base_type.__name__} with adapters"
            )
    shown = vars(model).get(_SHOWN, {})
    batch = _Batch(samples, shown, used, weights, fusion)
    changes: list[_Change] = [
        (layer, "forward", partial(_forward, layer, batch, place)) for place, layer in layers.items()
    ]
    changes += [(layer, "_mixed", place) for place, layer in layers.items()]
    checkpoints: list[_Change] = [
        (module, _CHECKPOINT, partial(_checkpointed, changes, vars(module)[_CHECKPOINT]))
        for module in model.modules()
        if _CHECKPOINT in vars(module)
    ]
    with _changed(changes), _changed(checkpoints), _asked(model, batch):
        yield


def _checked_names(names: Sequence[Any], weights: Tensor | None, fusion: bool) -> list[str]:
    """The names one after the other: one a sample, or as many of each as there are weights."""
    if weights is None:
        if fusion or not all(isinstance(name, str) for name in names):
            raise ValueError("weights: expected one for each of several adapters a sample, got None")
        return list(names)
    counts = sorted({1 if isinstance(one, str) else len(one) for one in names})
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else None
    if any(isinstance(one, str) for one in names) or len(counts) > 1 or shape != (len(names), *counts):
        got = f"shape {shape}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"weights: expected one for each adapter of {len(names)} samples that have"
            f" {' or '.join(map(str, counts)) or 'no'}, got {got}"
        )
    return [one for name in names for one in name]


class _Batch:
    """The samples of the batch in flight, where the layers have them, and the plans that layers share."""

    def __init__(
        self,
        samples: Samples,
        shown: dict[str, frozenset[int]],
        used: list[str],
        weights: Tensor | None,
        fusion: bool,
    ) -> None:
        self.samples, self.shown = samples, shown
        # The names, sample after sample, as many of each as it has weights.
        self.used, self.weights, self.fusion = used, weights, fusion
        self.plans: dict[tuple[object, ...], Any] = {}
        self.trial: Trial | None = None

    @contextlib.contextmanager
    def watched(self, seen: Trial) -> Iterator[None]:
        """Inside the ``with`` block the layers are their base, and tell ``seen`` what they read."""
        self.trial = seen
        try:
            yield
        finally:
            self.trial = None


@contextlib.contextmanager
def _asked(model: nn.Module, batch: _Batch) -> Iterator[None]:
    """Inside the ``with`` block a model of which it is not known shows where its layers have the samples."""
    if batch.samples.alike or batch.samples.batch_dim is not None or _SHOWN in vars(model):
        yield
        return

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if batch.trial is None and _SHOWN not in vars(model):
            batch.shown = trial(model, model, (args, kwargs), batch.samples, batch.watched)
            model.__dict__[_SHOWN] = batch.shown

    hook = model.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _changed(changes: list[_Change]) -> Iterator[None]:
    """Inside the ``with`` block the modules have these attributes of their own."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            module.__dict__[name] = value
        yield
    finally:
        for module, name, former in before:
            if former is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = former


def _checkpointed(
    changes: list[_Change], checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """``checkpoint(function, …)`` whose second run, in the backward pass, has the batch of the first."""
    return checkpoint(partial(_run_changed, changes, function), *args, **kwargs)


def _run_changed(changes: list[_Change], function: Callable, *args: Any, **kwargs: Any) -> Any:
    with _changed(changes):
        return function(*args, **kwargs)


def _forward(layer: Any, batch: _Batch, at: str, x: Tensor) -> Tensor:
    """The layer on a batch whose samples use their names; layers alike in adapters and rows share a plan."""
    lead = tuple(x.shape[:-1])
    if batch.trial is not None:
        batch.trial.see(at, x, lead)
        return layer._base(x, layer._own_weight)
    place = batch.samples.dimension(lead, batch.shown.get(at), at)
    # One that no sample uses gets a gradient of zeros, where there are gradients.
    others = (name for name, one in layer.adapters.items() if one.plain and torch.is_grad_enabled())
    present = [name for name in dict.fromkeys([*batch.used, *others]) if name in layer.adapters]
    if not present:
        return layer._base(x, layer._own_weight)
    lora_as, lora_bs, scalings = zip(*(_factors(layer.adapters[name]) for name in present), strict=True)
    wide = torch.promote_types(x.dtype, torch.float32)
    stack = stack_adapters(lora_as, lora_bs, torch.tensor(scalings, dtype=wide, device=x.device))
    ps = [layer.adapters[name].lora_dropout if layer.training else 0.0 for name in present]
    weight = layer._own_weight
    if isinstance(weight, Tensor):
        return _mixed(batch, x, place, present, (weight, layer.bias), stack, ps)
    return layer._base(x, weight) + _mixed(batch, x, place, present, (None, None), stack, ps)


def _mixed(
    batch: _Batch,
    x: Tensor,
    place: tuple[int, int],
    present: list[str],
    base: tuple[Tensor | None, Tensor | None],
    stack: AdapterStack,
    ps: list[float],
) -> Tensor:
    """One call of the op; ``place`` is where the samples are, and how many places are one's."""
    ids, rows, plan = _planned(batch, x, place, present)
    lead, shares = tuple(x.shape[:-1]), batch.weights
    shares = shares if shares is None else shares.to(x.device)
    spread = shares if shares is None else _spread(shares, lead, place)
    if not batch.fusion:
        drops = ps if any(ps) else None
        return multi_lora_linear(x, base[0], stack, rows, spread, base[1], dropout_ps=drops, plan=plan)
    if len(set(ps)) > 1:
        raise ValueError(f"fusion: expected adapters of one lora_dropout, got {sorted(set(ps))}")
    assert shares is not None and spread is not None
    ids, own = (ids, shares) if place == (0, 1) else (rows, spread)
    return multi_lora_fusion(x, base[0], stack, ids, own, base[1], dropout_p=ps[0])


def _planned(
    batch: _Batch, x: Tensor, place: tuple[int, int], present: list[str]
) -> tuple[Tensor, Tensor, BatchPlan]:
    """The adapters of each sample and of each row by number, and the rows' plan."""
    lead = tuple(x.shape[:-1])
    key = (place, lead, x.device, *present)
    if key not in batch.plans:
        numbers = {name: i for i, name in enumerate(present)}
        ids = torch.tensor([numbers.get(name, -1) for name in batch.used], device=x.device)
        if batch.weights is not None:
            ids = ids.view(batch.weights.shape)
        rows = _spread(ids, lead, place)
        batch.plans[key] = (ids, rows, plan_batch(rows, len(present)))
    found: tuple[Tensor, Tensor, BatchPlan] = batch.plans[key]
    return found


def _spread(values: Tensor, lead: tuple[int, ...], place: tuple[int, int]) -> Tensor:
    """What each row has, from what each sample has."""
    dim, each = place
    return row_ids(values.repeat_interleave(each, 0), lead, dim)


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor, float]:
    """A, B and s of an adapter, its gate taken into B."""
    if not adapter.plain:
        raise ValueError(f"adapter_names: {adapter.method} is more than A, B and s and cannot be mixed")
    update: Any = adapter.lower()
    lora_a, lora_b, scaling, gate, *_ = update.numbered()
    return lora_a, lora_b if gate is None else lora_b * gate, scaling
