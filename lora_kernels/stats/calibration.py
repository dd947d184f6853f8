"""Statistics of the inputs and gradients of linears, streamed over batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import each
from ..adapters import LoRAConfig
from ..nn.adapter_layer import AdapterLayer
from ..nn.sites import find_sites, linear_types
from .gather import Covariance, Gatherer, Gradient, Spread, Squares

COLLECTED: dict[str, type[Gatherer]] = {
    "covariance": Covariance,
    "activation_svd": Spread,
    "gradient": Gradient,
    "squares": Squares,
}
Forward = Callable[[nn.Module, Any], Any]


class Statistics(dict[str, dict[str, Tensor]]):
    """Dotted name of a layer -> name of a statistic -> tensor; ``torch.save(dict(…))`` saves it."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    collect: Iterable[str] = ("covariance",),
    *,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    forward: Forward | None = None,
    rank: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Statistics:
    """Runs the model over the batches once and gathers what initialisers need of its linears

    * ``covariance`` ``[in, in]`` (CorDA): (1/n) Σ XᵀX over the n samples, X ``[tokens, in]`` over |max X|.
    * ``activation_svd`` ``[k, in]`` (EVA): S Vᵀ of the centred inputs of all tokens that count, by a batch's
      ``attention_mask`` and its ``labels`` (-100 does not); with it ``activation_energy``, the sum of all S².
    * ``gradient`` ``[out, in]`` (LoRA-GA): the mean over the batches of ∂loss/∂W.
    * ``squares`` ``[in]`` (LoRAP): (1/n) Σ x² of each input over all tokens that count, n samples.

    Sums are float32 (or float64 for a float64 model). A gradient goes into its sum as soon as it is there, so
    one of them is in memory at a time; a product XᵀX is computed once for linears that read the same x. The
    sums of all layers are held at once: where that is too much, go through ``target_modules`` in parts. The
    model runs in evaluation mode, and ends up as it was: its modes, gradients, hooks, and what trains.

    Args:
        model: a model without adapters.
        batches: what ``forward`` takes, each once.
        collect: one or several of the above.
        target_modules: which linears, as in :class:`LoRAConfig`.
        exclude_modules: which not.
        forward: how to run the model on a batch: ``forward(model, batch)``. By default ``model(**batch)``
            for mappings, else ``model(batch)``. For gradients it returns a loss, or an output that has one
            as ``.loss``.
        rank: how many rows of ``activation_svd`` to keep; all by default.
        progress: called with the number of batches done, after each, in place of a bar on a terminal.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no such statistic, no batches, no matching linear, one that never ran, adapters in the
            model, a quantised weight where gradients are asked for, or a forward without a loss.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> statistics = calibrate(model, [torch.randn(8, 4)], collect=("covariance",))
        >>> config = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights="corda")
        >>> model = apply_lora(model, config, statistics=statistics)
    """
    names = _checked(model, collect)
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    layers = {site.name: site.linear for site in find_sites(model, config, linear_types())}
    if any(isinstance(layer, AdapterLayer) for layer in layers.values()) or _inside_peft(model, layers):
        raise ValueError("model: expected one without adapters (calibrate before apply_lora), got one with")
    gatherers = [COLLECTED[name](layers) for name in names]
    run = forward or call_model
    done = 0
    with contextlib.ExitStack() as scope:
        learns = "gradient" in names
        scope.enter_context(_as_it_was(model))
        model.train(False)
        for gatherer in gatherers:
            scope.enter_context(gatherer.listening())
        scope.enter_context(torch.enable_grad() if learns else torch.no_grad())
        for batch in each("calibrate", batches) if progress is None else batches:
            for gatherer in gatherers:
                gatherer.begin(batch)
            output = run(model, batch)
            if learns:
                _loss_of(output).backward()
            done += 1
            if progress is not None:
                progress(done)
    if not done:
        raise ValueError("batches: expected at least one, got none")
    found = Statistics({name: {} for name in layers})
    for gatherer in gatherers:
        for name, tensors in gatherer.finish(rank):
            found[name].update(tensors)
    return found


def _checked(model: nn.Module, collect: Iterable[str]) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    names = [collect] if isinstance(collect, str) else list(dict.fromkeys(collect))
    for name in names:
        if name not in COLLECTED:
            raise ValueError(f"collect: expected some of {', '.join(COLLECTED)}, got {name!r}")
    if not names:
        raise ValueError(f"collect: expected some of {', '.join(COLLECTED)}, got none")
    return names


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model on a batch, by keywords where that is a mapping."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _inside_peft(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether one of these layers is a part of one of PEFT's."""
    layers = tuple(f"{name}." for name, one in model.named_modules() if hasattr(one, "adapter_layer_names"))
    return any(name.startswith(layers) for name in names)


def _loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "forward: expected a loss of one number that depends on the weights, or an output with one as"
            f" .loss, got {type(output).__name__}"
        )
    return loss


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Gives every module its mode back, and every parameter its gradient and whether it trains."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, trains, grad in before:
            parameter.requires_grad_(trains)
            parameter.grad = grad
