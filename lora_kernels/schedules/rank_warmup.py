"""A warm-up at a high rank: trained wide for some steps, then shrunk to the best low rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim._common import check_count
from ._common import check_unmerged, forget_, mergeable_pairs
from .base import Schedule


@torch.no_grad()
def shrink_rank(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' = √S V_rᵀ, B' = U_r √S of B A = U S Vᵀ: the B' A' of that rank nearest to B A

    Without B A: by the QR decompositions of B and Aᵀ, in at least float32. The scale s stays what it was.

    Args:
        lora_a: A ``[r, in]``.
        lora_b: B ``[out, r]``.
        rank: r', at most r.

    Raises:
        TypeError: ``rank`` is no int.
        ValueError: it is not in 1 … r.

    Examples:
        >>> a, b = shrink_rank(torch.randn(4, 8), torch.randn(6, 4), rank=2)
        >>> a.shape, b.shape
        (torch.Size([2, 8]), torch.Size([6, 2]))
    """
    check_count("rank", rank)
    if rank > len(lora_a):
        raise ValueError(f"rank: expected at most {len(lora_a)}, got {rank}")
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(lora_b.to(wide))
    q_a, r_a = torch.linalg.qr(lora_a.T.to(wide))
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    shrunk = (q_a @ vh[:rank].T * root).T, q_b @ u[:, :rank] * root
    return shrunk[0].to(lora_a.dtype), shrunk[1].to(lora_b.dtype)


class RankWarmup(Schedule):
    """r ranks for ``steps`` steps; then B A is cut to its best ``r_lo``, and those train on

    The high-rank warm-up of a study of LoRA in speech recognition (Yu et al., 2024, arXiv 2401.10447); that
    it is cut by the singular value decomposition is our reading. The other ranks' row of A and column of B
    become zero, so that they have no gradient and stay zero without a mask; what the optimiser knows of both
    factors is forgotten. Call :func:`compact` once training is done. The study's mixed-rank training is
    :class:`DyLoRASampler` with ``ranks``, its dynamic one :class:`AdaLoRA`.

    Args:
        model: one of :func:`apply_lora` or of PEFT with plain LoRA of a high rank.
        optimizer: what trains it.
        r_lo: the rank to go on with; a layer of fewer ranks keeps its own.
        steps: of the warm-up.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or an adapter is more than s · B A.
    """

    key = "lora_asr_study"
    with_optimizer = True

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None = None, *, r_lo: int = 8, steps: int = 100
    ) -> None:
        super().__init__(model, optimizer)
        check_count("r_lo", r_lo)
        check_count("steps", steps)
        self.r_lo, self.warmup = r_lo, steps
        self.pairs = mergeable_pairs(model)

    def act(self, step: int) -> None:
        """Cuts the ranks, where the warm-up ends."""
        if step != self.warmup:
            return
        check_unmerged(self.pairs)
        for pair in self.pairs:
            rank = min(self.r_lo, pair.rank)
            lora_a, lora_b = shrink_rank(pair.lora_a, pair.lora_b, rank)
            for factor in (pair.lora_a, pair.lora_b):
                factor.zero_()
            pair.lora_a[:rank] = lora_a
            pair.lora_b[:, :rank] = lora_b
            assert self.optimizer is not None
            forget_(self.optimizer, (pair.lora_a, pair.lora_b))
