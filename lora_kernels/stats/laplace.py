"""Laplace-LoRA: what a fine-tuned model does not know, from K-FAC statistics of its adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._messages import each
from ..nn.pairs import Pair, lora_pairs

Forward = Callable[[nn.Module, Any], Tensor]
Batches = Iterable[tuple[Any, Tensor]]
METHODS = ("probit", "sample")
_JITTER, _GROWTH = 1e-8, 10.0


@dataclass
class Factor:
    """K-FAC of one matrix θ: its Fisher information is Bk Bkᵀ ⊗ L Lᵀ, summed over the samples.

    ``wide`` is Bk ``[d, k]`` of the long side (in of A, out of B), ``narrow`` first Σ g gᵀ ``[r, r]`` of the
    side of rank r, then its Cholesky factor L.
    """

    wide: Tensor
    narrow: Tensor

    def add(self, wide: Tensor, narrow: Tensor, rank: int) -> None:
        """Takes in rows of the long side ``[n, d]`` and of the short one ``[n, r]``."""
        both = torch.cat([self.wide, wide.T.to(self.wide)], 1)
        vectors, values, _ = torch.linalg.svd(both, full_matrices=False)
        self.wide = (vectors * values)[:, :rank]
        self.narrow = self.narrow + narrow.T.to(self.narrow) @ narrow.to(self.narrow)

    def finished(self, samples: int) -> Factor:
        """With L in place of the sum; E[a aᵀ] ⊗ E[g gᵀ] times the number of samples."""
        eye, jitter = torch.eye(len(self.narrow)).to(self.narrow), _JITTER
        root, failed = torch.linalg.cholesky_ex(self.narrow + jitter * eye)
        while failed:
            jitter *= _GROWTH
            root, failed = torch.linalg.cholesky_ex(self.narrow + jitter * eye)
        return Factor(self.wide, root / math.sqrt(samples))

    def precision(self, prior_var: float) -> Tensor:
        """M = I + σ² (BkᵀBk ⊗ LᵀL), ``[k·r, k·r]``."""
        kron = torch.kron(self.wide.T @ self.wide, self.narrow.T @ self.narrow)
        return torch.eye(len(kron)).to(kron) + prior_var * kron

    def covariance(self, jacobian: Tensor, prior_var: float) -> Tensor:
        """σ² G Gᵀ − σ⁴ V M⁻¹ Vᵀ with V = vec(Bkᵀ G L): this matrix's share of Λ ``[n, C, C]``.

        Args:
            jacobian: G ``[n, C, d, r]``.
            prior_var: σ².
        """
        flat = jacobian.flatten(2)
        seen = torch.einsum("dk,ncdr,rs->ncks", self.wide, jacobian, self.narrow).flatten(2)
        solved = torch.linalg.solve(self.precision(prior_var), seen.mT)
        return prior_var * flat @ flat.mT - prior_var**2 * seen @ solved


@dataclass
class Seen:
    """What one layer's hooks kept of one pass: x ``[n, T, in]`` and dY ``[n, T, out]``."""

    x: Tensor | None = None
    dy: Tensor | None = None
    handles: list[Any] = field(default_factory=list)


