"""Where an adapter sits, and how it starts there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import LoRAConfig


class Site(NamedTuple):
    """One layer that gets an adapter."""

    # Its dotted name in the model, "" for a layer by itself.
    name: str
    in_features: int
    out_features: int
    # The config of the adapter, with the rank and alpha of this layer.
    config: LoRAConfig
    # W [out, in], of a quantised layer what its codes stand for; None where there is none.
    weight: Tensor | None = None
    # Of the adapter's tensors.
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    # What calibration gathered for this layer, by name.
    statistics: Mapping[str, Tensor] = {}
    # The adapter of the same name on the layer before that has the last part of this one's name.
    previous: Any = None
    # What `shared` made, by key.
    tensors: dict[Any, nn.Parameter] = {}  # noqa: RUF012  (apply_lora and make give each its own)
    # The sizes of a convolution's kernel, which are part of in_features; none of a linear.
    kernel: tuple[int, ...] = ()

    def shared(self, key: Any, make: Callable[[], Tensor]) -> nn.Parameter:
        """One parameter for all sites of this adapter name (a bank of vectors): made by the first that asks.

        It is saved and loaded once. Give it to each adapter among its tensors.
        """
        if key not in self.tensors:
            self.tensors[key] = nn.Parameter(make().to(device=self.device, dtype=self.dtype))
        return self.tensors[key]

    def option(self, name: str, default: Any, choices: tuple[Any, ...] | None = None) -> Any:
        """An option of the method or of the initialiser, ``config.method_options[name]``.

        Raises:
            ValueError: it is none of ``choices``.
        """
        value = self.config.method_options.get(name, default)
        if choices is not None and value not in choices:
            raise ValueError(f"method_options: {name}: expected one of {choices}, got {value!r}")
        return value

    def whole_option(self, name: str, default: int, least: int = 1) -> int:
        """An option that is a whole number.

        Raises:
            TypeError: it is none.
            ValueError: it is below ``least``.
        """
        value = self.option(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"method_options: {name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"method_options: {name}: expected at least {least}, got {value}")
        return value

    def empty(self, *shape: int) -> Tensor:
        """A tensor for the adapter, uninitialised."""
        return torch.empty(*shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros for the adapter."""
        return nn.init.zeros_(self.empty(*shape))

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Normal numbers for the adapter."""
        return nn.init.normal_(self.empty(*shape), std=std)

    def kaiming(self, *shape: int) -> Tensor:
        """Kaiming-uniform numbers for the adapter, as ``nn.Linear`` starts: within 1/√(last size)."""
        return nn.init.kaiming_uniform_(self.empty(*shape), a=math.sqrt(5))

    def must_divide(self, name: str, value: int, *sizes: str) -> None:
        """Raises where ``value`` does not divide ``in_features``, ``out_features`` or ``r``, as named."""
        for size in sizes:
            whole = self.config.r if size == "r" else getattr(self, size)
            if value < 1 or whole % value:
                raise ValueError(
                    f"{name}: {self.config.method} expects a divisor of {size} = {whole}, got {value}"
                )


class Start(NamedTuple):
    """An adapter's tensors by name: parameters, or buffers where they are of no floating dtype.

    They are cast to the site's dtype and device.
    """

    tensors: Mapping[str, Tensor]
    # The W [out, in] to go on with, where the start takes something out of it (PiSSA). It must follow from
    # W and nothing else, since loading the adapter takes it anew.
    weight: Tensor | None = None
