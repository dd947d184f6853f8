"""What every adapter method is: tensors that it builds for a layer, and that lower to an update."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..init.base import check_free, check_name
from ..methods import structures
from .call import Call, current_call
from .peft_form import PeftForm
from .site import Site, Start
from .update import Update, delta_of, merge_update

if TYPE_CHECKING:
    from .config import LoRAConfig


class Adapter(nn.Module):
    """A method on one layer: a subclass writes :meth:`build` and :meth:`lower` and carries :func:`register`.

    Args:
        site: where it sits.
    """

    method: ClassVar[str]
    # Names of parameters that the method never trains.
    frozen: frozenset[str] = frozenset()
    # Keys that `config.method_options` may hold.
    options: ClassVar[frozenset[str]] = frozenset()
    # Whether it starts in any of the ways of `init`, and not by True, False or "gaussian" alone. It is not
    # inherited: what is taken out of W for a start must be what the method then adds to it.
    any_start: ClassVar[bool] = False
    # Whether ΔW is exactly zero after initialisation.
    zero_start: ClassVar[bool] = True
    # Whether `lower` gives a plain LowRank (see there): what groups, multi-adapter ops and pools take.
    plain: bool = True
    # Whether `lower` writes into the call what the same adapter reads on later layers.
    passes_on: bool = False
    # Whether `lower` reads x: merging then gives it the identity, and it sits on linears alone.
    reads_x: ClassVar[bool] = False
    # Whether there is one W + ΔW: not where it depends on the call, or is not linear in x.
    mergeable: ClassVar[bool] = True
    # Whether it adds more than a ΔW to what the layer computes, which then has to be called as it is.
    beyond_weight: ClassVar[bool] = False
    # Whether it can sit on a quantised weight.
    over_quantized: ClassVar[bool] = True
    # Whether PEFT reads its files as LoRA; it then has no tensors but PEFT's.
    peft: ClassVar[bool] = False
    # How PEFT writes it, where PEFT has it as something else than LoRA.
    peft_form: ClassVar[PeftForm | None] = None
    # What tensor parallelism splits: parameter -> ("in" or "out", which dimension). Empty: it does not split.
    splits: ClassVar[Mapping[str, tuple[str, int]]] = {}
    # The names of its parameters that other layers hold too.
    shared: frozenset[str] = frozenset()
    # Who takes its place, and for which configs: see `variant_of`. Not inherited.
    variants: ClassVar[tuple[tuple[Callable[[LoRAConfig], bool], type[Adapter]], ...]] = ()

    def __init__(self, site: Site) -> None:
        super().__init__()
        config = site.config
        self.config, self.site = config, site.name
        self.in_features, self.out_features = site.in_features, site.out_features
        self.kernel = site.kernel
        self.r, self.lora_alpha, self.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
        self.use_rslora, self.init_lora_weights = config.use_rslora, config.init_lora_weights
        self.scaling = self.scaling_at(self.r)
        start = self._started(site)
        for name, tensor in start.tensors.items():
            self._register(name, tensor, site)
        self._check_frozen()
        # The weight to go on with, until the layer takes it.
        self.__dict__["rest"] = start.weight
        self.set_trainable(True)

    @classmethod
    def variant(cls, config: LoRAConfig) -> type[Adapter]:
        """The class for ``config``, where a field of its own changes what the method computes."""
        fitting = (kind for wanted, kind in vars(cls).get("variants", ()) if wanted(config))
        return next(fitting, cls)

    if TYPE_CHECKING:
        # Its tensors.
        def __getattr__(self, name: str) -> Any: ...

    def build(self, site: Site) -> Start:
        """The tensors at the start, without gradients; also called to draw them anew.

        Raises:
            ValueError: the site or an option does not fit the method; the message names it.
        """
        raise NotImplementedError(f"{type(self).__name__}: build")

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> Update:
        """What this method makes of the layer, differentiable in its parameters; once a forward pass.

        Args:
            x: the layer's input ``[..., in]``; ``None`` where only a method that does not read it is asked.
            call: the side inputs of this forward pass.
        """
        raise NotImplementedError(f"{type(self).__name__}: lower")

    @torch.no_grad()
    def _started(self, site: Site) -> Start:
        init = site.config.init_lora_weights
        if init not in (True, False, "gaussian") and not vars(type(self)).get("any_start", False):
            raise ValueError(
                f"init_lora_weights: {self.method} expects True, False or 'gaussian', got {init!r}"
            )
        start = self.build(site)
        if not isinstance(start, Start) or not isinstance(start.tensors, Mapping):
            raise TypeError(f"build: {self.method} expected a Start of tensors by name, got {_kind(start)}")
        return start

    def _check_frozen(self) -> None:
        """Names that are no tensor's would train what was meant not to."""
        known = {**self._parameters, **self._buffers}
        for name in self.frozen:
            if name not in known:
                raise ValueError(f"frozen: {self.method} expected some of {', '.join(known)}, got {name!r}")

    def _register(self, name: str, tensor: Tensor, site: Site) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"build: {self.method} expected a tensor for {name!r}, got {_kind(tensor)}")
        if not isinstance(name, str) or not name.isidentifier() or hasattr(self, name):
            raise ValueError(
                f"build: {self.method} expected names that no attribute of an adapter has, got {name!r}"
            )
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
            self.shared = self.shared | {name}
        elif tensor.is_floating_point():
            own = _compact(tensor.to(device=site.device, dtype=site.dtype))
            self.register_parameter(name, nn.Parameter(own))
        else:
            self.register_buffer(name, tensor.to(device=site.device))

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Draws the tensors anew, for the base weight ``[out, in]``."""
        like: Any = next(iter(self.state_dict(keep_vars=True).values()), torch.empty(0))
        sizes = (self.in_features, self.out_features)
        where: dict[str, Any] = {"weight": weight, "device": like.device, "dtype": like.dtype}
        site = Site(self.site, *sizes, self.config, **where, tensors={}, kernel=self.kernel)
        for name, tensor in self.build(site).tensors.items():
            getattr(self, name).copy_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As of any module; what follows from settings goes through ``meta`` and ``to_empty`` unharmed."""
        derived = derived_buffers(self)
        super()._apply(fn, recurse)
        keep_derived(self, derived)
        return self

    def drop(self, x: Tensor) -> Tensor:
        """x as dropout leaves it, for a branch that the fused kernels do not compute."""
        return nn.functional.dropout(x, self.lora_dropout, self.training)

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW ``[out, in]``, computed in ``dtype`` (by default the parameters')."""
        eye = self._identity(dtype)
        return delta_of(self.lower(eye, current_call()), eye, dtype)

    def merged(self, weight: Tensor, base: Tensor) -> Tensor:
        """W + ΔW in the dtype of ``weight``, or what else the method makes of the two.

        Args:
            weight: W, or what the active adapters before this one made of it.
            base: W itself, whose norms DoRA takes.

        Raises:
            RuntimeError: the method has no one ΔW.
        """
        if not self.mergeable:
            raise RuntimeError(f"cannot merge: {self.method} has no one weight that it makes of W")
        eye = self._identity(weight.dtype)
        return merge_update(weight, base, self.lower(eye, current_call()), eye)

    def _identity(self, dtype: torch.dtype | None) -> Tensor | None:
        """The x that makes a branch its own weight, for a method that reads x."""
        if not self.reads_x:
            return None
        like = next(self.parameters())
        return torch.eye(self.in_features, device=like.device, dtype=dtype or like.dtype)

    def scaling_at(self, rank: int) -> float:
        """s: alpha/rank, or alpha/√rank for rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def take_settings(self, other: Adapter) -> None:
        """Takes over what is no tensor of ``other``, an adapter of this class: rank, scale, dropout, …"""
        for name in self._non_persistent_buffers_set:  # what follows from settings
            self._buffers[name] = other._buffers[name]
        held = {*vars(nn.Module()), "rest"}
        self.__dict__.update({name: value for name, value in vars(other).items() if name not in held})

    def set_trainable(self, flag: bool) -> None:
        """Switches the gradients of the parameters that the method trains."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(flag and name not in self.frozen)

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"


def _kind(value: Any) -> str:
    return type(value).__name__


def derived_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that no state dict holds."""
    own = ((name, module._buffers[name]) for name in module._non_persistent_buffers_set)
    return {name: value for name, value in own if value is not None}


@torch.no_grad()
def keep_derived(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Gives buffers that were moved their values back where the move lost them."""
    for name, value in before.items():
        moved: Any = module._buffers[name]
        if moved.is_meta:
            module._buffers[name] = value
        elif moved is not value and not value.is_meta:
            moved.copy_(value)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor by itself, row by row: a slice of an SVD would keep all of it, and FSDP2 takes no view."""
    alone = tensor.untyped_storage().nbytes() <= tensor.nbytes and tensor.is_contiguous()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


class _Methods(Mapping[str, type[Adapter]]):
    """Key -> class, of the package's own methods, whose files are imported when asked for, and of others."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Adapter]] = {}

    def __getitem__(self, key: str) -> type[Adapter]:
        if key not in self._classes and key in structures():
            importlib.import_module(f"lora_kernels.{structures()[key].home}")
        return self._classes[key]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*structures(), *self._classes]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def add(self, key: str, cls: type[Adapter]) -> None:
        self._classes[key] = cls


