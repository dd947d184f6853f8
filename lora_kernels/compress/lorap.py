"""LoRAP: attention weights of low rank, feed-forward layers of fewer neurons."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._messages import each
from ..nn.low_rank import LowRankLinear
from ..optim._common import check_number
from ..stats.calibration import calibrate, call_model
from .factors import awsvd, check_model, plain_linear, put


class Roles(NamedTuple):
    """The last parts of the names of a block's linears; Llama's by default."""

    # Whose ranks are the lower ones.
    low: tuple[str, ...] = ("q_proj", "k_proj")
    # Whose ranks are ``ratio`` times as high.
    high: tuple[str, ...] = ("v_proj", "o_proj")
    # What writes the neurons, one or several linears that read one x.
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    # What reads them.
    down: str = "down_proj"


class Kept(NamedTuple):
    """What :func:`lorap` left."""

    # Name of each attention linear that was compressed → its rank.
    ranks: dict[str, int]
    # Name of each linear that reads neurons → how many.
    neurons: dict[str, int]


_LLAMA = Roles()


def lorap(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.2,
    *,
    roles: Roles = _LLAMA,
    ratio: float = 3.0,
    keep_low: float = 0.01,
    dense: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Kept:
    """W_q, W_k, W_v, W_o ← B A by :func:`awsvd`; feed-forward layers lose the share p of their neurons

    LoRAP (Li et al., 2024, arXiv 2404.09695), block by block, each seeing what the compressed ones before
    give: so the model runs over the batches once, and once more for each block, up to it. Ranks are those of
    :func:`lorap_ranks`, neurons those of :func:`prune_mlp`. A block is what a number in a name tells apart
    (``model.layers.3``).

    To make up for the loss as the paper does: ``kept = lorap(..., dense=True)``, train LoRA of rank r on the
    model, ``remove_lora(model, merge=True)``, then ``factorise(model, {name: k + r})`` for the names and
    ranks k of ``kept.ranks``, where that is fewer numbers: nothing is lost by it.

    Args:
        model: one without adapters, changed in place.
        batches: what ``forward`` takes.
        sparsity: p in (0, 1), the share of the numbers to do without.
        roles: how the linears are called.
        ratio: ρ, the ranks of value and output over those of query and key.
        keep_low: the share of least neurons that stays.
        dense: whether the products B A stay dense weights.
        forward: how to run the model on a batch; as of :func:`lora_kernels.calibrate`.

    Returns:
        The ranks and the numbers of neurons.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number out of range, no batches, or no linears of these roles, or one that never
            ran; nothing is changed.

    Examples:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 9}
        >>> model = LlamaModel(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> kept = lorap(model, [{"input_ids": torch.tensor([[1, 2, 3]])}], sparsity=0.5)
    """
    check_model(model)
    check_number("sparsity", sparsity, 0.0, 1.0, above=True)
    check_number("ratio", ratio, above=True)
    check_number("keep_low", keep_low, 0.0, 1.0)
    if keep_low + sparsity > 1:
        raise ValueError(f"keep_low: expected at most 1 - sparsity = {1 - sparsity:g}, got {keep_low}")
    samples, blocks = list(batches), _blocks(model, roles)
    if not samples:
        raise ValueError("batches: expected at least one, got none")
    # What cannot run, or never does, shows before anything is changed.
    every = [name for names in blocks.values() for name in names]
    calibrate(model, samples, ("squares",), target_modules=every, forward=forward)
    kept = Kept({}, {})
    for block, names in each("lorap", blocks.items()):
        run = partial(_until, model.get_submodule(block), forward or call_model)
        statistics = calibrate(
            model, samples, ("squares",), target_modules=names, forward=run, progress=lambda _: None
        )
        squares = {name: one["squares"] for name, one in statistics.items()}
        for name in names:
            role, linear = name.rpartition(".")[2], plain_linear(model, name)
            if role in (*roles.low, *roles.high):
                low, high = lorap_ranks(sparsity, linear.in_features, linear.out_features, ratio)
                rank = low if role in roles.low else high
                if rank is not None:
                    kept.ranks[name] = _compress(model, name, squares[name], rank, dense)
            elif role == roles.down:
                above = [_sibling(name, up) for up in roles.up]
                ups = [plain_linear(model, up) for up in above]
                scores = neuron_scores(ups, linear, squares[above[0]], squares[name])
                kept.neurons[name] = prune_mlp(ups, linear, scores, sparsity, keep_low)
    return kept


def lorap_ranks(
    sparsity: float, in_features: int, out_features: int | None = None, ratio: float = 3.0
) -> tuple[int, int | None]:
    """k = ⌊(1-p) h⌋, k_low = ⌊2k / (1+ρ)⌋, k_high = ⌊2ρk / (1+ρ)⌋, h = in · out / (in + out)

    Two factors of rank h have as many numbers as W. Where k_high ≥ h it is ``None``, the weight stays dense,
    and k_low = ⌊2 (1-p) h⌋ - ⌊h⌋, which keeps the sum.

    Examples:
        >>> lorap_ranks(0.5, in_features=64)
        (8, 24)
    """
    out_features = in_features if out_features is None else out_features
    half = in_features * out_features / (in_features + out_features)
    mean = int((1 - sparsity) * half)
    low, high = int(2 * mean / (1 + ratio)), int(2 * mean * ratio / (1 + ratio))
    if high >= half:
        return max(1, int(2 * (1 - sparsity) * half) - int(half)), None
    return max(1, low), max(1, high)


@torch.no_grad()
def neuron_scores(ups: list[nn.Linear], down: nn.Linear, squares: Tensor, squares_down: Tensor) -> Tensor:
    """Σ_W ‖W_j: ⊙ √s‖ + √s'_j ‖W'_:j‖ of each neuron j, W over ``ups``, W' of ``down``

    Args:
        ups: the linears that write the neurons.
        down: the linear that reads them.
        squares: s ``[in]``, sums of x² of what ``ups`` read.
        squares_down: s' ``[neurons]``, of what ``down`` reads.

    Examples:
        >>> up, down = nn.Linear(4, 6), nn.Linear(6, 4)
        >>> neuron_scores([up], down, torch.ones(4), torch.ones(6)).shape
        torch.Size([6])
    """
    wide = torch.promote_types(down.weight.dtype, torch.float32)
    total = (down.weight.to(wide) * squares_down.to(wide).sqrt()).norm(dim=0)
    for up in ups:
        total = total + (up.weight.to(wide) * squares.to(wide).sqrt()).norm(dim=1)
    return total


@torch.no_grad()
def prune_mlp(
    ups: list[nn.Linear], down: nn.Linear, scores: Tensor, sparsity: float, keep_low: float = 0.01
) -> int:
    """Takes ⌊p n⌋ of n neurons away, in place: those that score least, but for the ⌊q n⌋ very least

    Returns:
        How many are left.

    Raises:
        ValueError: as many scores as there are neurons are not there, or none would be left.

    Examples:
        >>> up, down = nn.Linear(4, 6), nn.Linear(6, 4)
        >>> prune_mlp([up], down, torch.arange(6.0), sparsity=0.5), up.out_features
        (3, 3)
    """
    count = down.in_features
    if scores.shape != (count,):
        raise ValueError(f"scores: expected one for each of {count} neurons, got shape {tuple(scores.shape)}")
    first, pruned = int(keep_low * count), int(sparsity * count)
    if pruned >= count:
        raise ValueError(f"sparsity: expected less than 1, got {sparsity}")
    order = scores.argsort(stable=True)
    kept = torch.cat([order[:first], order[first + pruned :]]).sort().values
    for up in ups:
        up.weight = _taken(up.weight, kept, 0)
        up.bias = None if up.bias is None else _taken(up.bias, kept, 0)
        up.out_features = len(kept)
    down.weight, down.in_features = _taken(down.weight, kept, 1), len(kept)
    return len(kept)


def _taken(parameter: Tensor, kept: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, kept), parameter.requires_grad)


def _compress(model: nn.Module, name: str, squares: Tensor, rank: int, dense: bool) -> int:
    linear = plain_linear(model, name)
    lora_a, lora_b = awsvd(linear.weight, squares, rank)
    if dense:
        with torch.no_grad():
            linear.weight.copy_(lora_b @ lora_a)
    else:
        put(model, name, LowRankLinear(lora_a, lora_b, linear.bias))
    return rank


def _sibling(name: str, other: str) -> str:
    return f"{name.rpartition('.')[0]}.{other}".removeprefix(".")


def _blocks(model: nn.Module, roles: Roles) -> dict[str, list[str]]:
    """Name of each block → its linears of these roles, in the order of the model."""
    wanted = {*roles.low, *roles.high, *roles.up, roles.down}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wanted and type(module) is nn.Linear:
            numbered = re.match(r"(.*\.)?\d+(?=\.)", name)
            found.setdefault(numbered[0] if numbered else name.rpartition(".")[0], []).append(name)
    if not found:
        raise ValueError(f"roles: expected the names of some linears of the model, got {', '.join(wanted)}")
    for names in found.values():
        for name in names:
            for up in roles.up if name.rpartition(".")[2] == roles.down else ():
                plain_linear(model, _sibling(name, up))
    return found


class _Reached(Exception):
    """What is behind a block need not run."""


def _until(block: nn.Module, run: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> None:
    """Runs the model until the block has run."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        run(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
