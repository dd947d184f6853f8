"""LoRA-FA's optimiser: A frozen, and B's gradient projected."""

from __future__ import annotations

from lora_kernels.optim import LoRAFA

from ._pretrained import adapted, loss_of, losses, pretrained

CLAIM = (
    "a pretrained net tuned to other classes with r = 16: with A as it was the best of three rates brings the"
    " loss below 0.02 in 100 steps"
)
STEPS, RATES, R = 100, (3e-3, 1e-2, 3e-2), 16


def run(seed: int) -> dict[str, float]:
    """The least losses of AdamW on B and with B's gradient projected, and by how much A moved."""
    tuning, projected, moved = pretrained(seed), [], 0.0
    plain = [losses(tuning, adapted(tuning, R, method="lora_fa"), STEPS, rate)[0] for rate in RATES]
    for rate in RATES:
        model = adapted(tuning, R)
        lora_a = model[0].adapters["default"].lora_A
        start, optimizer = lora_a.detach().clone(), LoRAFA(model, lr=rate)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, tuning.target)
            loss.backward()
            optimizer.step()
        projected.append(loss.item())
        moved += float((lora_a.detach() - start).norm())
    return {"AdamW": min(plain), "projected": min(projected), "A moved": moved}


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(one["projected"] < 0.02 and one["A moved"] == 0 for one in figures)
