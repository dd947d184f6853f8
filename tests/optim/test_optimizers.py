"""What every optimiser promises: resume bit for bit, refuse what it cannot do, change nothing then."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from optim_models import batch, loss, net, ours, train, values

from lora_kernels import optim
from lora_kernels.optim import _common


def everything(model):
    return [p.requires_grad_(True) for p in model.parameters()]


FRESH = {"init_lora_weights": True}
MAKERS = {
    "lora_plus": lambda model: optim.lora_plus(model, lr=1e-2, ratio=4),
    "riemannian": lambda model: optim.riemannian(model, lr=1e-2, reg=0.1),
    "lora_fa": lambda model: optim.LoRAFA(model, 1e-2, weight_decay=0.01),
    "galore": lambda model: optim.GaLoreAdamW(model, 1e-2, update_proj_gap=2, scale=1.0, weight_decay=0.01),
    "flora": lambda model: optim.Flora(everything(model), lr=0.02, rank=8, kappa=2, beta1=0.5),
}
every_optimizer = pytest.mark.parametrize("name", MAKERS)


def fresh(dtype=torch.float64, **options):
    return ours(dtype, **FRESH, modules_to_save=["norm"], **options)


@every_optimizer
def test_it_resumes_bit_for_bit(name):
    model = fresh(torch.float32)
    optimizer = MAKERS[name](model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = fresh(torch.float32)
    other.load_state_dict(saved["model"])
    resumed = MAKERS[name](other)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, 3, first=3)
    want = values(model)
    assert all(torch.equal(value, want[key]) for key, value in values(other).items())


@every_optimizer
def test_the_loss_falls(name):
    model = fresh()
    optimizer = MAKERS[name](model)
    with torch.no_grad():
        before = loss(model).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.9 * before


@every_optimizer
def test_schedulers_and_closures_as_torch_has_them(name):
    model = fresh()
    optimizer = MAKERS[name](model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = values(model)
    train(model, optimizer, 2)
    scheduler.step()
    assert all(torch.equal(value, before[key]) for key, value in values(model).items() if "lora" not in key)
    if name != "riemannian":

        def closure():
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        assert optimizer.step(closure).item() > 0


@pytest.mark.parametrize("name", ["lora_fa", "galore"])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_the_foreach_path_does_the_same(name, correct_bias, monkeypatch):
    makers = {
        "lora_fa": lambda m: optim.LoRAFA(m, 1e-2, weight_decay=0.1, correct_bias=correct_bias),
        "galore": lambda m: optim.GaLoreAdamW(m, 1e-2, correct_bias=correct_bias),
    }
    one = fresh()
    other = copy.deepcopy(one)
    train(one, makers[name](one))
    monkeypatch.setattr(_common, "_FUSED_DEVICES", ())
    train(other, makers[name](other))
    want = values(other)
    for key, value in values(one).items():
        torch.testing.assert_close(value, want[key], rtol=1e-10, atol=1e-12, msg=key)


def reference_adamw(p, grads, *, lr, beta1=0.9, beta2=0.999, eps=1e-6, decay=0.0):
    """The formula of `adamw_`'s docstring, in fp64."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        p = p - lr * c2**0.5 / c1 * m / (v.sqrt() + eps)
        p = p - lr * decay * p
    return p


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "foreach"])
def test_adamw_is_its_formula(devices, monkeypatch):
    monkeypatch.setattr(_common, "_FUSED_DEVICES", devices)
    params = [torch.randn(3, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    want = [reference_adamw(p, [g[i] for g in grads], lr=0.1, decay=0.3) for i, p in enumerate(params)]
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.3}
    states = [{}, {}]
    for some in grads:
        _common.adamw_(params, some, states, group)
    for got, expected in zip(params, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_parameter_that_skips_steps_keeps_its_own_count():
    p, q = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    states = [{}, {}]
    _common.adamw_([p], [torch.ones_like(p)], states[:1], group)
    _common.adamw_([p, q], [torch.ones_like(p), 2 * torch.ones_like(q)], states, group)
    assert [state["step"] for state in states] == [2, 1]
    want = reference_adamw(
        torch.ones(2, dtype=torch.float64), [torch.full((2,), 2.0, dtype=torch.float64)], lr=0.1
    )
    torch.testing.assert_close(q, want)


BAD = {
    "negative lr": (lambda m: optim.LoRAFA(m, -1.0), ValueError, "lr: expected 0 <= lr, got -1.0"),
    "betas": (lambda m: optim.LoRAFA(m, betas=(0.9, 1.0)), ValueError, r"betas\[1\]: expected"),
    "lr is a word": (lambda m: optim.GaLoreAdamW(m, "fast"), TypeError, "lr: expected a number, got str"),
    "gap": (
        lambda m: optim.GaLoreAdamW(m, update_proj_gap=0),
        ValueError,
        "update_proj_gap: expected at least 1",
    ),
    "type": (lambda m: optim.GaLoreAdamW(m, proj_type="half"), ValueError, "proj_type: expected one of std"),
    "ratio": (lambda m: optim.lora_plus(m, lr=1e-3, ratio=0), ValueError, "ratio: expected 0 < ratio, got 0"),
    "reg": (lambda m: optim.riemannian(m, lr=1e-3, reg=0.0), ValueError, "reg: expected 0 < reg"),
    "class": (lambda m: optim.riemannian(m, dict, lr=1e-3), TypeError, "optimizer_cls: expected a subclass"),
    "rank": (lambda m: optim.Flora(m.parameters(), rank=0), ValueError, "rank: expected at least 1, got 0"),
    "beta1": (lambda m: optim.Flora(m.parameters(), beta1=1.5), ValueError, "beta1: expected 0 <= beta1 < 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_numbers_change_nothing(what):
    make, error, message = BAD[what]
    model = fresh()
    before, trained = values(model), {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=message):
        make(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())


@pytest.mark.parametrize("name", ["lora_plus", "riemannian", "lora_fa", "galore"])
def test_a_model_without_adapters_is_refused(name):
    with pytest.raises(ValueError, match="expected a model with LoRA layers"):
        MAKERS[name](net())
    with pytest.raises(TypeError, match=r"expected an nn.Module, got list"):
        MAKERS[name]([])


def test_batches_differ():
    assert not torch.equal(batch(0), batch(1))
