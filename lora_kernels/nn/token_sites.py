"""The modules of a model of which ``trainable_token_indices`` lets rows train, and what is tied to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..adapters import LoRAConfig
from ..adapters.token_rows import Rows
from . import owned
from .adapter_layer import AdapterLayer
from .sites import Target
from .wrappers import plain_names, unwrapped

_DEFAULT = "embed_tokens"


def find_token_sites(model: nn.Module, config: LoRAConfig, taken: Iterable[nn.Module]) -> list[Target]:
    """Embeddings with their tokens, each followed by the modules that share its weight where that is tied.

    A list means the model's input embedding, or else what is called ``embed_tokens``. The weight is tied
    where ``model.config.tie_word_embeddings`` or ``config.ensure_weight_tying`` says so.

    Raises:
        ValueError: there is none, it is adapted or saved whole already, or tied modules have other tokens.
    """
    chosen = _chosen(model, config)
    _check_free(model, config, chosen, taken)
    sites: list[Target] = []
    done: set[int] = set()
    for module, tokens in chosen.items():
        tied = [module, *_tied(model, config, module)]
        together = [one for one in tied if chosen.get(one, tokens) == tokens]
        if len(together) < len(tied) and config.ensure_weight_tying:
            raise ValueError("trainable_token_indices: expected the same tokens for modules of one weight")
        together = together if len(together) == len(tied) else [module]
        sites += _targets(model, [one for one in together if id(one) not in done], tokens)
        done |= {id(one) for one in together}
    return sites


def _chosen(model: nn.Module, config: LoRAConfig) -> dict[nn.Module, tuple[int, ...]]:
    given = config.trainable_token_indices
    if not isinstance(given, dict):
        getter: Any = getattr(unwrapped(model), "get_input_embeddings", None)
        if callable(getter):
            return {getter(): tuple(given or ())}
        given = {_DEFAULT: given or []}
    plain = plain_names(model)
    found: dict[nn.Module, tuple[int, ...]] = {}
    for end, tokens in given.items():
        modules = [
            module
            for name, module in model.named_modules(remove_duplicate=False)
            if plain[name].endswith(end) and not owned.is_inside(name) and _has_rows(module)
        ]
        if not modules:
            raise ValueError(f"trainable_token_indices: no embedding's or linear's name ends in {end!r}")
        found |= dict.fromkeys(modules, tuple(tokens))
    return found


def _has_rows(module: nn.Module) -> bool:
    kind = module.base_type if isinstance(module, AdapterLayer) else type(module)
    return issubclass(kind, (nn.Embedding, nn.Linear))


def _check_free(model: nn.Module, config: LoRAConfig, chosen: Iterable[Any], taken: Iterable[Any]) -> None:
    plain = {module: name for name, module in model.named_modules()}
    adapted, saved = {id(one) for one in taken}, owned.saved_modules(model, config)
    for module in chosen:
        if id(module) in adapted or plain_names(model)[plain[module]] in saved:
            raise ValueError(
                f"trainable_token_indices: expected a module that is neither among the target_modules nor the"
                f" modules_to_save, got {plain[module]!r}"
            )


def _tied(model: nn.Module, config: LoRAConfig, module: nn.Module) -> list[nn.Module]:
    """The other modules whose weight is this one's."""
    says = getattr(getattr(unwrapped(model), "config", None), "tie_word_embeddings", False)
    if not (says or config.ensure_weight_tying):
        return []
    shared = owned.sharing(model, {id(owned.base_tensor((module, "weight")))})
    return [other for other, name in shared if name == "weight" and other is not module]


def _targets(model: nn.Module, modules: list[nn.Module], tokens: tuple[int, ...]) -> list[Target]:
    plain, found = plain_names(model), list[Target]()
    for module in modules:
        names = [n for n, one in model.named_modules(remove_duplicate=False) if one is module]
        places = [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in names]
        owner = found[0].plain if found else plain[names[0]]
        found.append(Target(names[0], module, places, plain[names[0]], rows=Rows(tokens, owner)))
    return found
