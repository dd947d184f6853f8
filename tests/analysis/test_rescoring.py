"""The rescoring losses against loops in fp64, and word errors."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.analysis import correlation_penalty, mwer_loss, nprr, word_error_rate, word_errors


def lists():
    torch.manual_seed(0)
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    return scores, torch.randint(0, 5, (3, 4)).double()


def gradient(loss, tensor):
    return torch.autograd.grad(loss, tensor)[0]


def test_mwer_is_the_loop_over_hypotheses():
    scores, errors = lists()
    want = 0.0
    for i in range(3):
        weights = [torch.exp(-scores[i, j]) for j in range(4)]
        for j in range(4):
            want = want + weights[j] / sum(weights) * (errors[i, j] - errors[i].mean()) / 3
    found = mwer_loss(scores, errors)
    torch.testing.assert_close(found, want)
    own = gradient(found, scores)
    torch.testing.assert_close(own, gradient(want, scores))
    torch.testing.assert_close(own.sum(1), torch.zeros(3, dtype=torch.float64))  # over a list's hypotheses
    assert torch.autograd.gradcheck(lambda s: mwer_loss(s, errors), scores)


def test_constants_change_no_gradient():
    scores, errors = lists()
    want = gradient(mwer_loss(scores, errors), scores)
    for loss in (mwer_loss(scores + 3.0, errors), mwer_loss(scores, errors + 2.0)):
        torch.testing.assert_close(gradient(loss, scores), want)


def test_a_place_without_a_hypothesis_is_not_there():
    scores, errors = lists()
    longer = torch.cat([scores, torch.full((3, 2), torch.inf, dtype=torch.float64)], 1)
    padded = torch.cat([errors, torch.full((3, 2), 9.0)], 1)
    found, want = mwer_loss(longer, padded), mwer_loss(scores, errors)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(gradient(found, scores), gradient(want, scores))


def test_the_penalty_is_of_torchs_correlations():
    torch.manual_seed(0)
    hidden = torch.randn(20, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    hidden.requires_grad_()
    want = (torch.corrcoef(hidden.T) - torch.eye(5)).norm()
    found = correlation_penalty(hidden, eps=0.0)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(gradient(found, hidden), gradient(want, hidden))
    white = torch.linalg.qr((hidden - hidden.mean(0)).detach()).Q
    assert correlation_penalty(white, eps=0.0) < 1e-12
    constant = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradient(correlation_penalty(constant), constant).isfinite().all()


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "a c", 1),
        ("a c", "a b c d", 2),
        ("", "a", 1),
        ("a b c d", "", 4),
        ("a b c d", "b c d a", 2),
    ],
)
def test_word_errors(reference, hypothesis, errors):
    assert word_errors(reference.split(), hypothesis.split()) == errors


def test_rates():
    assert word_error_rate([["a", "b"], ["c", "d"]], [["a"], ["c", "e"]]) == 0.5
    assert nprr(0.1, 0.1) == 0 and nprr(0.2, 0.3) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mwer_loss(torch.ones(2, 3), torch.ones(3, 2)), r"errors: expected \[lists, n\]"),
        (lambda: mwer_loss(torch.full((1, 2), torch.inf), torch.ones(1, 2)), "scores: expected at least one"),
        (lambda: correlation_penalty(torch.ones(1, 3)), r"hidden: expected \[batch, d\]"),
        (lambda: correlation_penalty(torch.ones(2, 3), -1.0), "eps: expected 0 <= eps"),
        (lambda: word_error_rate([["a"]], []), "hypotheses: expected 1 sentences, got 0"),
        (lambda: word_error_rate([[]], [[]]), "references: expected words, got none"),
        (lambda: nprr(0.0, 0.1), "clean: expected 0 < clean"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
