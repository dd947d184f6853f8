"""What LaMDA's and AFLoRA's freezers promise."""

from __future__ import annotations

import pytest
import torch
from optim_models import loss, ours, peft, values
from schedule_cases import adam, fresh, run

from lora_kernels.nn import count_parameters, lora_layers, lora_pairs, set_adapter
from lora_kernels.schedules import AFLoRAFreezer, LaMDAFreezer, aflora_fraction

STEPS, ETA, R = 20, 0.5, 4


@pytest.mark.parametrize("method", ["lamda", "lora", "peft"])
def test_columns_of_b_freeze_one_after_the_other(method):
    """The first ⌊r i / (η i_max)⌋ columns are after each later step what they were after step i."""
    if method == "peft":
        pytest.importorskip("peft")
    model = peft(torch.float32) if method == "peft" else fresh(method=method)
    optimizer, freezer = adam(model), LaMDAFreezer(model, max_steps=STEPS, eta=ETA)
    pairs = list(lora_pairs(model))
    a = [pair.lora_a.clone() for pair in pairs]
    columns: list[list[torch.Tensor]] = [[] for _ in pairs]
    for step in range(STEPS):
        run(model, optimizer, freezer, 1, first=step)
        due = min(R, int(R * (step + 1) / (ETA * STEPS)))
        for pair, frozen in zip(pairs, columns, strict=True):
            frozen += [pair.lora_b[:, i].clone() for i in range(len(frozen), due)]
            assert all(torch.equal(pair.lora_b[:, i], one) for i, one in enumerate(frozen))
            assert pair.lora_b.requires_grad == (due < R)
    if method == "lamda":
        assert all(torch.equal(pair.lora_a, one) for pair, one in zip(pairs, a, strict=True))
        set_adapter(model, "default")  # chosen anew, and still frozen
        assert count_parameters(model)[0] == len(pairs) * R**2 + 2 * 12


def test_the_freezer_takes_back_what_momentum_moves():
    model = fresh(method="lamda")
    freezer = LaMDAFreezer(model, max_steps=8, eta=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    run(model, optimizer, freezer, 2)
    first = next(iter(lora_pairs(model))).lora_b
    before = first.detach().clone()
    run(model, optimizer, freezer, 1, first=2)
    assert torch.equal(first[:, :1], before[:, :1]) and not torch.equal(first[:, 1:], before[:, 1:])


def scored(model, steps, window, betas):
    """Ī ⊙ Ū of every A and B after ``steps`` steps, number by number."""
    gradients = {}
    for seed in range(steps):
        model.zero_grad()
        loss(model, seed).backward()
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")) and parameter.requires_grad:
                gradients.setdefault(name, []).append(parameter.grad.abs().clone())
    found = {}
    for name, ones in gradients.items():
        smooth = spread = torch.zeros_like(ones[0])
        for at in range(0, steps, window):
            mean = sum(ones[at : at + window]) / window
            smooth = betas[0] * smooth + (1 - betas[0]) * mean
            spread = betas[1] * spread + (1 - betas[1]) * (mean - smooth).abs()
        found[name] = smooth * spread
    return found


def test_what_scores_least_freezes():
    model, betas, window = ours(torch.float32, method="aflora"), (0.85, 0.95), 3
    freezer = AFLoRAFreezer(model, total_steps=30, t_i=3, t_f=3, window=window, betas=betas)
    # The weights stand still, so that the scores can be computed apart.
    for seed in range(6):
        model.zero_grad()
        loss(model, seed).backward()
        freezer.step()
    scores = scored(ours(torch.float32, method="aflora"), 6, window, betas)
    every = torch.cat([one.flatten() for one in scores.values()]).sort().values
    threshold = every[int(len(every) * (1 - (1 - 3 / 24) ** 3)) - 1]
    want = {name for name, one in scores.items() if one.mean() < threshold}
    got = {name for name, p in model.named_parameters() if name in scores and not p.requires_grad}
    assert got == want
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None for name in got)


def test_frozen_factors_grow_to_all_and_the_scales_go_on():
    model = fresh(method="aflora")
    optimizer, freezer = adam(model), AFLoRAFreezer(model, total_steps=30, t_i=4, t_f=10, window=2)
    sizes = []
    for step in range(30):
        run(model, optimizer, freezer, 1, first=step)
        sizes.append(len(freezer.frozen))
        assert (len(freezer.training) == 0) == (step + 1 > 20 or sizes[-1] == 4)
    assert sizes == sorted(sizes) and sizes[3] == 0 and sizes[-1] == 4  # square layers had none
    layers = lora_layers(model).values()
    want = sum(R + layer.out_features for layer in layers) + 2 * 12
    set_adapter(model, "default")
    assert count_parameters(model)[0] == want


def test_the_fraction_left():
    assert [aflora_fraction(t, 20, 4, 6) for t in (0, 4, 9, 14, 15)] == [1.0, 1.0, 0.125, 0.0, 0.0]


def test_what_they_refuse():
    model = fresh(method="aflora")
    before = values(model)
    for make, words in (
        (lambda: LaMDAFreezer(model, max_steps=0), "max_steps: expected at least 1, got 0"),
        (lambda: LaMDAFreezer(model, max_steps=4, eta=1.5), "eta: expected at most 1, got 1.5"),
        (
            lambda: AFLoRAFreezer(model, total_steps=8, t_i=4, t_f=4),
            r"total_steps: expected more than t_i \+ t_f",
        ),
        (
            lambda: AFLoRAFreezer(model, total_steps=8, t_i=1, t_f=1).step(),
            r"model: expected gradients \(step",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    lamda = fresh(method="lamda")
    state = LaMDAFreezer(lamda, max_steps=4).state_dict()
    state["columns"][0] = torch.zeros(20, 5)
    with pytest.raises(ValueError, match=r"state\['columns'\]: wide: expected at most 4 columns of 20"):
        LaMDAFreezer(lamda, max_steps=4).load_state_dict(state)
    freezer = AFLoRAFreezer(model, total_steps=8, t_i=1, t_f=1)
    with pytest.raises(ValueError, match=r"state\['frozen'\]: expected some of wide:default\.lora_A, .*'x'"):
        freezer.load_state_dict({**freezer.state_dict(), "frozen": ["x"]})
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
