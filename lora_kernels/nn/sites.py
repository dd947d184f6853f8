"""Which layers of a model a config targets, by PEFT's rules, and which of them can have an adapter."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from .._messages import warn
from ..adapters import LoRAConfig, class_of
from ..adapters.token_rows import Rows
from . import owned
from .adapter_layer import AdapterLayer, inside_adapters
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding
from .exposed import why_no_layer
from .linear import LinearAdapterLayer, LoRALinear
from .lora_experts import why_no_stack
from .quantized import QuantizedLinear, QuantizedLoRALinear
from .weight_reads import Reads, weight_reads
from .wrappers import is_wrapper, plain_names

ALL_LINEAR = "all-linear"
_OURS = __name__.split(".")[0] + "."
# The drop-in layer of each base layer.
LAYERS: dict[type[nn.Module], type[AdapterLayer]] = {
    cls.base_type: cls
    for cls in (LoRALinear, QuantizedLoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}
LINEARS = (nn.Linear, QuantizedLinear)


def layer_types() -> dict[type[nn.Module], type[AdapterLayer]]:
    """:data:`LAYERS`, and with Transformers' ``Conv1D`` where that is loaded."""
    if "transformers.pytorch_utils" not in sys.modules:
        return LAYERS
    from .transposed import LoRATransposedLinear

    return {**LAYERS, LoRATransposedLinear.base_type: LoRATransposedLinear}


def layer_type(module: nn.Module) -> type[AdapterLayer]:
    return next(layer for base, layer in layer_types().items() if isinstance(module, base))


def linear_types() -> tuple[type[nn.Module], ...]:
    return tuple(base for base, layer in layer_types().items() if issubclass(layer, LinearAdapterLayer))


class Target(NamedTuple):
    """One layer of a model: every (parent, attribute) that holds it, and its first dotted name.

    ``plain`` is that name without what ``torch.compile``, DDP or FSDP put into it.
    """

    name: str
    linear: nn.Module
    places: list[tuple[nn.Module, str]]
    plain: str
    # Those of its parameters that are targeted by name; of a layer with one weight none.
    parameters: tuple[str, ...] = ()
    # Of an embedding, or what shares its weight: the rows that train by themselves.
    rows: Rows | None = None


