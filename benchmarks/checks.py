"""No figure without a right answer: what a provider must pass before it is measured.

Values: y and every gradient against fp64, dropout off, at the sizes to be measured (fewer rows where they
are many): the error may be twice that of eager PyTorch in the same dtype.
Dropout: with W = 0, A = B = I the layer is s · drop(x), so the mask can be read off y and off dx: each
element is 0 or s · x/(1-p), dx has the same mask, dA and dB follow from it, and the keep rate fits.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .providers import PROVIDERS, SCALING, Case, Problem, make_problem
from .suites import Provider, Runner

NAMES = ("y", "dx", "dA", "dB")
MAX_ROWS_CPU = 512
PROBE = 64
# Drops less than one element in a thousand problems.
NO_DROPOUT = 1e-12


def outputs(runner: Runner, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, A and B (of x alone where there is no A)."""
    with runner.context():
        y = runner.call(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *runner.factors), dy))


def oracle(problem: Problem) -> tuple[Tensor, ...]:
    """The same in fp64, by hand."""
    x, w, a, b, dy = (
        t.detach().double() for t in (problem.x, problem.weight, problem.lora_a, problem.lora_b, problem.dy)
    )
    h, dh = x @ a.T, SCALING * (dy @ b)
    return x @ w.T + SCALING * (h @ b.T), dy @ w + dh @ a, dh.T @ x, SCALING * (dy.T @ h)


def plain_oracle(problem: Problem) -> tuple[Tensor, ...]:
    """y and dx of the base layer alone."""
    x, w, dy = (t.detach().double() for t in (problem.x, problem.weight, problem.dy))
    return x @ w.T, dy @ w


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """The largest error of each, over the largest value."""
    return [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)]


def _eager() -> Provider:
    return next(provider for provider in PROVIDERS if provider.name == "eager")


@functools.lru_cache(maxsize=1)
def _reference(case: Case) -> tuple[Problem, tuple[Tensor, ...], tuple[Tensor, ...], list[float]]:
    problem = make_problem(case)
    want = oracle(problem)
    eager = errors(outputs(_eager().build(problem), problem.x, problem.dy), want)
    return problem, want, plain_oracle(problem), eager


def judge(
    got: tuple[Tensor, ...],
    want: tuple[Tensor, ...],
    allowed: list[float],
    names: tuple[str, ...] = NAMES,
) -> str | None:
    """Which result is further from fp64 than allowed, or ``None``."""
    for name, tensor in zip(names, got, strict=False):
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
    for name, error, bound in zip(names, errors(got, want), allowed, strict=False):
        if not error <= bound:
            return f"{name} is off by {error:.1e} of its largest value, allowed is {bound:.1e}"
    return None


def check_values(provider: Provider, case: Case) -> str | None:
    """Why ``provider``'s output or gradients are wrong without dropout, or ``None``."""
    rows = case.rows if case.device != "cpu" else min(case.rows, MAX_ROWS_CPU)
    case = replace(case, rows=rows, dropout_p=0.0)
    problem, want, plain, eager = _reference(case)
    if provider.needs_dropout:
        problem = replace(problem, case=replace(case, dropout_p=NO_DROPOUT))
    runner = provider.build(problem)
    got = outputs(runner, problem.x, problem.dy)
    # Where eager happens to be (nearly) exact, as on one row, a few roundings are still no mistake.
    allowed = [max(2 * error, 4 * torch.finfo(case.dtype).eps) for error in eager]
    return judge(got, want if runner.factors else plain, allowed)


def probe_problem(case: Case) -> Problem:
    """W = 0, A = B = I, and an x without zeros: y = s · drop(x)."""
    case = replace(case, rows=8 * PROBE, cols=PROBE, out=PROBE, rank=PROBE)
    problem = make_problem(case, seed=1)
    eye = torch.eye(PROBE, device=case.device, dtype=case.dtype)
    x = (problem.x.detach().abs() + 1).requires_grad_()
    dy = problem.dy.abs() + 1
    return replace(problem, x=x, dy=dy, weight=torch.zeros_like(eye), lora_a=eye, lora_b=eye)


def check_dropout(provider: Provider, case: Case) -> str | None:
    """Why ``provider``'s dropout is wrong, or ``None``."""
    problem = probe_problem(case)
    runner = provider.build(problem)
    if not runner.factors:
        return None
    torch.manual_seed(0)
    got = outputs(runner, problem.x, problem.dy)
    keep = got[0] != 0
    bound = 8 * torch.finfo(case.dtype).eps
    return _rate(keep, case.dropout_p) or judge(got, _dropped(problem, keep), [bound] * len(NAMES))


def _rate(keep: Tensor, p: float) -> str | None:
    """The rate of kept elements, to 5 standard deviations."""
    rate, sigma = float(keep.double().mean()), (p * (1 - p) / keep.numel()) ** 0.5
    if abs(rate - (1 - p)) > 5 * sigma:
        return f"dropout keeps {rate:.4f} of the elements, expected {1 - p:.4f}"
    return None


def _dropped(problem: Problem, keep: Tensor) -> tuple[Tensor, ...]:
    """The probe's results for a given mask, in fp64."""
    factor = keep.double() * SCALING / (1 - problem.case.dropout_p)
    x, dy = problem.x.detach().double() * factor, problem.dy.double()
    product = dy.T @ x
    return x, dy * factor, product, product


def check(provider: Provider, case: Case) -> str | None:
    """Why ``provider`` must not be reported for ``case``, or ``None``."""
    wrong = check_values(provider, case)
    return wrong or (check_dropout(provider, case) if case.dropout_p else None)
