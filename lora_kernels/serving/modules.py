"""Linears that serve a mixed batch from a pool, and the verbs that put them into a model."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..nn.apply import find_sites
from ..ops.multi_lora_linear import BatchPlan, multi_lora_linear, plan_batch
from .pool import AdapterPool

_STATE = "_multi_lora"


class MixedBatch:
    """Which adapter each sample of the batch in flight uses, for one thread; its plans are made once."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool
        self._local = threading.local()

    @contextlib.contextmanager
    def use(self, names: Sequence[str]) -> Iterator[None]:
        """Holds the adapters of ``names`` inside the ``with`` block."""
        with self.pool.use(names) as slots:
            before = getattr(self._local, "current", None)
            ids = torch.tensor(slots, dtype=torch.long, device=self.pool.device)
            self._local.current = (ids, {})
            try:
                yield
            finally:
                self._local.current = before

    def plan(self, samples: int) -> tuple[Tensor, dict[int, BatchPlan]] | None:
        """The adapter of each of ``samples`` along the first dimension, and the plans by number of rows.

        More samples than names are the beams, or the tokens, of one sample next to each other.

        Raises:
            ValueError: ``samples`` is no multiple of the number of names.
        """
        current = getattr(self._local, "current", None)
        if current is None:
            return None
        ids, plans = current
        if len(ids) == 0 or samples % len(ids):
            raise ValueError(f"adapter_names: expected one for each of {samples} samples, got {len(ids)}")
        return ids.repeat_interleave(samples // len(ids)), plans


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
        layer = cls.__new__(cls)
        layer.__dict__.update(vars(linear))
        layer.__dict__.update(site=site, batch=batch)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[samples, ..., in]``."""
        current = self.batch.plan(x.shape[0])
        if current is None:
            return F.linear(x, self.weight, self.bias)
        ids, plans = current
        rows = x.numel() // max(1, x.shape[-1])
        stack = self.batch.pool.stack(self.site)
        if rows not in plans:
            plans[rows] = plan_batch(ids.repeat_interleave(rows // max(1, len(ids))), len(stack))
        return multi_lora_linear(x, self.weight, stack, ids, bias=self.bias, plan=plans[rows])


def pool_linears(model: nn.Module, target_modules: list[str] | str) -> dict[str, tuple[int, int]]:
    """Name of each targeted ``nn.Linear`` -> (in_features, out_features), as :class:`AdapterPool` takes it.

    Args:
        model: any module.
        target_modules: as PEFT has it: names, an expression, or ``"all-linear"``.

    Raises:
        ValueError: nothing matches, or a named target is no plain ``nn.Linear``.
    """
    sites = find_sites(model, LoRAConfig(target_modules=target_modules), (nn.Linear,))
    linears: dict[str, Any] = {site.name: site.linear for site in sites}
    return {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def apply_multi_lora(model: nn.Module, pool: AdapterPool) -> nn.Module:
    """Makes the linears of ``pool`` serve mixed batches, in place; :func:`remove_multi_lora` undoes it.

    From then on ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take one
    name a sample, ``"__base__"`` for none, as PEFT's mixed batches do; beams share their sample's.

    Args:
        model: the model whose linears :func:`pool_linears` named.
        pool: on the model's device and of its dtype.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a linear of the pool is missing or of another shape, or the model is served already. The
            model is then as it was.
    """
    if _STATE in vars(model):
        raise ValueError("model: expected one without a pool, got one that is served already")
    linears = {name: _linear(model, name, sizes) for name, sizes in pool.linears.items()}
    batch = MixedBatch(pool)
    layers = {
        id(linear): MultiLoRALinear.from_linear(linear, name, batch) for name, linear in linears.items()
    }
    places = _replace(model, layers)
    hooks = [
        model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(_leave, always_call=True),
    ]
    model.__dict__[_STATE] = (batch, places, hooks)
    if callable(getattr(model, "generate", None)):
        model.__dict__["generate"] = functools.partial(_generate, model)
    return model


def remove_multi_lora(model: nn.Module) -> nn.Module:
    """Puts the original linears back."""
    _, places, hooks = _state(model)
    for parent, attribute, linear in places:
        parent._modules[attribute] = linear
    for hook in hooks:
        hook.remove()
    model.__dict__.pop("generate", None)
    del model.__dict__[_STATE]
    return model


@contextlib.contextmanager
def use_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside the ``with`` block, sample i of every batch uses ``adapter_names[i]``.

    Raises:
        ValueError: the model has no pool, or a name is unknown.
        PoolFullError: the adapters do not fit beside those in use elsewhere.
    """
    batch: MixedBatch = _state(model)[0]
    with batch.use(list(adapter_names)):
        yield


def _state(model: nn.Module) -> tuple[Any, ...]:
    if _STATE not in vars(model):
        raise ValueError("model: expected one that apply_multi_lora serves")
    return vars(model)[_STATE]


def _linear(model: nn.Module, name: str, sizes: tuple[int, int]) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"pool: the model has no linear {name!r}") from None
    if type(linear) is not nn.Linear or (linear.in_features, linear.out_features) != tuple(sizes):
        raise ValueError(f"pool: {name}: expected an nn.Linear of {tuple(sizes)}, got {linear}")
    return linear


def _replace(model: nn.Module, layers: dict[int, MultiLoRALinear]) -> list[tuple[nn.Module, str, nn.Linear]]:
    places = []
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if id(child) in layers and isinstance(child, nn.Linear):
                places.append((parent, attribute, child))
                parent._modules[attribute] = layers[id(child)]
    return places


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
    with use_adapters(model, adapter_names):
        return original(model, *args, **kwargs)
