"""What every drop-in layer shares: named adapters on a base layer that it is itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, ValuesView
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..adapters import METHODS, Adapter, LoRAConfig, Site, class_of, current_call, place
from ..adapters.token_rows import TokenRows
from ..adapters.variants import BiasedLoRA
from ..ops._inputs import autocasts
from .made_classes import Made

_HALF = (torch.float16, torch.bfloat16)
# What a layer with adapters holds beside its base's own.
OWN = (
    *("adapters", "active", "merged", "enabled"),
    *("_single", "_unmerged", "_unmerged_bias", "_taker", "_taking", "_other_weight"),
)


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


class AdapterLayer(nn.Module):
    """Adapters by name, and which of them are active, merged or off; mixed into a layer of ``base_type``.

    A subclass is its base layer too: the same parameters under the same names, and any method of it. It
    writes the forward pass, and where its weight is not [out, in] ``_matrix`` and ``_unmatrix``.
    """

    base_type: ClassVar[type[nn.Module]]
    # Whether the weight is [in, out]; PEFT's config has the name.
    fan_in_fan_out: ClassVar[bool] = False
    # Whether what runs is this package's forward, which computes a linear, a look-up or a convolution.
    plain_forward: ClassVar[bool] = True
    weight: Tensor
    bias: Any
    adapters: _Adapters
    _unmerged: Tensor | None

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
        # The adapter whose start took something out of W, and whether `weight` is now what is left.
        self._taker: str | None = None
        self._taking = False
        self.register_buffer("_other_weight", None, persistent=False)
        self.register_buffer("_unmerged", None, persistent=False)
        self.register_buffer("_unmerged_bias", None, persistent=False)
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

    def _matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as the [out, in] that adapters change; a view."""
        return weight

    def _unmatrix(self, matrix: Tensor) -> Tensor:
        """Undoes :meth:`_matrix`."""
        return matrix

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
            RuntimeError: the layer is merged, and either the adapter would be active or changes the weight.
        """
        if activate:
            self._must_be_unmerged("add an active adapter")
        if adapter.rest is not None:
            self._must_be_unmerged("add an adapter that changes the weight")
            if self._taker not in (None, name):
                raise ValueError(f"adapter: {self._taker!r} has taken its start out of this weight already")

    def delete_adapter(self, name: str) -> None:
        """Forgets the adapter ``name``; if it was active, the others that were remain so."""
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

    def _take(self, name: str, adapter: Adapter) -> None:
        """Keeps beside W the weight that the adapter goes on with, which is W's part while it is active."""
        rest = self._unmatrix(adapter.__dict__.pop("rest")).to(self._own_weight.dtype)
        adapter.__dict__["rest"] = None
        self._taker, self._taking = name, False
        self._buffers["_other_weight"] = nn.Parameter(rest.contiguous(), requires_grad=False)

    @torch.no_grad()
    def take_again(self, adapter: Adapter) -> None:
        """Writes the weight that ``adapter`` goes on with where that of the taker stands."""
        rest = self._unmatrix(adapter.__dict__["rest"])
        place = self._own_weight if self._taking else self._buffers["_other_weight"]
        place.copy_(rest)

    def _settle_weight(self) -> None:
        """Puts W, or what the taker left of it, into ``weight``."""
        if self._taker is None or self._taking == (self._taker in self.active):
            return
        other, self._buffers["_other_weight"] = self._buffers["_other_weight"], self._own_weight
        # A move between devices or dtypes leaves a plain tensor in the buffer.
        self.weight = other if isinstance(other, nn.Parameter) else nn.Parameter(other, requires_grad=False)
        self._taking = not self._taking

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

    @property
    def _own_weight(self) -> Any:
        """What ``weight`` is to the layer itself: others may see the adapted one, see :mod:`.exposed`."""
        return self._parameters["weight"]

    @property
    def base_weight(self) -> Tensor:
        """W, also while ``weight`` holds W + Σ ΔW_i."""
        return self._own_weight if self._unmerged is None else self._unmerged

    @property
    def bare_weight(self) -> Tensor:
        """W without any adapter."""
        other = self._buffers["_other_weight"]
        return other if self._taking and other is not None else self.base_weight

    @property
    def bare_bias(self) -> Any:
        """b without any adapter's."""
        unmerged = self._buffers["_unmerged_bias"]
        return self._parameters["bias"] if unmerged is None else unmerged

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + Σ ΔW_i over the active adapters, or what else their methods make of W.

        Computed in at least float32 and rounded once.
        """
        return self._adapted()

    def adapted_weight(self) -> Tensor:
        """The weight that the layer computes with at this moment, differentiable in what its adapters train.

        W + Σ ΔW_i, or what else their methods make of W; W while the adapters are off. Without their dropout.
        For code that takes a weight and not a module: a fused loss on the output head, say.
        """
        if not self.enabled:
            return self.bare_weight
        if self.merged or not self.active:
            return self._own_weight
        if not autocasts(self._own_weight):
            return self._adapted()
        with torch.autocast(self._own_weight.device.type, enabled=False):
            return self._adapted()

    def _adapted(self) -> Tensor:
        weight = self.base_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = self._matrix(weight.to(wide, copy=True))
        for name in self.active:
            total = self.adapters[name].merged(total, self._matrix(weight))
        return self._unmatrix(total).to(weight.dtype)

    def merge(self) -> None:
        """Folds the active adapters into ``weight``; a no-op where that is done or nothing is active.

        The base weight is kept beside it: :meth:`unmerge` gives back the same parameter, bit for bit, and
        a weight that is tied to another module is left alone.
        """
        if self.merged or not self.active:
            return
        merged = self.merged_weight()  # raises where a method has no one weight, before anything changes
        bias = self.merged_bias()
        base = self._own_weight
        # Not by attribute: a module files a Parameter as a parameter, also under the name of a buffer.
        self._buffers["_unmerged"] = base
        self.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            self._buffers["_unmerged_bias"] = self._parameters["bias"]
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.merged = self.active
        self._refresh()

    def unmerge(self) -> None:
        """Undoes :meth:`merge`."""
        if not self.merged:
            return
        base, bias = self.base_weight, self._buffers["_unmerged_bias"]
        self._unmerged = None
        if bias is not None:
            self._buffers["_unmerged_bias"] = None
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        # A move between devices or dtypes while merged leaves a plain tensor in the buffer.
        self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
        self.merged = ()
        self._refresh()

    def to_base(self, *, merge: bool = False) -> nn.Module:
        """The layer this was, or with ``merge`` the one it has become."""
        weight: Any = self.merged_weight() if merge else self.bare_weight
        weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        base = self.base_type.__new__(self.base_type)
        state = {key: value for key, value in vars(self).items() if key not in OWN}
        for table in ("_modules", "_buffers"):
            state[table] = {key: value for key, value in state[table].items() if key not in OWN}
        state["_parameters"] = {**self._parameters, "weight": weight, **self._base_bias(merge)}
        state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(OWN)
        base.__dict__.update(state)
        return base

    def _base_bias(self, merge: bool) -> dict[str, nn.Parameter]:
        """The bias of :meth:`to_base`, where it is not the one that stands there."""
        bias = self.merged_bias() if merge else self._buffers["_unmerged_bias"]
        if bias is None:
            return {}
        return {"bias": bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)}

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """b + Σ s_i · b_i over the active adapters that have a bias, or ``None`` where none has.

        Raises:
            RuntimeError: the layer has no bias that could take them.
        """
        acting = [self.adapters[name] for name in self.active]
        active = [adapter for adapter in acting if isinstance(adapter, BiasedLoRA)]
        if not active:
            return None
        bias: Tensor | None = self.bare_bias
        if bias is None:
            raise RuntimeError("cannot merge: the adapter has a bias (lora_bias), and the layer has none")
        shifts: list[Any] = [adapter.lower(None, current_call()) for adapter in active]
        return bias + sum(one.shift for one in shifts).to(bias.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; parameters that are kept among the buffers stay themselves, as others do."""
        kept = {name: one for name, one in self._buffers.items() if isinstance(one, nn.Parameter)}
        super()._apply(fn, recurse)
        for name, parameter in kept.items():
            self._buffers[name] = _moved(parameter, self._buffers[name])
        return self

    def _must_be_unmerged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"cannot {what} while {', '.join(self.merged)} is merged; call unmerge() first"
            )

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ValueError(f"adapter: expected one of {known}, got {name!r}")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A state dict always holds the base weight: its adapters come separately."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.base_weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        bias = self._buffers["_unmerged_bias"]
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is loaded is a base weight, so a merged layer comes apart first."""
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The linear's, and which adapters act."""
        state = "" if self.enabled else ", disabled"
        state += f", merged={list(self.merged)}" if self.merged else ""
        return f"{super().extra_repr()}, active={list(self.active)}{state}"


def _moved(parameter: nn.Parameter, moved: Any) -> nn.Parameter:
    """``parameter`` with the numbers of ``moved``, or where torch cannot do that a new one."""
    if moved is parameter:
        return parameter
    if torch._has_compatible_shallow_copy_type(parameter, moved):
        parameter.data = moved.data
        return parameter
    return nn.Parameter(moved, parameter.requires_grad)


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
