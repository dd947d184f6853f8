"""Smaller models: weights of low rank, and fewer neurons."""

from __future__ import annotations

from .decompose import adaptive_rank
from .factors import awsvd, factorise, truncate_svd
from .loading import load_compressed
from .lorap import Kept, Roles, lorap, lorap_ranks, neuron_scores, prune_mlp
from .tucker import tucker2, tucker2_conv, tucker2_weight

__all__ = [
    "Kept",
    "Roles",
    "adaptive_rank",
    "awsvd",
    "factorise",
    "load_compressed",
    "lorap",
    "lorap_ranks",
    "neuron_scores",
    "prune_mlp",
    "truncate_svd",
    "tucker2",
    "tucker2_conv",
    "tucker2_weight",
]