METHODS = _Methods()
_Method = TypeVar("_Method", bound=type[Adapter])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: makes an :class:`Adapter` known as ``LoRAConfig(method=name)``.

    A class that is defined anew under the same name takes the place of the old one.

    Raises:
        TypeError: no name, or no subclass of :class:`Adapter`; or ``options`` or ``frozen`` are no sets, or
            ``splits`` no mapping.
        ValueError: another class has that name.

    Examples:
        >>> @register("doubled")
        ... class Doubled(LoRA):
        ...     def lower(self, x, call):
        ...         return super().lower(x, call)._replace(scaling=2 * self.scaling)
        >>> LoRAConfig(method="doubled").method
        'doubled'
    """

    check_name(name)

    def add(cls: _Method) -> _Method:
        _check_class(name, cls)
        cls.method = name
        METHODS.add(name, cls)
        return cls

    return add


def _check_class(name: str, cls: Any) -> None:
    """Raises where ``cls`` is no method, or the name is another one's."""
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise TypeError(f"register({name!r}): expected a subclass of Adapter, got {cls!r}")
    for field, kind in (("options", (set, frozenset)), ("frozen", (set, frozenset)), ("splits", (Mapping,))):
        value = getattr(cls, field)
        if not isinstance(value, kind):
            raise TypeError(f"{field}: {cls.__name__} expected a {kind[-1].__name__}, got {value!r}")
    home = f"lora_kernels.{structures()[name].home}" if name in structures() else cls.__module__
    there = METHODS._classes.get(name, cls)
    check_free(name, cls, there if home == cls.__module__ else METHODS[name])


