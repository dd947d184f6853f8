"""Linears and embeddings that serve a mixed batch from a pool, and the verbs that put them into a model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..nn.install import keep_off_fast_path
from ..nn.rows import Lead, Samples, Trial, row_ids, trial
from ..nn.sites import find_sites
from ..ops.adapter_stack import AdapterStack
from ..ops.multi_lora_linear import BatchPlan, multi_lora_linear, plan_batch
from .pool import AdapterPool

_STATE = "_multi_lora"


class MixedBatch:
    """Which adapter each sample of the batch in flight uses, for one thread; its plans are made once."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self._local = threading.local()
        # Where the samples are in what a layer reads, by site, and the modules of which a trial asked it.
        self._shown: dict[str, frozenset[int]] = {}
        self._tried: set[int] = set()
        self._trying = threading.Lock()

    @contextlib.contextmanager
    def use(self, samples: Samples) -> Iterator[None]:
        """Holds the adapters of ``samples`` inside the ``with`` block; see :func:`use_adapters`."""
        with self.pool.use(samples.names) as slots:
            ids = torch.tensor(slots, dtype=torch.long, device=self.pool.device)
            with self._current((ids, samples, {})):
                yield

    @contextlib.contextmanager
    def _current(self, state: Any) -> Iterator[None]:
        before = getattr(self._local, "current", None)
        self._local.current = state
        try:
            yield
        finally:
            self._local.current = before

    def learn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first call of ``module`` with different adapters: where do its layers have samples?"""
        current = getattr(self._local, "current", None)
        if current is None or isinstance(current, Trial) or id(module) in self._tried:
            return
        samples = current[1]
        if samples.alike or samples.batch_dim is not None:
            return
        with self._trying:  # whoever comes meanwhile waits for what is found
            if id(module) in self._tried:
                return
            try:
                self._shown.update(trial(module, module, (args, kwargs), samples, self._current))
            finally:
                self._tried.add(id(module))

    def plan(
        self, site: str, x: Tensor, lead: Lead, adapters: int
    ) -> tuple[Tensor, Tensor, BatchPlan] | None:
        """The adapters of the samples, of the rows of an input x of ``lead`` rows, and the latter's plan.

        ``None`` outside of :meth:`use`.

        Raises:
            ValueError: what is said and shown does not tell which rows are which sample's.
        """
        current = getattr(self._local, "current", None)
        if current is None:
            return None
        if isinstance(current, Trial):
            current.see(site, x, lead)
            return None
        ids, samples, plans = current
        dim, each = samples.dimension(lead, self._shown.get(site), site)
        key = (dim, each, lead)
        if key not in plans:
            rows = row_ids(ids.repeat_interleave(each), lead, dim)
            plans[key] = (ids, rows, plan_batch(rows, adapters))
        return plans[key]


def _served(cls: Any, base: nn.Module, site: str, batch: MixedBatch) -> Any:
    """A layer of ``cls`` on the very parameters of ``base``."""
    layer = cls.__new__(cls)
    layer.__dict__.update(vars(base))
    hooks = layer._forward_pre_hooks.copy()  # of its own, for what `keep_off_fast_path` adds
    layer.__dict__.update(site=site, batch=batch, _forward_pre_hooks=hooks)
    return layer


class MultiLoRALinear(nn.Linear):
    """y_m = x_m Wᵀ + b + s_i (x_m A_iᵀ) B_iᵀ with i the adapter of m's sample

    An ``nn.Linear`` (same ``weight`` and ``bias``) whose adapters live in a pool. Outside of
    :func:`use_adapters` it is its base. x is ``[samples, ..., in]`` of W's dtype.
    """

    batch: MixedBatch
    site: str

    @classmethod
    def from_linear(cls, linear: nn.Linear, site: str, batch: MixedBatch) -> MultiLoRALinear:
        """A layer on the very parameters of ``linear``, served by the pool's linear ``site``."""
        return _served(cls, linear, site, batch)

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[samples, ..., in]``."""
        stack = self.batch.pool.stack(self.site)
        current = self.batch.plan(self.site, x, tuple(x.shape[:-1]), len(stack))
        if current is None:
            return F.linear(x, self.weight, self.bias)
        _, rows, plan = current
        return multi_lora_linear(x, self.weight, stack, rows, bias=self.bias, plan=plan)


class MultiLoRAEmbedding(nn.Embedding):
    """y_t = E[t] + s_i A_i[:, t]ᵀ B_iᵀ for each token t, with i the adapter of t's sample

    An ``nn.Embedding`` (same ``weight`` E) whose adapters live in a pool: a page is a rank row of A over the
    vocabulary with its column of B. Outside of :func:`use_adapters` it is its base. Token numbers are
    ``[samples, ...]``, y is ``[samples, ..., embedding_dim]`` of E's dtype.
    """

    batch: MixedBatch
    site: str

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, site: str, batch: MixedBatch) -> MultiLoRAEmbedding:
        """A layer on the very weight of ``embedding``, served by the pool's ``site``.

        Raises:
            ValueError: it has a ``max_norm``, which would shorten columns of every A in the pool.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"pool: {site}: expected an nn.Embedding without max_norm, got {embedding}")
        return _served(cls, embedding, site, batch)

    def forward(self, input: Tensor) -> Tensor:
        """y for token numbers ``[samples, ...]``."""
        y = super().forward(input)
        stack = self.batch.pool.stack(self.site)
        current = self.batch.plan(self.site, input, tuple(input.shape) or (1,), len(stack))
        if current is None:
            return y
        ids, rows, plan = current
        h = look_up(stack, plan.ids, input.reshape(-1)).to(y.dtype)
        return y + multi_lora_linear(h, None, expansion(stack, ids), rows.reshape(-1), plan=plan).view(
            y.shape
        )