class LaplaceLoRA:
    """f ~ N(f_MAP, Λ),  Λ = Σ_θ J_θ (H_θ + I/σ²)⁻¹ J_θᵀ

    Laplace-LoRA (Yang et al., 2024, arXiv 2308.13111): after training, the posterior of every A and B is a
    normal one around its value, with K-FAC for H, and the logits are linearised in them. The statistics are
    taken of what the layer's pass has: x and x Aᵀ, s dY B and dY, at the last token, with labels drawn from
    the model. Sums are over samples and in float32 (float64 for float64 adapters). The model's own outputs,
    its parameters and its mode stay as they are.

    Args:
        model: one of :func:`apply_lora` or of PEFT, trained; its active adapters count, plain ones alone.
        forward: ``forward(model, inputs)`` gives logits ``[n, C]``.
        n_kfac: k, the rank that is kept of each long side.
        prior_var: σ² of the prior N(0, σ²); one divided by the weight decay of the training.
        generator: draws the labels.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no plain LoRA layers, or a number is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        *,
        n_kfac: int = 10,
        prior_var: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        self.pairs = [pair for pair in lora_pairs(model) if pair.plain and not pair.is_embedding]
        if not self.pairs:
            raise ValueError("model: expected LoRA layers of the plain kind, got none")
        if n_kfac < 1:
            raise ValueError(f"n_kfac: expected at least 1, got {n_kfac}")
        self.model, self.forward, self.n_kfac = model, forward, n_kfac
        self.prior_var, self.generator = _positive("prior_var", prior_var), generator
        self.factors: list[Factor] = []
        self.log_likelihood = 0.0

    def fit(self, batches: Batches) -> LaplaceLoRA:
        """Gathers the statistics over (inputs, labels ``[n]``), each batch once.

        Raises:
            ValueError: no batches.
        """
        factors = [self._empty(pair, side) for pair in self.pairs for side in "AB"]
        samples, likelihood = 0, 0.0
        for inputs, labels in each("LaplaceLoRA.fit", batches):
            with self._listening() as seen:
                logits = self.forward(self.model, inputs)
                probabilities = logits.detach().softmax(-1)
                drawn = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
                torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), self._trained())
            likelihood -= float(F.cross_entropy(logits.detach(), labels, reduction="sum"))
            for i, pair in enumerate(self.pairs):
                for factor, rows in zip(factors[2 * i :], self._last_rows(pair, seen[i]), strict=False):
                    factor.add(*rows, self.n_kfac)
            samples += len(labels)
        if not samples:
            raise ValueError("batches: expected at least one sample, got none")
        self.factors, self.log_likelihood = [one.finished(samples) for one in factors], likelihood
        return self

    def logits(self, inputs: Any, prior_var: float | None = None) -> tuple[Tensor, Tensor]:
        """f_MAP ``[n, C]`` and Λ ``[n, C, C]``.

        Raises:
            RuntimeError: :meth:`fit` has not run.
        """
        self._check_fitted()
        variance = _positive("prior_var", self.prior_var if prior_var is None else prior_var)
        mean, jacobians = self.jacobians(inputs)
        shares = [
            factor.covariance(jacobian.to(factor.wide), variance)
            for factor, jacobian in zip(self.factors, jacobians, strict=True)
        ]
        return mean, torch.stack(shares).sum(0)

    def predict(self, inputs: Any, *, method: str = "probit", samples: int = 100) -> Tensor:
        """Class probabilities ``[n, C]`` under the posterior.

        Args:
            inputs: what ``forward`` takes.
            method: ``probit``: softmax(f / √(1 + π/8 · diag Λ)); ``sample``: the mean softmax of draws of f.
            samples: how many draws.

        Raises:
            RuntimeError: :meth:`fit` has not run.
            ValueError: no such method, or fewer than 1 sample.
        """
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        mean, spread = self.logits(inputs)
        if method == "probit":
            return (mean / (1 + math.pi / 8 * spread.diagonal(dim1=1, dim2=2)).sqrt()).softmax(-1)
        root = torch.linalg.cholesky(spread + 1e-6 * torch.eye(spread.shape[-1]).to(spread))
        noise = torch.randn(samples, *mean.shape, generator=self.generator).to(mean)
        return (mean + torch.einsum("ncd,snd->snc", root, noise)).softmax(-1).mean(0)

    def log_evidence(self, prior_var: float | None = None) -> float:
        """log p(D) ≈ log p(D|θ) − ‖θ‖²/(2σ²) − ½ Σ log det M, without constants: larger is better.

        Raises:
            RuntimeError: :meth:`fit` has not run.
        """
        self._check_fitted()
        variance = _positive("prior_var", self.prior_var if prior_var is None else prior_var)
        norm = sum(float(p.detach().double().square().sum()) for p in self._trained())
        volume = sum(float(torch.logdet(factor.precision(variance))) for factor in self.factors)
        return self.log_likelihood - norm / (2 * variance) - volume / 2

    def tune_prior(self, candidates: Iterable[float]) -> float:
        """Sets σ² to that of the candidates with the largest evidence, and returns it."""
        self.prior_var = max(candidates, key=self.log_evidence)
        return self.prior_var

    def jacobians(self, inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """The logits, and of A and B of each layer in turn ∂f/∂θ ``[n, C, d, r]``, d the long side."""
        with self._listening() as seen:
            logits = self.forward(self.model, inputs)
            columns = []
            for c in range(logits.shape[-1]):
                torch.autograd.grad(logits[:, c].sum(), self._trained(), retain_graph=True)
                columns.append([self._jacobian(*each) for each in zip(self.pairs, seen, strict=True)])
        # columns[c][layer] = (of A, of B)
        each = [
            torch.stack([column[i][j] for column in columns], 1) for i in range(len(seen)) for j in (0, 1)
        ]
        return logits.detach(), each

    @torch.no_grad()
    def _jacobian(self, pair: Pair, seen: Seen) -> tuple[Tensor, Tensor]:
        x, dy = _of(seen)
        h, dh = x @ pair.lora_a.to(x).T, pair.scaling * (dy @ pair.lora_b.to(dy))
        return x.mT @ dh, pair.scaling * (dy.mT @ h)

    @torch.no_grad()
    def _last_rows(self, pair: Pair, seen: Seen) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(long side, short side) of A and of B, at the last token."""
        x, dy = (tensor[:, -1] for tensor in _of(seen))
        return (x, pair.scaling * (dy @ pair.lora_b.to(dy))), (pair.scaling * dy, x @ pair.lora_a.to(x).T)

    def _empty(self, pair: Pair, side: str) -> Factor:
        like = pair.lora_a if side == "A" else pair.lora_b
        long = pair.lora_a.shape[1] if side == "A" else pair.lora_b.shape[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = like.detach().new_zeros
        return Factor(zeros(long, 0, dtype=wide), zeros(pair.rank, pair.rank, dtype=wide))

    def _trained(self) -> list[nn.Parameter]:
        return [factor for pair in self.pairs for factor in (pair.lora_a, pair.lora_b)]

    @contextlib.contextmanager
    def _listening(self) -> Iterator[list[Seen]]:
        """The model in evaluation mode, what its layers see being kept."""
        seen = [Seen() for _ in self.pairs]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        handles = [
            pair.layer.register_forward_hook(_keeper(one)) for pair, one in zip(self.pairs, seen, strict=True)
        ]
        try:
            with torch.enable_grad():
                yield seen
        finally:
            for handle in [*handles, *(handle for one in seen for handle in one.handles)]:
                handle.remove()
            for module, mode in modes:
                module.training = mode

    def _check_fitted(self) -> None:
        if not self.factors:
            raise RuntimeError("no statistics yet: call fit(batches) first")


def _keeper(seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.x = args[0].detach()

        def keep(gradient: Tensor) -> None:
            seen.dy = gradient.detach()

        seen.handles.append(output.register_hook(keep))

    return hook


def _of(seen: Seen) -> tuple[Tensor, Tensor]:
    """x and dY as [n, T, …]."""
    if seen.x is None or seen.dy is None:
        raise ValueError("forward: expected logits that depend on every LoRA layer, and they do not")
    x, dy = (tensor.unflatten(0, (-1, 1)) if tensor.dim() == 2 else tensor for tensor in (seen.x, seen.dy))
    return x.flatten(1, -2), dy.flatten(1, -2)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")
    return value
