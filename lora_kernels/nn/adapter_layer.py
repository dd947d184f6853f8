"""What every drop-in layer shares: named adapters on a base layer that it is itself."""

from __future__ import annotations

import contextlib
from collections.abc import ItemsView, Iterable, Iterator, ValuesView
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..adapters import METHODS, Adapter, LoRAConfig, Site, class_of, place
from ..adapters.token_rows import TokenRows
from ..ops._dispatch import sharded
from .layer_weights import LayerWeights
from .made_classes import Made
from .outdated import note_deleted
from .wrappers import check_whole

_HALF = (torch.float16, torch.bfloat16)


def shared_state(base: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The state of a layer on the very parameters of ``base``, which must be a plain ``kind``."""
    if type(base) is not kind or "forward" in vars(base):
        what = "one whose forward was replaced" if type(base) is kind else type(base).__name__
        noun = kind.__name__.lower()
        raise TypeError(f"{noun}: expected an nn.{kind.__name__}, got {what}")
    state = dict(vars(base))
    for name in ("_parameters", "_buffers", "_modules"):
        state[name] = dict(state[name])
    return state


class _Adapters(nn.ModuleDict):
    """Adapters by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Adapter: ...
        def values(self) -> ValuesView[Adapter]: ...
        def items(self) -> ItemsView[str, Adapter]: ...


class AdapterLayer(LayerWeights):
    """Adapters by name, and which of them are active, merged or off; mixed into a layer of ``base_type``.

    A subclass is its base layer too: the same parameters under the same names, and any method of it. It
    writes the forward pass, and where its weight is not [out, in] ``_matrix`` and ``_unmatrix``.
    """

    # Whether the weight is [in, out]; PEFT's config has the name.
    fan_in_fan_out: ClassVar[bool] = False
    # Whether what runs is this package's forward, which computes a linear, a look-up or a convolution.
    plain_forward: ClassVar[bool] = True
    adapters: _Adapters

    @classmethod
    def _share(cls, base: nn.Module) -> Self:
        """A layer without adapters on the very parameters of ``base``; of the subclass that is for it."""
        for special in cls.__subclasses__():
            if type(base) is special.base_type is not cls.base_type and not issubclass(special, Made):
                return special._share(base)
        layer = cls.__new__(cls)
        layer.__dict__.update(shared_state(base, cls.base_type))
        layer._start()
        return layer

    @classmethod
    def _wrap(cls, base: nn.Module, config: LoRAConfig | None, adapter_name: str, options: Any) -> Self:
        """:meth:`_share` with one adapter, from a config or from its fields."""
        if config is not None and options:
            raise TypeError(f"config: expected either a config or keywords, got both ({', '.join(options)})")
        layer = cls._share(base)
        layer.add_adapter(adapter_name, config if config is not None else LoRAConfig(**options))
        return layer

    def _start(self) -> None:
        self.adapters = _Adapters()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        # The name of the one adapter that a plain fused call serves, for the shortest way through forward.
        self._single: str | None = None
        self._start_weights()
        for parameter in (self._own_weight, getattr(self, "bias", None)):
            if isinstance(parameter, Tensor):
                parameter.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws W and b anew, as the base layer does, and then every adapter.

        Raises:
            RuntimeError: an adapter has taken its start out of W.
        """
        if self.__dict__.get("_taker") is not None:
            raise RuntimeError(f"cannot draw W anew: {self._taker!r} has taken its start out of it")
        super().reset_parameters()  # type: ignore[misc]
        adapters = self._modules.get("adapters")  # absent while the base layer builds itself
        for adapter in adapters.values() if isinstance(adapters, _Adapters) else ():
            self._draw(adapter)

    def _refresh(self) -> None:
        plain = self.enabled and not self.merged and len(self.active) == 1
        self._single = self.active[0] if plain else None

    def make_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """An adapter that fits this layer; :meth:`add_adapter` adds it.

        Args:
            config: what it is.
            where: further fields of :class:`lora_kernels.adapters.Site`: name, statistics, previous, tensors.
        """
        weight = self.bare_weight
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
        dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
        return self._place(config, self._matrix(weight), dtype, where)

    def _place(
        self, config: LoRAConfig, matrix: Tensor, dtype: torch.dtype, where: dict[str, Any]
    ) -> Adapter:
        out_features, in_features = matrix.shape
        rows = where.pop("rows", None)
        site = Site("", in_features, out_features, config, matrix, matrix.device, dtype, tensors={})
        if rows is not None:
            return TokenRows(site._replace(**where), rows, isinstance(self, nn.Embedding))
        if class_of(config).beyond_weight and not self.plain_forward:
            kind, field = type(self).__name__, _field_of(config)
            raise ValueError(f"{field}: expected layers of a plain forward, got a {kind} with its own")
        return place(site._replace(**where))

    def plan_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """:meth:`make_adapter` for one that is read from a file: nothing is drawn, no weight decomposed.

        Its tensors are on the meta device, unless the method has to take its start out of W.
        """
        meta = {"weight": torch.empty(self._sizes(), device="meta"), "device": "meta"}
        try:
            adapter = self.make_adapter(config, **{**where, **meta})
        except (NotImplementedError, RuntimeError):  # a start that reads values
            return self.make_adapter(config, **where)
        return adapter if adapter.rest is None else self.make_adapter(config, **where)

    def _sizes(self) -> torch.Size:
        """[out, in] of the weight as adapters change it."""
        return self._matrix(self.base_weight).shape

    def _draw(self, adapter: Adapter) -> None:
        """Draws the parameters of an adapter anew."""
        adapter.reset_parameters(self._matrix(self.base_weight))

    def add_adapter(self, name: str, config: LoRAConfig | Adapter, *, activate: bool | None = None) -> None:
        """Adds an adapter; the first one becomes active, a later one waits for :meth:`set_adapter`.

        Args:
            name: a new name, without dots.
            config: what it is, or an adapter of :meth:`make_adapter`.
            activate: whether to make it the active one, whatever it is the first or not.

        Raises:
            ValueError: the name is taken, or no name.
        """
        _check_name(name, self.adapters)
        adapter = config if isinstance(config, Adapter) else self.make_adapter(config)
        adapter.train(self.training)
        activate = not self.adapters if activate is None else activate
        self.check_new(name, adapter, activate)
        if adapter.rest is not None:
            self._take(name, adapter)
        self.adapters[name] = adapter
        adapter.set_trainable(False)
        if activate:
            self.set_adapter(name)

    def check_new(self, name: str, adapter: Adapter, activate: bool) -> None:
        """Whether an adapter can be added, or put in the place of the one called ``name``.

        Raises:
            ValueError: another one has taken its start out of the weight, and this one would too.
            RuntimeError: the layer is merged, and either the adapter would be active or changes the weight;
                or it is split over processes.
        """
        check_whole(self, f"add the adapter {name!r}")
        if sharded(self.base_weight):
            raise RuntimeError(
                f"cannot add the adapter {name!r} to a weight that is split over processes; do it before"
            )
        if activate:
            self._must_be_unmerged("add an active adapter")
        if adapter.rest is not None:
            self._must_be_unmerged("add an adapter that changes the weight")
            if self._taker not in (None, name):
                raise ValueError(f"adapter: {self._taker!r} has taken its start out of this weight already")

    def delete_adapter(self, name: str) -> None:
        """Forgets the adapter ``name``; if it was active, the others that were remain so.

        An optimiser that holds its parameters says so at its next step.

        Raises:
            ValueError: an unknown name.
            RuntimeError: it is merged.
        """
        self._check_known((name,))
        own = self.adapters[name]
        alone = [one for key, one in own.named_parameters() if key not in own.shared]
        self.drop_adapter(name)
        note_deleted(f"the adapter {name!r} that was deleted", alone, self.parameters())

    def drop_adapter(self, name: str) -> None:
        """:meth:`delete_adapter` without a word to optimisers, for who puts its parameters back."""
        self._check_known((name,))
        if name in self.merged:
            self._must_be_unmerged(f"delete {name!r}")
        active = tuple(other for other in self.active if other != name)
        if name == self._taker:
            self._must_be_unmerged(f"delete {name!r}")
            self.active = active
            self._settle_weight()
            self._taker, self._buffers["_other_weight"] = None, None
        del self.adapters[name]
        self.active = active
        self._refresh()

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Makes these adapters the active ones, which add up, and trains them alone.

        Raises:
            ValueError: an unknown name.
            RuntimeError: the layer is merged.
        """
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self._check_known(names)
        self._must_be_unmerged("choose other adapters")
        self.active = names
        self._settle_weight()
        for name, adapter in self.adapters.items():
            adapter.set_trainable(name in names)
        self._refresh()

    def enable_adapters(self, flag: bool = True) -> None:
        """Switches all adapters on or off; off, the layer is its base even while merged."""
        self.enabled = bool(flag)
        self._refresh()

    @contextlib.contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Inside the ``with`` block the layer is its base."""
        before = self.enabled
        self.enable_adapters(False)
        try:
            yield
        finally:
            self.enable_adapters(before)

    def _replicate_for_data_parallel(self) -> Any:
        """What ``DataParallel`` makes for each card of several: a layer without parameters, which ours need.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "model: expected DistributedDataParallel (torchrun, a process for each card) or one card"
            " (CUDA_VISIBLE_DEVICES=0), got torch.nn.DataParallel"
        )

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ValueError(f"adapter: expected one of {known}, got {name!r}")

    def extra_repr(self) -> str:
        """The linear's, and which adapters act."""
        state = "" if self.enabled else ", disabled"
        state += f", merged={list(self.merged)}" if self.merged else ""
        return f"{super().extra_repr()}, active={list(self.active)}{state}"