def look_up(stack: AdapterStack, ids: Tensor, tokens: Tensor) -> Tensor:
    """h_m = A_i[:, t_m] with i = ids_m: ``[M, max_rank]``, zero beyond the rank and for no adapter."""
    there, pages = _pages_of(stack, ids)
    return torch.where(there, stack.a_pages[pages, tokens[:, None]], 0)


def expansion(stack: AdapterStack, ids: Tensor) -> AdapterStack:
    """The stack with which :func:`multi_lora_linear` takes h of :func:`look_up` to s h Bᵀ, for these ``ids``.

    In place of A, the page of an adapter's rank j has the j-th unit row. Slots that are not in the batch may
    list pages that have other owners by now, so that theirs are left out.
    """
    there, pages = _pages_of(stack, ids)
    count = stack.a_pages.shape[0]
    rows = torch.where(there, pages, count)  # one more row, for what is not there
    units = stack.a_pages.new_zeros(count + 1, stack.max_rank)
    eye = torch.eye(stack.max_rank, dtype=units.dtype, device=units.device)
    units[rows] = eye.expand(len(ids), -1, -1)
    return dataclasses.replace(stack, a_pages=units[:count])


def _pages_of(stack: AdapterStack, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which of ``max_rank`` ranks each id's adapter has, and their pages; both ``[M, max_rank]``."""
    known = (ids >= 0) & (ids < len(stack))
    first, rank = stack.spans[torch.where(known, ids, 0)].long().unbind(1)
    place = torch.arange(stack.max_rank, device=ids.device)
    there = known[:, None] & (place < rank[:, None])
    return there, stack.pages[torch.where(there, first[:, None] + place, 0)].long()


def pool_linears(model: nn.Module, target_modules: list[str] | str) -> dict[str, tuple[int, int]]:
    """Name of each targeted layer -> (in_features, out_features), as :class:`AdapterPool` takes it.

    An ``nn.Embedding`` has (num_embeddings, embedding_dim).

    Args:
        model: any module.
        target_modules: as PEFT has it: names, an expression, or ``"all-linear"``.

    Raises:
        ValueError: nothing matches, or a named target is no plain ``nn.Linear`` or ``nn.Embedding``.
    """
    sites = find_sites(model, LoRAConfig(target_modules=target_modules), (nn.Linear, nn.Embedding))
    return {site.name: _sizes(site.linear) for site in sites}


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def apply_multi_lora(model: nn.Module, pool: AdapterPool) -> nn.Module:
    """Makes the linears and embeddings of ``pool`` serve mixed batches, in place.

    :func:`remove_multi_lora` undoes it.

    From then on ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one
    name a sample, ``"__base__"`` for none, as PEFT's mixed batches do; beams share their sample's.

    Args:
        model: the model whose layers :func:`pool_linears` named.
        pool: on the model's device and of its dtype.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a layer of the pool is missing or of another shape, an embedding has a ``max_norm``, or
            the model is served already. The model is then as it was.
    """
    if _STATE in vars(model):
        raise ValueError("model: expected one without a pool, got one that is served already")
    bases = {name: _base(model, name, sizes) for name, sizes in pool.linears.items()}
    batch = MixedBatch(pool)
    layers = {id(base): _layer(base, name, batch) for name, base in bases.items()}
    places = _replace(model, layers)
    parts = [model, *_called_alone(model)]
    hooks = [
        *(p.register_forward_pre_hook(batch.learn, with_kwargs=True, prepend=True) for p in parts),
        model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(_leave, always_call=True),
    ]
    model.__dict__[_STATE] = (batch, places, hooks)
    if callable(getattr(model, "generate", None)):
        model.__dict__["generate"] = functools.partial(_generate, model)
    return model


def remove_multi_lora(model: nn.Module) -> nn.Module:
    """Puts the original layers back."""
    _, places, hooks = _state(model)
    for parent, attribute, base in places:
        parent._modules[attribute] = base
    for hook in hooks:
        hook.remove()
    model.__dict__.pop("generate", None)
    del model.__dict__[_STATE]
    return model


@contextlib.contextmanager
def use_adapters(
    model: nn.Module,
    adapter_names: Sequence[str],
    repeats: Collection[int] = (),
    batch_dim: int | None = None,
) -> Iterator[None]:
    """Inside the ``with`` block, sample i of every batch uses ``adapter_names[i]``.

    The first call of the model with different adapters runs it once more, on up to three samples, each given
    twice, to see which dimension of each layer's input follows them, whether it is ``[B, T, H]`` or
    ``[T, B, H]``. A Transformers model has the samples first in its own inputs; for another one whose inputs
    are square, with as many tokens as samples, say ``batch_dim``.

    Args:
        model: one that :func:`apply_multi_lora` serves.
        adapter_names: one a sample.
        repeats: how many rows next to each other may belong to one sample there, besides one: its beams, or
            the tokens of sequences that the model flattens to ``[samples · tokens, features]``.
        batch_dim: which dimension of every layer's input is the samples; no trial then.

    Raises:
        TypeError: ``repeats`` or ``batch_dim`` are no ints.
        ValueError: the model has no pool, or a name is unknown; and at a layer of whose input nothing tells
            which rows are which sample's.
        PoolFullError: the adapters do not fit beside those in use elsewhere.
    """
    batch: MixedBatch = _state(model)[0]
    with batch.use(Samples.said(list(adapter_names), repeats, batch_dim)):
        yield


def _state(model: nn.Module) -> tuple[Any, ...]:
    if _STATE not in vars(model):
        raise ValueError("model: expected one that apply_multi_lora serves")
    return vars(model)[_STATE]


def _base(model: nn.Module, name: str, sizes: tuple[int, int]) -> nn.Module:
    try:
        base = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"pool: the model has no linear {name!r}") from None
    if type(base) not in (nn.Linear, nn.Embedding) or _sizes(base) != tuple(sizes):
        want = f"an nn.Linear or nn.Embedding of {tuple(sizes)}"
        raise ValueError(f"pool: {name}: expected {want}, got {base}")
    return base