def variant_of(method: type[Adapter], wanted: Callable[[LoRAConfig], bool]) -> Callable[[_Method], _Method]:
    """Class decorator: takes the place of ``method`` for configs of which ``wanted`` holds, the first one."""

    def add(cls: _Method) -> _Method:
        method.variants = (*vars(method).get("variants", ()), (wanted, cls))
        return cls

    return add


def method(name: str) -> type[Adapter]:
    """The class registered as ``name``.

    Raises:
        ValueError: no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(sorted(METHODS))}, got {name!r}")
    return METHODS[name]


def make(
    in_features: int,
    out_features: int,
    config: LoRAConfig,
    *,
    weight: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """An adapter of ``config.method`` for a base weight ``[out_features, in_features]``.

    Examples:
        >>> sorted(make(8, 4, LoRAConfig(r=2)).state_dict())
        ['lora_A', 'lora_B']
    """
    return place(Site("", in_features, out_features, config, weight, device, dtype, tensors={}))


def place(site: Site) -> Adapter:
    """An adapter of the site's config, on it.

    Examples:
        >>> adapter = place(Site("layer", 8, 4, LoRAConfig(r=2)))
        >>> adapter.lower(torch.randn(3, 8), Call()).lora_b.shape
        torch.Size([4, 2])
    """
    return class_of(site.config)(site)


def class_of(config: LoRAConfig) -> type[Adapter]:
    """The class of the adapters of ``config``.

    Examples:
        >>> class_of(LoRAConfig(use_dora=True)).__name__
        'DoRA'
    """
    return method(config.method).variant(config)
