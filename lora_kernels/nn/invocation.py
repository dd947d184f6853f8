"""Which tokens an Activated LoRA acts on: found in the model's ``input_ids``, before its layers run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import warn
from ..adapters import LoRAConfig, current_call
from ..adapters.variants import INVOKED, invoked
from .wrappers import unwrapped

# What a cache holds: invocation tokens -> whether each of its samples has had them.
_SEEN = "_lora_invoked"
_Sequence = tuple[int, ...]


def check_invocation(model: nn.Module, config: LoRAConfig) -> None:
    """Raises a ValueError where ``config`` wants token numbers and the model's forward takes none."""
    if config.alora_invocation_tokens and "input_ids" not in _signature(unwrapped(model)).parameters:
        kind = type(unwrapped(model)).__name__
        raise ValueError(
            f"alora_invocation_tokens: expected a model whose forward takes input_ids, got a {kind}"
        )


def find_invocations(model: nn.Module, sequences: set[_Sequence]) -> None:
    """Lets each forward pass of ``model`` look for these sequences, and no other."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if _Finder in (type(hook), type(getattr(hook, "__self__", None))):
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
    if sequences:
        finder = _Finder(sequences)
        model.register_forward_pre_hook(finder, with_kwargs=True)
        model.register_forward_hook(finder.remember, prepend=True)  # before the call ends


class _Finder:
    """The forward hooks of a model with Activated LoRA. They come behind those that open a call."""

    def __init__(self, sequences: set[_Sequence]) -> None:
        self.sequences = sequences
        self.warned = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _signature(model).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        ids = given.get("input_ids")
        if ids is None:
            self._warn()
            current_call()[INVOKED] = {}
            return
        seen = getattr(given.get("past_key_values"), _SEEN, {})
        current_call()[INVOKED] = {one: _found(ids, one, seen.get(one)) for one in self.sequences}

    def _warn(self) -> None:
        """Once a model, as this may come at each step."""
        if not self.warned:
            warn("alora_invocation_tokens: no input_ids, so that the base alone acts")
            self.warned = True

    def remember(self, model: nn.Module, args: object, output: Any) -> None:
        """Lets the cache know which samples have had their invocation: what follows is behind it."""
        cache = getattr(output, "past_key_values", None)
        found = current_call().get(INVOKED, {})
        if cache is not None and found and hasattr(cache, "__dict__"):
            setattr(cache, _SEEN, {one: mask[:, -1] for one, mask in found.items()})


def _found(ids: Tensor, tokens: _Sequence, seen: Tensor | None) -> Tensor:
    if seen is None:
        return invoked(ids, tokens)
    if seen.shape[0] != ids.shape[0]:
        raise ValueError(
            f"alora_invocation_tokens: expected {seen.shape[0]} samples, as many as the cache has, got"
            f" {ids.shape[0]} (beam search is not supported)"
        )
    return torch.logical_or(seen[:, None], invoked(ids, tokens))


def _signature(model: nn.Module) -> inspect.Signature:
    return inspect.signature(model.forward)
