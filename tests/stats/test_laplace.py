"""Laplace-LoRA against dense covariances and Jacobians by autograd, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.stats import LaplaceLoRA

CLASSES, WIDTH = 3, 5


class Model(nn.Module):
    """Tokens mixed by a mean, so that every token of a sequence counts."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).mean(1))


def trained(r=2):
    torch.manual_seed(0)
    model = apply_lora(Model().double(), LoRAConfig(r=r, lora_alpha=3, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


def data(n=8, tokens=3):
    torch.manual_seed(1)
    return torch.randn(n, tokens, WIDTH, dtype=torch.float64), torch.randint(CLASSES, (n,))


def forward(model, x):
    return model(x)


def fitted(model, **options):
    generator = torch.Generator().manual_seed(2)
    x, labels = data()
    return LaplaceLoRA(model, forward, generator=generator, **options).fit(
        [(x[:5], labels[:5]), (x[5:], labels[5:])]
    )


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_jacobians_are_autograds():
    model, (x, _) = trained(), data(3)
    logits, ours = LaplaceLoRA(model, forward).jacobians(x)
    assert torch.equal(logits, model(x))
    names = list(adapters(model))
    for n in range(len(x)):
        for c in range(CLASSES):
            grads = torch.autograd.grad(model(x)[n, c], list(adapters(model).values()))
            for name, got, want in zip(names, ours, grads, strict=True):
                want = want.T if name.endswith("lora_A") else want
                torch.testing.assert_close(got[n, c], want, rtol=1e-10, atol=1e-12)


def test_covariance_is_that_of_the_dense_posterior():
    model, (x, _) = trained(), data(4)
    laplace = fitted(model, n_kfac=50, prior_var=0.3)
    mean, spread = laplace.logits(x)
    want = torch.zeros_like(spread)
    for factor, jacobian in zip(laplace.factors, laplace.jacobians(x)[1], strict=True):
        fisher = torch.kron(factor.wide @ factor.wide.T, factor.narrow @ factor.narrow.T)
        inverse = torch.linalg.inv(fisher + torch.eye(len(fisher), dtype=fisher.dtype) / 0.3)
        flat = jacobian.flatten(2)
        want += flat @ inverse @ flat.mT
    torch.testing.assert_close(spread, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(mean, model(x))
    assert torch.linalg.eigvalsh(spread).min() > 0


def test_statistics_are_sums_over_samples_and_do_not_depend_on_the_batches():
    model, (x, labels) = trained(), data()
    one = LaplaceLoRA(model, forward, n_kfac=50, generator=torch.Generator().manual_seed(2))
    one.fit([(x, labels)])
    last = x[:, -1]
    torch.testing.assert_close(one.factors[0].wide @ one.factors[0].wide.T, last.T @ last)
    many = fitted(model, n_kfac=50)
    torch.testing.assert_close(
        many.factors[0].wide @ many.factors[0].wide.T, one.factors[0].wide @ one.factors[0].wide.T
    )
    assert many.log_likelihood == pytest.approx(
        -float(F.cross_entropy(model(x).detach(), labels, reduction="sum"))
    )


def test_a_full_rank_keeps_all_and_a_small_one_the_largest():
    model = trained()
    full, small = fitted(model, n_kfac=50), fitted(model, n_kfac=2)
    assert full.factors[0].wide.shape == (WIDTH, WIDTH) and small.factors[0].wide.shape == (WIDTH, 2)
    x, _ = data(4)
    # What is forgotten is information, so the spread is larger.
    gap = small.logits(x)[1] - full.logits(x)[1]
    assert torch.linalg.eigvalsh(gap).min() > -1e-10


def test_without_room_there_is_the_map_prediction():
    model, (x, _) = trained(), data(4)
    laplace = fitted(model, prior_var=1e-12)
    for method in ("probit", "sample"):
        torch.testing.assert_close(laplace.predict(x, method=method), model(x).softmax(-1), atol=1e-3, rtol=0)
    laplace.prior_var = 5.0
    wide = laplace.predict(x)
    assert (wide.max(-1).values < model(x).softmax(-1).max(-1).values).all()


def test_evidence_is_the_dense_one_and_picks_the_prior():
    model = trained()
    laplace = fitted(model, n_kfac=50)
    for variance in (0.05, 1.0):
        norm = sum(float(p.detach().square().sum()) for p in adapters(model).values())
        logdet = 0.0
        for factor in laplace.factors:
            fisher = torch.kron(factor.wide @ factor.wide.T, factor.narrow @ factor.narrow.T)
            logdet += float(torch.logdet(torch.eye(len(fisher)) + variance * fisher))
        want = laplace.log_likelihood - norm / (2 * variance) - logdet / 2
        assert laplace.log_evidence(variance) == pytest.approx(want, rel=1e-9)
    tried = [10.0**k for k in range(-3, 4)]
    best = laplace.tune_prior(tried)
    assert best == laplace.prior_var == max(tried, key=laplace.log_evidence) and 1e-3 < best < 1e3


def test_the_model_stays_as_it_was():
    model = trained().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    fitted(model).predict(data()[0])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_in_peft():
    peft = pytest.importorskip("peft")
    from lora_kernels import accelerate

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
    model = peft.get_peft_model(Model().double(), config)
    x, labels = data()

    def spread():
        generator = torch.Generator().manual_seed(3)
        return LaplaceLoRA(model, forward, generator=generator).fit([(x, labels)]).logits(x)[1]

    stock = spread()
    accelerate(model)
    torch.testing.assert_close(spread(), stock)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: LaplaceLoRA(Model(), forward), "model: expected LoRA layers of the plain kind"),
        (lambda: LaplaceLoRA(trained(), forward, n_kfac=0), "n_kfac: expected at least 1, got 0"),
        (lambda: LaplaceLoRA(trained(), forward, prior_var=0), "prior_var: expected a number above 0, got 0"),
        (lambda: LaplaceLoRA(trained(), forward).fit([]), "batches: expected at least one sample"),
        (
            lambda: fitted(trained()).predict(data()[0], method="map"),
            "method: expected one of probit, sample",
        ),
        (lambda: fitted(trained()).predict(data()[0], samples=0), "samples: expected at least 1, got 0"),
        (lambda: fitted(trained()).logits(data()[0], -1), "prior_var: expected a number above 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_statistics_come_first():
    with pytest.raises(RuntimeError, match=r"call fit\(batches\) first"):
        LaplaceLoRA(trained(), forward).predict(data()[0])
