"""LoraRetriever: which adapters a prompt uses, by the nearest of their sample inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INSTRUCTION = "Represent the sentence for similar task retrieval: "
Embedder = Callable[[list[str]], Tensor]


class Retrieved(NamedTuple):
    """What a search found for each query: adapters by name, by number, and their scores, best first."""

    names: list[list[str]]
    ids: Tensor
    scores: Tensor

    @property
    def weights(self) -> Tensor:
        """1/k for each: what mixture and fusion take."""
        return torch.full_like(self.scores, 1 / max(1, self.scores.shape[1]))


class AdapterIndex:
    """s(q, e) = ⟨E(I ⊕ q), mean_i E(I ⊕ x_ei)⟩, of unit length both where ``cosine``

    LoraRetriever (Zhao et al., 2024, arXiv 2402.09997; inner products) and RAMoLE (arXiv 2406.16989;
    cosines): an adapter is known by the mean embedding of a few of its inputs x_ei, and a prompt q uses the k
    adapters nearest to it: ``with mixed_adapters(model, found.names, weights=found.weights, fusion=...)``, or
    the ids as the ``candidates`` of ``ramole``. The encoder E is the caller's, and so is its training.

    Args:
        embed: texts -> ``[texts, width]``.
        instruction: I, put before each text.
        cosine: whether embeddings are divided by their lengths.
    """

    def __init__(self, embed: Embedder, instruction: str = INSTRUCTION, cosine: bool = False) -> None:
        if not callable(embed):
            raise TypeError(f"embed: expected a function of texts, got {type(embed).__name__}")
        self.embed, self.instruction, self.cosine = embed, instruction, cosine
        self.names: list[str] = []
        self._means: list[Tensor] = []

    def add(self, name: str, samples: Sequence[str]) -> None:
        """Makes an adapter known by some of its inputs; a name that is known gets new ones.

        Raises:
            ValueError: no samples.
        """
        if not samples or isinstance(samples, str):
            raise ValueError(f"samples: expected a list of at least one text, got {samples!r}")
        mean = self._embedded(samples).mean(0)
        if name in self.names:
            self._means[self.names.index(name)] = mean
            return
        self.names.append(name)
        self._means.append(mean)

    def search(
        self, queries: Sequence[str], k: int = 3, exclude: Sequence[Iterable[str]] | None = None
    ) -> Retrieved:
        """The k nearest adapters of each query, those that it excludes left out.

        Raises:
            TypeError: ``queries`` is one text.
            ValueError: fewer adapters than k remain for a query, or ``exclude`` has not one list a query.
        """
        if isinstance(queries, str):
            raise TypeError("queries: expected a list of texts, got a str")
        excluded = [set(one) for one in exclude] if exclude is not None else [set[str]()] * len(queries)
        if len(excluded) != len(queries):
            raise ValueError(f"exclude: expected one for each of {len(queries)} queries, got {len(excluded)}")
        out = torch.tensor([[name in own for name in self.names] for own in excluded], dtype=torch.bool)
        left = len(self.names) - int(out.sum(1).max() if out.numel() else 0)
        if not 1 <= k <= left:
            raise ValueError(f"k: expected 1 to {left}, the adapters that are left, got {k}")
        means = torch.stack(self._means)
        scores = self._embedded(queries) @ (F.normalize(means, dim=-1) if self.cosine else means).T
        top, ids = scores.masked_fill(out.to(scores.device), -torch.inf).topk(k, -1)
        return Retrieved([[self.names[i] for i in row] for row in ids.tolist()], ids, top)

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        found = self.embed([self.instruction + text for text in texts])
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(texts):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"embed: expected [{len(texts)}, width] for {len(texts)} texts, got {got}")
        return F.normalize(found, dim=-1) if self.cosine else found
