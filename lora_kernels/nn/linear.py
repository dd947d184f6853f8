"""The drop-in module: an ``nn.Linear`` with named adapters."""

from __future__ import annotations

import contextlib
from collections.abc import ItemsView, Iterable, Iterator, ValuesView
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Adapter, Factors, LoRAConfig, make
from ..ops.dora_linear import fused_dora, output_scale
from ..ops.lora_linear import fused

_HALF = (torch.float16, torch.bfloat16)


class _Adapters(nn.ModuleDict):
    """Adapters by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Adapter: ...
        def values(self) -> ValuesView[Adapter]: ...
        def items(self) -> ItemsView[str, Adapter]: ...


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + Σ_i s_i · (drop_i(x) A_iᵀ ⊙ g_i) B_iᵀ over the active adapters i

    and for DoRA :func:`lora_kernels.dora_linear`.

    An ``nn.Linear`` (it is one: same ``weight`` and ``bias``) whose forward is one fused call. Several
    active adapters are one call too, their ranks stacked; only where dropout is on, in training, has each
    its own mask and therefore its own call.

    x is ``[..., in_features]`` of W's dtype. Adapters are float32 on a half-precision base, where they
    are cast in the call and x is not; else of W's dtype.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the first adapter.
        lora_alpha: numerator of its scale.
        lora_dropout: probability in [0, 1) on the branch's input.
        use_rslora: s = alpha/√r in place of alpha/r.
        bias: whether there is a b.
        method: a name in ``lora_kernels.adapters.METHODS``.
        adapter_name: name of the first adapter.
        device: of all parameters.
        dtype: of W and b.
        options: further fields of :class:`LoRAConfig`.

    Raises:
        TypeError: an option of the wrong type, or x of another dtype than W outside autocast.
        ValueError: an option out of range, or x's last dimension is not ``in_features``.
    """

    adapters: _Adapters
    _unmerged: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        method: str = "lora",
        adapter_name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        options.update(lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
        config = LoRAConfig(r, method=method, **options)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start()
        self.add_adapter(adapter_name, config)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: LoRAConfig | None = None,
        *,
        adapter_name: str = "default",
        **options: Any,
    ) -> LoRALinear:
        """A LoRALinear on the very parameters of ``linear``, which become frozen.

        Args:
            linear: an ``nn.Linear``. Its weight and bias are shared, not copied; hooks come along.
            config: what the adapter is; or its fields as keywords.
            adapter_name: the adapter's name.
            options: fields of :class:`LoRAConfig`, where no config is given.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or both a config and options were given.
        """
        if config is not None and options:
            raise TypeError(f"config: expected either a config or keywords, got both ({', '.join(options)})")
        layer = cls._share(linear)
        layer.add_adapter(adapter_name, config if config is not None else LoRAConfig(**options))
        return layer

    @classmethod
    def _share(cls, linear: nn.Linear) -> LoRALinear:
        """``linear`` as a LoRALinear without adapters."""
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            what = "one whose forward was replaced" if type(linear) is nn.Linear else type(linear).__name__
            raise TypeError(f"linear: expected an nn.Linear, got {what}")
        layer = cls.__new__(cls)
        state = dict(vars(linear))
        for name in ("_parameters", "_buffers", "_modules"):
            state[name] = dict(state[name])
        layer.__dict__.update(state)
        layer._start()
        return layer

    def _start(self) -> None:
        self.adapters = _Adapters()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        # The name of the one adapter that a plain fused call serves, for the shortest way through forward.
        self._single: str | None = None
        self.register_buffer("_unmerged", None, persistent=False)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draws W and b anew, as ``nn.Linear`` does, and then every adapter."""
        super().reset_parameters()
        adapters = self._modules.get("adapters")  # absent while nn.Linear builds itself
        for adapter in adapters.values() if isinstance(adapters, _Adapters) else ():
            adapter.reset_parameters(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in_features]``."""
        weight = self.weight
        if x.shape[-1] != self.in_features or x.dtype != weight.dtype:
            self._check_input(x)
        if self._single is None:
            return self._forward_general(x)
        # Inline, and past ModuleDict's lookup: at small sizes each of these microseconds shows.
        adapter: Any = self.adapters._modules[self._single]
        lora_a, lora_b, scaling, gate, magnitude = adapter.lower()
        p = adapter.lora_dropout if self.training else 0.0
        if magnitude is not None:
            return fused_dora(x, weight, lora_a, lora_b, magnitude, self.bias, scaling, p)
        return fused(x, weight, lora_a, lora_b, self.bias, gate, None, scaling, p)

    def _check_input(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            got = f"got shape {tuple(x.shape)}"
            raise ValueError(f"x: expected last dimension {self.in_features} (in_features), {got}")
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {self.weight.dtype} (the weight's), got {x.dtype}")

    def _forward_general(self, x: Tensor) -> Tensor:
        """The cases that need more, or less, than one fused call on one adapter."""
        if not self.enabled:
            return F.linear(x, self.base_weight, self.bias)
        if self.merged or not self.active:
            return F.linear(x, self.weight, self.bias)
        active = [self.adapters[name] for name in self.active]
        if any(adapter.lower().magnitude is not None for adapter in active):
            return self._forward_scaled(x, active)
        if not self.training or not any(adapter.lora_dropout for adapter in active):
            lora_a, lora_b, scaling, gate, _ = stack([adapter.lower() for adapter in active])
            return fused(x, self.weight, lora_a, lora_b, self.bias, gate, None, scaling, 0.0)
        first, *others = active
        y = self._call(x, first, self.weight, self.bias)
        for adapter in others:
            y = y + self._call(x, adapter, None, None)
        return y

    def _call(self, x: Tensor, adapter: Adapter, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        lora_a, lora_b, scaling, gate, _ = adapter.lower()
        p = adapter.lora_dropout if self.training else 0.0
        return fused(x, weight, lora_a, lora_b, bias, gate, None, scaling, p)

    def _forward_scaled(self, x: Tensor, active: list[Adapter]) -> Tensor:
        """Several adapters with DoRA among them, as PEFT adds them up.

        One after the other, each scales what those before it gave; its norms are those of W with itself
        alone. Under its dropout it adds to that instead.
        """
        y = F.linear(x, self.weight)
        for adapter in active:
            lora_a, lora_b, scaling, _, magnitude = adapter.lower()
            p = adapter.lora_dropout if self.training else 0.0
            if magnitude is None:
                y = y + self._call(x, adapter, None, None)
                continue
            scale = output_scale(self.weight, lora_a, lora_b, magnitude, scaling).to(y.dtype)
            d = F.dropout(x, p) if p else x
            branch = fused(d, None, lora_a, lora_b, None, None, None, scaling, 0.0)
            y = y + (scale - 1) * (F.linear(d, self.weight) if p else y) + scale * branch
        return y if self.bias is None else y + self.bias

    def _refresh(self) -> None:
        plain = self.enabled and not self.merged and len(self.active) == 1
        self._single = self.active[0] if plain else None

    def make_adapter(self, config: LoRAConfig) -> Adapter:
        """An adapter that fits this layer; :meth:`add_adapter` adds it."""
        weight = self.base_weight
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating dtype, got {weight.dtype}")
        dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
        sizes = (self.in_features, self.out_features)
        return make(*sizes, config, weight=weight, device=weight.device, dtype=dtype)

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
        if activate:
            self._must_be_unmerged("add an active adapter")
        self.adapters[name] = adapter
        adapter.set_trainable(False)
        if activate:
            self.set_adapter(name)

    def delete_adapter(self, name: str) -> None:
        """Forgets the adapter ``name``; if it was active, the others that were remain so."""
        self._check_known((name,))
        if name in self.merged:
            self._must_be_unmerged(f"delete {name!r}")
        del self.adapters[name]
        self.active = tuple(other for other in self.active if other != name)
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
    def base_weight(self) -> Tensor:
        """W, also while ``weight`` holds W + Σ ΔW_i."""
        return self.weight if self._unmerged is None else self._unmerged

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + Σ ΔW_i over the active adapters, or what else their methods make of W.

        Computed in at least float32 and rounded once.
        """
        weight = self.base_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide, copy=True)
        for name in self.active:
            total = self.adapters[name].merged(total, weight)
        return total.to(weight.dtype)

    def merge(self) -> None:
        """Folds the active adapters into ``weight``; a no-op where that is done or nothing is active.

        The base weight is kept beside it: :meth:`unmerge` gives back the same parameter, bit for bit, and
        a weight that is tied to another module is left alone.
        """
        if self.merged or not self.active:
            return
        merged = self.merged_weight()
        base = self.weight
        # Not by attribute: a module files a Parameter as a parameter, also under the name of a buffer.
        self._buffers["_unmerged"] = base
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = self.active
        self._refresh()

    def unmerge(self) -> None:
        """Undoes :meth:`merge`."""
        if not self.merged:
            return
        base = self.base_weight
        self._unmerged = None
        # A move between devices or dtypes while merged leaves a plain tensor in the buffer.
        self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
        self.merged = ()
        self._refresh()

    def to_linear(self, *, merge: bool = False) -> nn.Linear:
        """The ``nn.Linear`` this layer was, or with ``merge`` the one it has become."""
        weight = nn.Parameter(self.merged_weight(), requires_grad=False) if merge else self.base_weight
        linear = nn.Linear.__new__(nn.Linear)
        own = ("adapters", "active", "merged", "enabled", "_single")
        state = {key: value for key, value in vars(self).items() if key not in own}
        state["_modules"], state["_buffers"] = {}, {}
        state["_parameters"] = {"weight": weight, "bias": self.bias}
        state["_non_persistent_buffers_set"] = set()
        linear.__dict__.update(state)
        return linear

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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What is loaded is a base weight, so a merged layer comes apart first."""
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """The linear's, and which adapters act."""
        state = "" if self.enabled else ", disabled"
        state += f", merged={list(self.merged)}" if self.merged else ""
        return f"{super().extra_repr()}, active={list(self.active)}{state}"


def _check_name(name: str, taken: Iterable[str]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected str, got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"adapter_name: expected a name without dots, got {name!r}")
    if name in taken or hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter_name: {name!r} is taken")


def stack(factors: list[Factors]) -> Factors:
    """The factors of Σ_i s_i · (B_i ⊙ g_i) A_i: ranks side by side, the scales in the gate."""
    lora_a = torch.cat([f.lora_a for f in factors])
    lora_b = torch.cat([f.lora_b for f in factors], 1)
    if len({f.scaling for f in factors}) == 1 and all(f.gate is None for f in factors):
        return Factors(lora_a, lora_b, factors[0].scaling)
    gates = [_scaled_gate(f) for f in factors]
    lead = torch.broadcast_shapes(*(gate.shape[:-1] for gate in gates))
    return Factors(lora_a, lora_b, 1.0, torch.cat([gate.expand(*lead, -1) for gate in gates], -1))


def _scaled_gate(factors: Factors) -> Tensor:
    if factors.gate is None:
        return factors.lora_a.new_full(factors.lora_a.shape[:1], factors.scaling)
    return factors.gate * factors.scaling
