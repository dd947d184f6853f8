"""What trained adapters and their scores say: spectra, forgetting, rescoring."""

from __future__ import annotations

from .rescoring import correlation_penalty, mwer_loss, nprr, word_error_rate, word_errors
from .spectra import (
    Spectrum,
    biderman2024,
    effective_rank,
    effective_ranks,
    factor_spectrum,
    learning_forgetting,
    spectrum,
)

__all__ = [
    "Spectrum",
    "biderman2024",
    "correlation_penalty",
    "effective_rank",
    "effective_ranks",
    "factor_spectrum",
    "learning_forgetting",
    "mwer_loss",
    "nprr",
    "spectrum",
    "word_error_rate",
    "word_errors",
]