def inside_adapters(model: nn.Module) -> set[int]:
    """The ids of the adapters and what they consist of: a module that people call ``adapters`` is none."""
    layers = (module for module in model.modules() if isinstance(module, AdapterLayer))
    return {id(module) for layer in layers for module in layer.adapters.modules()}


def own_weight(layer: Any) -> Tensor:
    """The weight of a plain layer, or what it is to one with adapters itself."""
    return layer._own_weight if isinstance(layer, AdapterLayer) else layer.weight


def refuse_reader(config: LoRAConfig, what: str) -> None:
    """Raises for a method that reads the x of a linear, or changes more than the weight of ``what``."""
    if METHODS[config.method].reads_x:
        raise ValueError(f"method: {config.method} reads its input and sits on linears alone, got {what}")
    if config.alora_invocation_tokens:
        raise ValueError(f"alora_invocation_tokens: expected linears, got {what}")


def _field_of(config: LoRAConfig) -> str:
    return "lora_bias" if config.lora_bias else "alora_invocation_tokens"


def _check_name(name: str, taken: Iterable[str]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected str, got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"adapter_name: expected a name without dots, got {name!r}")
    if name in taken or hasattr(nn.ModuleDict, name) or name == "__base__":
        raise ValueError(f"adapter_name: {name!r} is taken")
