"""Rescoring of speech recognition's n-best lists: losses, and how much worse homophones make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim._common import check_number


def mwer_loss(scores: Tensor, errors: Tensor) -> Tensor:
    """mean over lists of Σ_i P_i (ε_i - ε̄), P = softmax(-s): the expected word errors, less their mean

    LoRB (Yu et al., 2023, arXiv 2309.15223), which rescores with s = s_acoustic + β · s_LM, s_LM a linear map
    of BERT's first hidden state; the form of the loss is from memory. ε̄ changes no gradient in expectation
    and takes out what no choice could better.

    Args:
        scores: s ``[lists, n]``, negative log likelihoods: smaller is better; +∞ for a place without a
            hypothesis.
        errors: ε ``[lists, n]``, word errors.

    Raises:
        ValueError: no two matrices of one shape, or a list without a hypothesis.

    Examples:
        >>> scores, errors = torch.randn(2, 5, requires_grad=True), torch.randint(0, 9, (2, 5)).float()
        >>> mwer_loss(scores, errors).backward()
    """
    if scores.dim() != 2 or scores.shape != errors.shape:
        raise ValueError(
            f"errors: expected [lists, n] as the scores, got {tuple(errors.shape)} beside"
            f" {tuple(scores.shape)}"
        )
    there = scores.detach() != torch.inf
    count = there.sum(1, keepdim=True)
    if not bool((count > 0).all()):
        raise ValueError("scores: expected at least one hypothesis in every list, got one without")
    counted = torch.where(there, errors.to(scores), 0.0)
    mean = counted.sum(1, keepdim=True) / count
    return ((-scores).softmax(1) * torch.where(there, counted - mean, 0.0)).sum(1).mean()


def correlation_penalty(hidden: Tensor, eps: float = 1e-6) -> Tensor:
    """‖Σ - I‖_F, Σ the correlations ``[d, d]`` of the numbers of h over the batch

    LoRB's regulariser (Yu et al., 2023, arXiv 2309.15223; its form is from memory): what it holds near zero
    keeps the sentences' embeddings from lying in a narrow cone.

    Args:
        hidden: h ``[batch, d]``.
        eps: is added to each variance.

    Raises:
        ValueError: h is no matrix of at least two rows.

    Examples:
        >>> correlation_penalty(torch.randn(16, 4)) >= 0
        tensor(True)
    """
    check_number("eps", eps)
    if hidden.dim() != 2 or len(hidden) < 2:
        raise ValueError(f"hidden: expected [batch, d] with two rows or more, got {tuple(hidden.shape)}")
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    centred = wide - wide.mean(0)
    covariance = centred.T @ centred / (len(wide) - 1)
    size = (covariance.diagonal() + eps).sqrt()
    unit = torch.eye(len(size), dtype=wide.dtype, device=wide.device)
    return torch.linalg.matrix_norm(covariance / (size[:, None] * size) - unit)


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that turn one list of words into the other.

    Examples:
        >>> word_errors("we like kernels".split(), "we like a kernel".split())
        2
    """
    before = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        row = [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
        before = row
    return before[-1]


def word_error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Σ errors / Σ words of the references

    Raises:
        ValueError: other numbers of sentences, or references without words.

    Examples:
        >>> word_error_rate([["a", "b"]], [["a", "c"]])
        0.5
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"hypotheses: expected {len(references)} sentences, got {len(hypotheses)}")
    words = sum(len(one) for one in references)
    if not words:
        raise ValueError("references: expected words, got none")
    errors = sum(word_errors(*pair) for pair in zip(references, hypotheses, strict=True))
    return errors / words


def nprr(clean: float, perturbed: float) -> float:
    """(WER_perturbed - WER_clean) / WER_clean: how much worse rescoring gets where homophones replace words

    N-best Perturbation-based Rescoring Robustness (Yu et al., 2024, arXiv 2401.10447), in our reading.
    Perturb the best hypothesis or the whole list, and alike for the models to compare.

    Raises:
        ValueError: a rate below 0, or a clean one of 0.

    Examples:
        >>> nprr(0.5, 0.75)
        0.5
    """
    check_number("clean", clean, above=True)
    check_number("perturbed", perturbed)
    return (perturbed - clean) / clean