def _layer(base: nn.Module, site: str, batch: MixedBatch) -> nn.Module:
    if isinstance(base, nn.Embedding):
        return MultiLoRAEmbedding.from_embedding(base, site, batch)
    assert isinstance(base, nn.Linear)
    return MultiLoRALinear.from_linear(base, site, batch)


def _replace(model: nn.Module, layers: dict[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    places = []
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if child is not None and id(child) in layers:
                places.append((parent, attribute, child))
                parent._modules[attribute] = layers[id(child)]
                keep_off_fast_path(parent, layers[id(child)])
    return places


def _called_alone(model: Any) -> list[nn.Module]:
    """The parts that generation calls by themselves."""
    encoder = model.get_encoder() if callable(getattr(model, "get_encoder", None)) else None
    return [encoder] if isinstance(encoder, nn.Module) and encoder is not model else []


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Takes ``adapter_names`` out of a call's arguments and holds the adapters until :func:`_leave`."""
    names = kwargs.pop("adapter_names", None)
    scope = contextlib.ExitStack()
    if names is not None:
        scope.enter_context(use_adapters(model, names))
    _scopes(model).append(scope)
    return args, kwargs


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    scopes = _scopes(model)
    if scopes:  # none where `_enter` itself failed
        scopes.pop().close()


def _scopes(model: nn.Module) -> list[contextlib.ExitStack]:
    """The calls of ``model`` that this thread is in."""
    local = _state(model)[0]._local
    if not hasattr(local, "scopes"):
        local.scopes = []
    return local.scopes


def _generate(model: nn.Module, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
    original: Any = type(model).generate  # type: ignore[attr-defined]
    if adapter_names is None:
        return original(model, *args, **kwargs)
    with use_adapters(model, adapter_names, [_copies(model, kwargs)]):
        return original(model, *args, **kwargs)


def _copies(model: Any, options: dict[str, Any]) -> int:
    """How many rows generation makes of a sample: its beams, or the sequences to return."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)
