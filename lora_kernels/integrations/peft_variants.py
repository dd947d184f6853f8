"""What the variants of PEFT's LoRA ``Linear`` make of its A, B, s and g; see :mod:`.peft`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants
from torch import Tensor

from ..adapters.update import Added, Branched, LowRank, Update, apply_update
from ..ops.compressed_lora import CompressedLora


class VariantCall(NamedTuple):
    """What a variant may read beside the layer."""

    x: Tensor
    # The probability of its dropout in this call.
    dropout_p: float
    # For each sample how many of its last tokens an activated LoRA acts on, None for none.
    offsets: Sequence[int | None] | None


def _same(layer: Any, name: str, plain: LowRank, call: VariantCall) -> LowRank:
    return plain


def _gated(plain: LowRank, gate: Tensor) -> LowRank:
    return plain._replace(gate=gate if plain.gate is None else gate * plain.gate)


def _kasa(layer: Any, name: str, plain: LowRank, call: VariantCall) -> LowRank:
    """s · (drop(x) Aᵀ ⊙ d) Bᵀ"""
    variants.KasaLinearVariant._apply_deferred_truncation(layer, name)
    return _gated(plain, layer.lora_diag[name])


def _bdlora(layer: Any, name: str, plain: LowRank, call: VariantCall) -> LowRank:
    """A or B of blocks along the diagonal, which PEFT keeps side by side."""
    lora_a, lora_b = (_whole(part[name], part[name].weight) for part in (layer.lora_A, layer.lora_B))
    return plain._replace(lora_a=lora_a, lora_b=lora_b)


def _whole(module: Any, weight: Tensor) -> Tensor:
    if not isinstance(module, variants.BlockDiagonalLinear):
        return weight
    return torch.block_diag(*weight.chunk(module.nblocks))


def _alora(layer: Any, name: str, plain: LowRank, call: VariantCall) -> LowRank:
    """A gate of 1 on the last tokens of each sample, from its invocation on, and 0 before."""
    if call.x.dim() not in (2, 3):
        shape = tuple(call.x.shape)
        raise ValueError(f"x: expected [samples, tokens, features] for an activated LoRA, got shape {shape}")
    tokens = call.x.shape[1] if call.x.dim() == 3 else 1
    gate = activated(call.offsets, len(call.x), tokens, call.x)
    gate = gate[..., None] if call.x.dim() == 3 else gate
    return _gated(plain, gate)


def activated(offsets: Sequence[int | None] | None, samples: int, tokens: int, like: Tensor) -> Tensor:
    """[samples, tokens] of 1 where an activated LoRA acts, of the dtype and device of ``like``."""
    counts = [0] * samples if offsets is None else [min(int(one or 0), tokens) for one in offsets]
    first = tokens - torch.tensor(counts, device=like.device)
    return (torch.arange(tokens, device=like.device) >= first[:, None]).to(like.dtype)


def _monteclora(layer: Any, name: str, plain: LowRank, call: VariantCall) -> LowRank:
    """A + Σ_n w_n E_n with PEFT's draws, in training."""
    sampler = layer.lora_monteclora_sampler
    if name not in sampler:
        config = layer._lora_monteclora_config[name]
        sampler[name] = variants.MontecloraLinearVariant._create_sampler(layer, name, config)
    if not layer.training:
        return plain
    noise, weights = sampler[name]()
    lora_a: Any = plain.lora_a
    mean = torch.tensordot(weights, noise, 1).T
    return plain._replace(lora_a=torch.addcmul(mean, lora_a, weights.sum()))


def _velora(layer: Any, name: str, plain: LowRank, call: VariantCall) -> Update:
    """The plain update, whose dA is of what one direction keeps of drop(x), in training."""
    if not (layer.training and torch.is_grad_enabled()):
        return plain
    x = F.dropout(call.x, call.dropout_p) if call.dropout_p else call.x
    variants.VeloraLinearVariant._maybe_update_embed(layer, name, x)
    lora_a: Any = plain.lora_a
    lora_b = plain.lora_b if plain.gate is None else plain.lora_b * plain.gate
    numbers: Any = (layer.lora_velora_num_groups[name], plain.scaling, layer.lora_velora_scale[name])
    branch = CompressedLora(lora_b.shape[0], *numbers)
    return Branched(branch, (lora_a, lora_b, layer.lora_velora_embed[name]), x if call.dropout_p else None)


def _arrow(layer: Any, name: str, plain: LowRank, call: VariantCall) -> Update:
    """The experts' ranks side by side, each token's weight of each in the gate; the output is dropped."""
    arrow = layer.lora_arrow[name]
    arrow.gen_know_sub(layer.lora_A, layer.lora_B)
    arrow.build_prototypes(layer.lora_A, layer.lora_B)
    names = arrow.task_adapter_names
    lora_as = [layer.lora_A[one].weight for one in names]
    lora_b = torch.cat([layer.lora_B[one].weight for one in names], 1)
    weights = _arrow_weights(arrow, call.x, lora_as[0].dtype)
    scaled = weights * torch.tensor([layer.scaling[one] for one in names]).to(weights)
    gate = scaled.repeat_interleave(lora_as[0].shape[0], -1)
    update = LowRank(torch.cat(lora_as), lora_b, 1.0, gate)
    if not call.dropout_p:
        return update
    return Added(F.dropout(apply_update(call.x, None, None, update), call.dropout_p))


def _arrow_weights(arrow: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., experts]: softmax over the best of |x Pᵀ| / T, zero for the others."""
    likeness = F.linear(x.to(dtype), arrow.prototypes).abs()
    best, ids = likeness.topk(arrow.top_k, -1)
    return torch.zeros_like(likeness).scatter(-1, ids, torch.softmax(best / arrow.temperature, -1))


_Lowering = Callable[[Any, str, LowRank, VariantCall], Update]
# PEFT's variants but for DoRA -> what they make of the plain update.
LOWERINGS: dict[type, _Lowering] = {
    variants.ALoraLinearVariant: _alora,
    variants.ArrowLinearVariant: _arrow,
    variants.BdLoraLinearVariant: _bdlora,
    variants.KasaLinearVariant: _kasa,
    variants.MiCALinearVariant: _same,
    variants.MontecloraLinearVariant: _monteclora,
    variants.VeloraLinearVariant: _velora,
}
# Those that come to one plain A, B, s and g whatever x is: what groups and mixed batches take.
PLAIN = (variants.BdLoraLinearVariant, variants.KasaLinearVariant, variants.MiCALinearVariant)
# Those whose lora_B is not called, or not for every row, so that its bias is not simply added.
UNBIASED = (variants.ALoraLinearVariant, variants.ArrowLinearVariant)
