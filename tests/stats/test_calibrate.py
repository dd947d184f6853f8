"""Statistics against what all inputs at once give; the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, calibrate, quantize_base


class Net(nn.Module):
    """Two linears that read one x, one after them, a dropout between."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(2)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 5)
        self.to(dtype)

    def forward(self, x, **_):
        return self.out(self.drop(torch.tanh(self.left(x)) * self.right(x)))


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(b, 7, 6, generator=generator).to(dtype) + 2 for b in (2, 1, 3)]


def inputs_of(model, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(args[0].detach()))
    model.eval()
    for x in batches(next(model.parameters()).dtype):
        model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["left", "right", "out"])
def test_covariances(name, dtype):
    found = calibrate(Net(dtype), batches(dtype))[name]["covariance"]
    want, count = 0, 0
    for x in inputs_of(Net(dtype), name):
        for sample in x.double():
            sample = sample / sample.max().abs()
            want, count = want + sample.T @ sample, count + 1
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), want / count, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["left", "out"])
def test_singular_vectors_of_what_streams_are_those_of_all(name):
    found = calibrate(Net(torch.float64), batches(torch.float64), "activation_svd")[name]
    rows = torch.cat([x.flatten(0, -2) for x in inputs_of(Net(torch.float64), name)])
    centred = rows - rows.mean(0)
    s = torch.linalg.svdvals(centred)
    got = found["activation_svd"]
    torch.testing.assert_close(got.norm(dim=1), s, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.T @ got, centred.T @ centred, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found["activation_energy"], s.square().sum())
    short = calibrate(Net(torch.float64), batches(torch.float64), "activation_svd", rank=2)[name]
    torch.testing.assert_close(short["activation_svd"], got[:2])


def test_a_large_mean_costs_no_digits():
    """XᵀX - nμμᵀ in float32 would lose them all."""
    x = torch.randn(1, 500, 6, dtype=torch.float64) + 3000
    found = calibrate(nn.Sequential(nn.Linear(6, 2)), list(x.float().chunk(5, 1)), "activation_svd")["0"]
    want = torch.linalg.svdvals(x.float().double()[0] - x.float().double()[0].mean(0))
    torch.testing.assert_close(found["activation_svd"].norm(dim=1).double(), want, rtol=1e-3, atol=1e-3)


def test_only_tokens_that_count():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
    labels = torch.full((2, 7), 3)
    labels[:, 0] = -100
    x = batches(torch.float64)[0]
    given = [{"x": x, "attention_mask": mask, "labels": labels}]
    found = calibrate(Net(torch.float64), given, "activation_svd")["left"]["activation_svd"]
    rows = x[mask.bool() & (labels != -100)]
    assert len(rows) == 6
    rows = rows - rows.mean(0)
    torch.testing.assert_close(found.T @ found, rows.T @ rows)


def test_gradients():
    model = Net(torch.float64).eval()
    parts = batches(torch.float64)
    want = 0
    for x in parts:
        want = want + torch.autograd.grad(model(x).square().mean(), model.left.weight)[0] / len(parts)
    found = calibrate(Net(torch.float64), parts, "gradient", forward=lambda m, x: m(x).square().mean())
    torch.testing.assert_close(found["left"]["gradient"], want)


def test_gradients_are_dropped_as_they_come():
    """Of the weights' gradients no two are there at once."""
    model, most = Net(), 0

    def forward(m, x):
        y = m(x)

        def count(_):
            nonlocal most
            most = max(most, sum(p.grad is not None for p in m.parameters()))

        for module in (m.left, m.right, m.out):
            module.weight.register_post_accumulate_grad_hook(count)
        return y.square().mean()

    calibrate(model, batches()[:1], "gradient", forward=forward)
    assert most == 0


def test_products_of_a_shared_input_are_computed_once(monkeypatch):
    from lora_kernels.stats.gather import Covariance

    calls, part = [], Covariance.part
    monkeypatch.setattr(Covariance, "part", lambda self, x: calls.append(1) or part(self, x))
    found = calibrate(Net(), batches())
    assert len(calls) == 2 * 3  # left and right share theirs
    assert torch.equal(found["left"]["covariance"], found["right"]["covariance"])
    assert found["left"]["covariance"].data_ptr() != found["right"]["covariance"].data_ptr()


def test_an_input_changed_in_place_is_another():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return y + self.b(x.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0])))

    found = calibrate(Changes(), [torch.randn(1, 9, 4)])
    assert not torch.allclose(found["a"]["covariance"], found["b"]["covariance"])


def test_the_model_is_as_it_was():
    model = Net()
    model.drop.eval()
    model.left.weight.requires_grad_(False)
    model.out.weight.grad = torch.ones(5, 8)
    kept = model.out.weight.grad
    done = []
    calibrate(
        model,
        batches(),
        ("covariance", "gradient"),
        forward=lambda m, x: m(x).square().mean(),
        progress=done.append,
    )
    assert done == [1, 2, 3]
    assert model.training and not model.drop.training and model.out.training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True]
    assert model.out.weight.grad is kept and model.right.weight.grad is None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not model.left.weight._post_accumulate_grad_hooks


def test_the_model_is_as_it_was_after_an_error():
    model = Net()
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.randn(2, 7, 5)])
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not model.left._forward_hooks


def test_of_a_quantised_model():
    torch.manual_seed(0)
    model = quantize_base(nn.Sequential(nn.Linear(64, 64)))
    x = torch.randn(1, 9, 64)
    x_over = x[0] / x.max().abs()
    torch.testing.assert_close(calibrate(model, [x])["0"]["covariance"], x_over.T @ x_over)
    with pytest.raises(ValueError, match="'gradient' expects dense weights, got QuantizedWeight in 0"):
        calibrate(model, [x], "gradient")


BAD = {
    "no model": (lambda: calibrate([], batches()), TypeError, r"model: expected an nn.Module, got list"),
    "statistic": (
        lambda: calibrate(Net(), batches(), "mean"),
        ValueError,
        "collect: expected some of covariance, .*got 'mean'",
    ),
    "none": (lambda: calibrate(Net(), batches(), ()), ValueError, "collect: expected some of .*got none"),
    "no batches": (lambda: calibrate(Net(), []), ValueError, "batches: expected at least one, got none"),
    "no target": (lambda: calibrate(Net(), batches(), target_modules=["x"]), ValueError, "target_modules"),
    "no loss": (
        lambda: calibrate(Net(), batches(), "gradient"),
        ValueError,
        "forward: expected a loss of one number",
    ),
    "adapters": (
        lambda: calibrate(apply_lora(Net(), LoRAConfig(target_modules=["out"])), batches()),
        ValueError,
        "without adapters",
    ),
    "not reached": (
        lambda: calibrate(Net(), batches(), forward=lambda m, x: m.left(x)),
        ValueError,
        "expected them to reach every layer, and right never ran",
    ),
    "no gradient": (
        lambda: calibrate(Net(), batches(), "gradient", forward=lambda m, x: m.left(x).sum()),
        ValueError,
        "expected a loss that reaches every layer, and not right",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()
