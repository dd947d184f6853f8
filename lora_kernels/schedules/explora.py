"""ExPLoRA: further pre-training on another domain with a few whole blocks and LoRA on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..adapters import LoRAConfig
from ..nn.apply import apply_lora
from ..nn.install import remove_lora


def apply_explora(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    unfreeze: Sequence[int] = (-1,),
    r: int = 64,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    **options: Any,
) -> nn.Module:
    """W_T = W_S + Δ: Δ of full rank in the blocks ``unfreeze``, LoRA on query and value in the others

    ExPLoRA (Khanna et al., 2024, arXiv 2406.10973). The norms of the model train too, and nothing else; train
    with the loss of the pre-training, then :func:`merge_and_restart`.

    Args:
        model: a transformer without adapters.
        blocks: its blocks.
        unfreeze: which of them train whole.
        r: rank.
        targets: ends of the names of the linears that get adapters.
        options: further fields of :class:`LoRAConfig`.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: of a wrong type.
        ValueError: there are no blocks, no such block, a block is not in the model, or no linear matches; the
            model is then as it was.

    Examples:
        >>> blocks = [nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)}) for _ in range(2)]
        >>> model = apply_explora(nn.Sequential(*blocks), blocks, r=2)
    """
    names = {id(module): name for name, module in model.named_modules()}
    for i, block in enumerate(blocks):
        if id(block) not in names:
            raise ValueError(f"blocks[{i}]: expected a module of the model, got {type(block).__name__}")
    for i in unfreeze:
        if not -len(blocks) <= i < len(blocks):
            raise ValueError(f"unfreeze: expected numbers of the {len(blocks)} blocks, got {i}")
    whole = {i % len(blocks) for i in unfreeze}
    prefixes = [f"{names[id(block)]}." for i, block in enumerate(blocks) if i not in whole]
    chosen = [
        name
        for name, module in model.named_modules()
        if name.startswith(tuple(prefixes)) and name.rpartition(".")[2] in targets
    ]
    if not chosen:
        raise ValueError(f"targets: expected ends of names of linears in the blocks, got {list(targets)}")
    apply_lora(model, LoRAConfig(r=r, target_modules=chosen, **{"lora_alpha": r, **options}))
    for i in whole:
        blocks[i].requires_grad_(True)
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.requires_grad_(True)
    return model


def merge_and_restart(model: nn.Module) -> nn.Module:
    """W_S + Δ in the model's own layers, everything trains: ready for a probe or another LoRA.

    Examples:
        >>> blocks = [nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)}) for _ in range(2)]
        >>> model = merge_and_restart(apply_explora(nn.Sequential(*blocks), blocks, r=2))
    """
    remove_lora(model, merge=True)
    return model.requires_grad_(True)
