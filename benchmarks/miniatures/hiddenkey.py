"""HiddenKey: a small transformer overfits less."""

from __future__ import annotations

from functools import partial

import torch
from transformers import BertConfig, BertForSequenceClassification

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.schedules import HiddenKey

CLAIM = (
    "a transformer of one layer on 32 noisy samples with LoRA of r = 8: the loss on samples it has not"
    " seen is below that without HiddenKey"
)
SIZES = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SAMPLES, LENGTH, STEPS = 32, 12, 60


def run(seed: int) -> dict[str, float]:
    """The loss on the training set and on unseen samples, without dropout."""
    figures = {}
    for name in ("LoRA", "HiddenKey"):
        torch.manual_seed(seed)
        config = BertConfig(
            **SIZES, num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        config._attn_implementation = "eager"
        model = BertForSequenceClassification(config)
        apply_lora(model, LoRAConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"]))
        train, unseen = _samples(SAMPLES, noise=0.2), _samples(256)
        layers = model.bert.encoder.layer
        regulariser = HiddenKey(
            [one.attention.self for one in layers],
            [one.output for one in layers],
            p_key=0.2,
            p_hidden=0.2,
            kl=0.1,
            seed=seed,
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            forward = partial(model, **train)
            loss = regulariser.loss(forward) if name == "HiddenKey" else forward().loss
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            figures[f"{name}, train"], figures[f"{name}, unseen"] = (
                float(model(**data).loss) for data in (train, unseen)
            )
    return figures


def holds(figures: list[dict[str, float]]) -> bool:
    """In every seed."""
    return all(one["HiddenKey, unseen"] < one["LoRA, unseen"] for one in figures)


def _samples(count: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """Sequences, and whether more of their tokens are above the middle; some labels turned around."""
    ids = torch.randint(0, SIZES["vocab_size"], (count, LENGTH))
    labels = ((ids >= SIZES["vocab_size"] // 2).sum(1) > LENGTH // 2).long()
    turned = torch.rand(count) < noise
    return {"input_ids": ids, "labels": torch.where(turned, 1 - labels, labels)}