def find_parameter_sites(model: nn.Module, config: LoRAConfig) -> list[Target]:
    """The experts' modules of which ``config.target_parameters`` names parameters, by PEFT's rule.

    Raises:
        ValueError: there are none, or a parameter is none that an adapter can be put on.
    """
    sites: dict[int, Target] = {}
    plain, inside = plain_names(model), inside_adapters(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if is_wrapper(module) or owned.is_inside(name) or id(module) in inside:
            continue
        found = [one for one in module._parameters if _names_parameter(config, f"{plain[name]}.{one}")]
        for one in found:
            reason = why_no_stack(module, one)
            if reason is not None:
                raise ValueError(f"target_parameters: {plain[name]}.{one} {reason}")
        if found:
            site = sites.setdefault(id(module), Target(name, module, [], plain[name], tuple(found)))
            parent, _, attribute = name.rpartition(".")
            site.places.append((model.get_submodule(parent), attribute))
    _check_parameters_found(config, sites.values())
    return list(sites.values())


def _names_parameter(config: LoRAConfig, key: str) -> bool:
    return any(key == one or key.endswith(f".{one}") for one in config.target_parameters or ())


def _check_parameters_found(config: LoRAConfig, sites: Iterable[Target]) -> None:
    keys = [f".{site.plain}.{one}" for site in sites for one in site.parameters]
    for one in config.target_parameters or ():
        if not any(key.endswith(f".{one}") for key in keys):
            raise ValueError(f"target_parameters: no parameter of the model is named {one!r}")


def find_sites(
    model: nn.Module, config: LoRAConfig, kinds: tuple[type[nn.Module], ...] | None = None
) -> list[Target]:
    """The layers that ``config`` targets: linears alone where it says "all-linear", else any of ``kinds``.

    Without ``kinds`` these are all that an adapter can be put on.

    Raises:
        ValueError: there are none, or a named target is not plainly of one of ``kinds``.
    """
    if config.target_modules is None:
        raise ValueError(f"target_modules: expected names, an expression or {ALL_LINEAR!r}, got None")
    called = kinds is not None or _has_to_be_called(config)
    reads = {i: read for i, read in weight_reads(model).items() if not read.called} if called else {}
    refusal = partial(_why_not, kinds=kinds, reads=reads)
    everything, listed = _is_all_linear(config), isinstance(config.target_modules, list)
    kinds = tuple(layer_types()) if kinds is None else kinds
    wanted = tuple(kind for kind in kinds if kind in linear_types()) if everything else kinds
    skipped = _output_head(model) if everything else None
    inside = inside_adapters(model)
    sites: dict[int, Target] = {}
    refused: dict[str, str] = {}
    plain, saved = plain_names(model), owned.saved_modules(model, config)
    for name, module in model.named_modules(remove_duplicate=False):
        if not plain[name] or module is skipped or is_wrapper(module) or id(module) in inside:
            continue
        if owned.is_inside(name) or not _targets(config, plain[name], saved):
            continue
        reason = refusal(module) if _is_a(module, wanted) else _is_other(module, wanted)
        if reason is None:
            site = sites.setdefault(id(module), Target(name, module, [], plain[name]))
            parent, _, attribute = name.rpartition(".")
            site.places.append((model.get_submodule(parent), attribute))
        elif listed:
            raise ValueError(f"target_modules: {name!r} {reason}")
        elif _is_a(module, wanted):
            refused[name] = reason
    if not sites:
        raise ValueError(_no_match(model, config, refused))
    if refused:
        warn(f"target_modules: left as they are, {_named(refused)}")
    # PEFT's files list what it leaves out among the targets.
    left_out = [name for name in plain.values() if _excluded(config, name, saved)]
    _warn_of_strays(config, [*(site.plain for site in sites.values()), *left_out])
    return list(sites.values())


def _has_to_be_called(config: LoRAConfig) -> bool:
    """Whether a layer needs more for an adapter than a weight that somebody reads."""
    kind = class_of(config)
    return kind.reads_x or kind.beyond_weight


def _is_a(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether ``module`` is of one of ``kinds`` or of a subclass, or that with adapters."""
    if isinstance(module, AdapterLayer):
        return issubclass(module.base_type, kinds)
    ours = type(module).__module__.startswith(_OURS)  # a mixture, a layer of a pool: no plain linears
    return type(module) in kinds or (isinstance(module, kinds) and not ours)


def _is_other(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    kind, known = type(module), {one.__name__: one for one in layer_types()}
    namesake = known.get(kind.__name__, kind) is not kind
    shown = f"{kind.__module__}.{kind.__name__}" if namesake else kind.__name__
    return f"is of type {shown}, not a plain {_kinds_in_words(kinds)}"


def _kinds_in_words(kinds: tuple[type[nn.Module], ...]) -> str:
    return " or ".join(f"nn.{one.__name__}" for one in kinds if one.__module__.startswith("torch."))


def _why_not(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] | None, reads: dict[int, Reads]
) -> str | None:
    """Why ``module`` can have no adapter, or where ``kinds`` are given be no layer of another sort."""
    base = module.base_type if isinstance(module, AdapterLayer) else type(module)
    if kinds is not None and base not in kinds:
        return f"is of type {base.__name__}, not a plain {_kinds_in_words(kinds)}"
    if id(module) in reads:
        return f"is not called: {reads[id(module)]}"
    if isinstance(module, (AdapterLayer, QuantizedLinear)):
        return None
    reason = why_no_layer(module, layer_type(module))
    return reason and f"cannot be adapted: {reason}"


def _named(refused: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in refused.items()]
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _is_all_linear(config: LoRAConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _excluded(config: LoRAConfig, name: str, saved: Sequence[str]) -> bool:
    if config.exclude_modules and _matches(config.exclude_modules, name):
        return True
    return any(name == one or name.startswith(f"{one}.") for one in saved)


def _targets(config: LoRAConfig, name: str, saved: Sequence[str]) -> bool:
    """PEFT's rule: exclusions first, modules saved whole next, then the targets."""
    if _excluded(config, name, saved):
        return False
    return _is_all_linear(config) or (_matches(config.target_modules, name) and _in_layers(config, name))


def _in_layers(config: LoRAConfig, name: str) -> bool:
    """PEFT's rule: the first number in the name, or the one behind a name of ``layers_pattern``.

    A linear whose whole dotted name is listed is meant whatever its number.
    """
    numbers = config.layers_to_transform
    if numbers is None or numbers == [] or name in (config.target_modules or ()):
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in config.layers_pattern or ()]
    found = (re.match(pattern, name) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
    first = next((match for match in found if match), None)
    return first is not None and int(first[1]) in ([numbers] if isinstance(numbers, int) else numbers)


def _matches(names: list[str] | str | None, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names or ())


def _output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Transformers model, which "all-linear" leaves out."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _no_match(model: nn.Module, config: LoRAConfig, refused: dict[str, str]) -> str:
    if refused:
        return f"target_modules: {config.target_modules!r} matches {_named(refused)}"
    names = [name for name, module in model.named_modules() if name and isinstance(module, linear_types())]
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
    return f"target_modules: {config.target_modules!r} matches no nn.Linear of the model; it has {shown}"


def _warn_of_strays(config: LoRAConfig, found: list[str]) -> None:
    if not isinstance(config.target_modules, list):
        return
    strays = [one for one in config.target_modules if not any(_matches([one], name) for name in found)]
    if strays:
        warn(f"target_modules: no linear is named {', '.join(strays)}")
