"""What trained adapters and their scores say: spectra, sizes of training sets, forgetting, rescoring."""

from __future__ import annotations

from .dsire import DSiRe, lora_spectrum
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
    "DSiRe",
    "Spectrum",
    "biderman2024",
    "correlation_penalty",
    "effective_rank",
    "effective_ranks",
    "factor_spectrum",
    "learning_forgetting",
    "lora_spectrum",
    "mwer_loss",
    "nprr",
    "spectrum",
    "word_error_rate",
    "word_errors",
]
