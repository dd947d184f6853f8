"""Adapters of one model merged into a new one of it, as PEFT's ``add_weighted_adapter`` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig
from ..adapters.lowered import low_rank_of
from ..nn import lora_layers, owned
from ..nn.adapted import is_combined, lora_configs
from ..nn.adapter_layer import AdapterLayer, _check_name
from ..nn.install import check_place, install
from ..nn.planned import PlannedAdapter, plan_adapter
from ..nn.wrappers import plain_names
from .merging import Factors, Merging, combine, decompose, merge_factors


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """ΔW ≈ Σ_i w_i ΔW_i in one LoRA adapter more, by one of PEFT's kinds and with its numbers.

    ``combination_type`` is ``cat``, ``svd``, ``linear``, ``magnitude_prune``, ``ties``, ``dare_linear`` or
    ``dare_ties``, or one of the last four with ``_svd``; :class:`~lora_kernels.compose.Merging` says what
    each is. The new adapter has s = 1, waits for :func:`set_adapter`, and is saved as any LoRA is. ``cat`` is
    the exact sum; ``svd`` forms no ΔW and takes adapters of unequal ranks; ``*_svd`` and a clamped ``svd``
    decompose each layer's whole ΔW. One adapter by itself is scaled, whatever the kind. A start that was
    taken out of W (PiSSA) is taken out of the adapter likewise.

    Args:
        model: one of :func:`apply_lora` with the adapters; it goes on with the same ones active.
        adapters: their names. A layer takes part with those it has.
        weights: w, one for each; below 0 takes away.
        adapter_name: the new adapter's name.
        combination_type: the kind.
        density: the part of the values that is kept, above 0 and at most 1; for all kinds but ``cat``,
            ``svd`` and ``linear``.
        majority_sign_method: ``"total"`` or ``"frequency"``, for ``ties`` and ``dare_ties``.
        svd_rank: rank of what is decomposed, where it has as much; by default the largest among the adapters.
        svd_clamp: a quantile at which the decomposition's numbers are clamped.
        generator: draws what ``dare_*`` drops; by default torch's own, from which PEFT draws the same.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an adapter is not there, owns parameters of the model, or is of a method without such a
            ΔW; the name is taken; ranks differ where A and B are added; or an option is out of range. The
            model is then as it was.
        RuntimeError: FSDP2 has taken over the parameters.

    Examples:
        >>> config = LoRAConfig(r=2, target_modules="all-linear")
        >>> model = apply_lora(apply_lora(nn.Sequential(nn.Linear(4, 4)), config, "a"), config, "b")
        >>> model = add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "both", "cat")
    """
    how = Merging(combination_type, density, majority_sign_method, svd_rank, svd_clamp, generator).checked()
    how = how._replace(kind="linear") if len(adapters) == 1 else how
    _check_given(model, adapters, weights)
    _check_name(adapter_name, lora_configs(model))
    check_place(model, adapter_name)
    each = dict(zip(adapters, map(float, weights), strict=True))
    plain = plain_names(model)
    parts = {
        name: (layer, {one: layer.adapters[one] for one in each if one in layer.adapters})
        for name, layer in lora_layers(model).items()
    }
    top = max(_rank(one) for _, named in parts.values() for one in named.values())
    how = how if svd_rank else how._replace(svd_rank=top)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (layer, named) in parts.items():
        if named:
            found[plain[name]] = _merged(plain[name], layer, named, [each[one] for one in named], how)
    config = _config(lora_configs(model)[adapters[0]], {name: len(a) for name, (a, _) in found.items()})
    plan = plan_adapter(model, config, draw=False)
    _fill(plan, found)
    install(model, config, adapter_name, plan, fuse=is_combined(model))
    return model


def _check_given(model: nn.Module, adapters: Sequence[str], weights: Sequence[float]) -> None:
    known = lora_configs(model)
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters: expected names, each once, got {adapters!r}")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    for name in adapters:
        if name not in known:
            raise ValueError(f"adapters: expected ones of {', '.join(known) or 'none'}, got {name!r}")
        if next(iter(owned.owned_tensors(model, name)), None) is not None:
            raise ValueError(f"adapters: {name!r} owns parameters of the model, which cannot be merged")


@torch.no_grad()
def _merged(
    at: str, layer: AdapterLayer, adapters: dict[str, Adapter], weights: list[float], how: Merging
) -> tuple[Tensor, Tensor]:
    """A and B of a layer's merged adapter."""
    try:
        if not how.on_updates or (how.kind == "svd" and how.svd_clamp is None and _are_low(adapters)):
            return merge_factors([_factors(one) for one in adapters.values()], weights, how)
        # As PEFT has them, so that what is dropped at random is the same.
        deltas = [layer._unmatrix(_delta(one)) for one in adapters.values()]
        assert how.svd_rank is not None
        return decompose(layer._matrix(combine(deltas, weights, how)), how.svd_rank, how.svd_clamp)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _are_low(adapters: dict[str, Adapter]) -> bool:
    return all(adapter.plain for adapter in adapters.values())


def _rank(adapter: Adapter) -> int:
    return adapter.r * (2 if "start_A" in adapter._buffers else 1)


def _factors(adapter: Adapter) -> Factors:
    """A, B and s of the change of W, a start that was taken out of it included."""
    lora_a, lora_b, scaling = low_rank_of(adapter)
    if "start_A" in adapter._buffers:
        lora_a, lora_b = torch.cat([lora_a, adapter.start_A]), torch.cat([lora_b, -adapter.start_B], 1)
    return lora_a, lora_b, scaling


def _delta(adapter: Adapter) -> Tensor:
    """ΔW [out, in] of any method that adds one."""
    if adapter.plain:
        lora_a, lora_b, scaling = _factors(adapter)
        return scaling * (lora_b @ lora_a)
    if not adapter.mergeable or adapter.beyond_weight or adapter.method == "dora":
        raise ValueError(f"method: {adapter.method} has no one ΔW that it adds to W")
    return adapter.delta()


def _config(first: LoRAConfig, ranks: dict[str, int]) -> LoRAConfig:
    """The merged adapter's: plain LoRA of s = 1 on just these layers, whose dropout is the first one's."""
    r = max(ranks.values())
    pattern: dict[str, Any] = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    return LoRAConfig(
        r=r,
        lora_alpha=r,
        lora_dropout=first.lora_dropout,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )


@torch.no_grad()
def _fill(plan: PlannedAdapter, found: dict[str, tuple[Tensor, Tensor]]) -> None:
    for site, _, adapter in plan.layers:
        lora_a, lora_b = found[site.plain]
        adapter.lora_A.copy_(lora_a)
        adapter.lora_B.copy_(lora_b)
