"""Flora: Adafactor where nothing is compressed, unbiased where it is, and small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.optim import Flora, FloraAccumulator, compressed_weight_grad
from lora_kernels.optim.flora import compress, decompress, sketch

CPU = torch.device("cpu")


def projection(rank, size, seed=0):
    return sketch(rank, size, seed, CPU, torch.float64)


def test_without_momentum_it_is_adafactor():
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    torch.manual_seed(0)
    shapes = ((6, 10), (7,), (9, 4))
    one = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    other = [nn.Parameter(p.detach().clone()) for p in one]
    theirs = adafactor(other, lr=0.05, relative_step=False, scale_parameter=True, weight_decay=0.0)
    mine = Flora(one, lr=0.05)
    for _ in range(5):
        for p, q in zip(one, other, strict=True):
            p.grad = torch.randn_like(p) * 3
            q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)  # theirs keeps float32 sums


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_sketch_is_unbiased_and_its_error_is_known(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape, dtype=torch.float64)
    rank, total, errors = 4, torch.zeros_like(gradient), []
    for seed in range(4000):
        p = projection(rank, 8, seed)
        back = decompress(compress(gradient, p), p, gradient.shape)
        total += back
        errors.append((back - gradient).square().sum())
    assert (total / 4000 - gradient).norm() < 0.05 * gradient.norm()
    relative = (torch.stack(errors).mean() / gradient.square().sum()).sqrt()
    assert abs(relative - ((8 + 1) / rank) ** 0.5) < 0.05  # √((n + 1)/r)


@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (6, 6)])
def test_the_compressed_gradient_needs_no_gradient(sizes):
    cols, out = sizes
    x, dy = torch.randn(2, 3, cols, dtype=torch.float64), torch.randn(2, 3, out, dtype=torch.float64)
    whole = dy.flatten(0, 1).T @ x.flatten(0, 1)
    p = projection(3, min(sizes))
    torch.testing.assert_close(compressed_weight_grad(x, dy, p), compress(whole, p))
    with pytest.raises(ValueError, match=rf"projection: expected \[r, {min(sizes)}\], got \(3, 7\)"):
        compressed_weight_grad(x, dy, projection(3, 7))


def test_it_is_what_a_lora_layer_gives():
    from lora_kernels import lora_linear

    x, dy = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64)
    p, zero = projection(3, 5), torch.zeros(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, dtype=torch.float64)
    lora_linear(x, weight, p, zero).backward(dy)
    torch.testing.assert_close(compressed_weight_grad(x, dy, p), zero.grad)


def momentum_by_hand(p, grads, lr, rank, kappa, beta, seed_of):
    """The docstring's formula, with M decompressed and compressed in fp64."""
    from lora_kernels.optim.flora import _normalised

    group, state, m = {"eps": (1e-30, 1e-3), "clip": 1.0}, {"step": 0}, None
    for t, grad in enumerate(grads):
        state["step"] += 1
        u = _normalised(grad, state, group)
        now = projection(rank, min(p.shape), seed_of(t // kappa))
        if m is None:
            m = torch.zeros_like(compress(u, now))
        elif t // kappa != (t - 1) // kappa:
            m = compress(decompress(m, projection(rank, min(p.shape), seed_of(t // kappa - 1)), p.shape), now)
        step = (1 - beta) * u + beta * decompress(m, now, p.shape)
        m = beta * m + (1 - beta) * compress(u, now)
        p = p - lr * p.square().mean().sqrt().clamp(min=1e-3) * step
    return p


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_momentum_is_its_formula(shape):
    from lora_kernels.optim.flora import _seed

    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    grads = [torch.randn_like(p) for _ in range(5)]
    want = momentum_by_hand(p.detach().clone(), grads, 0.1, 3, 2, 0.8, lambda cycle: _seed(7, 0, cycle))
    optimizer = Flora([p], lr=0.1, rank=3, kappa=2, beta1=0.8, seed=7)
    for grad in grads:
        p.grad = grad
        optimizer.step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-12, atol=1e-12)


def steps_of(shape, dtype, native, monkeypatch, **options):
    """The weight and the state after four steps, of which one passes to another P."""
    from lora_kernels.optim import flora

    fits = flora._fits_native if native else lambda *_: False
    with monkeypatch.context() as patched:
        used = []
        patched.setattr(flora, "_fits_native", lambda *a: used.append(fits(*a)) or used[-1])
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        optimizer = Flora([p], lr=0.1, rank=3, kappa=2, seed=7, **options)
        for i in range(4):
            p.grad = torch.randn(shape, generator=generator).to(dtype) * 10.0**i
            optimizer.step()
        assert all(used) is native
    state = sorted(optimizer.state[p].items())
    return [p.detach(), *(value for _, value in state if torch.is_tensor(value))]


@pytest.mark.parametrize("options", [{}, {"beta1": 0.8}, {"beta1": 0.8, "weight_decay": 0.1, "clip": 0.5}])
@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (130, 67), (65, 200)], ids=str)
def test_the_compiled_step_is_the_eager_one(shape, options, monkeypatch):
    from lora_kernels.optim import flora

    if not flora._has_native():
        pytest.skip("the extension is not built")
    projections = flora.sketch  # of float64: the same numbers as float32 draws
    monkeypatch.setattr(flora, "sketch", lambda r, n, s, d, t: projections(r, n, s, d, torch.float32).to(t))
    exact = steps_of(shape, torch.float64, False, monkeypatch, **options)
    eager = steps_of(shape, torch.float32, False, monkeypatch, **options)
    found = steps_of(shape, torch.float32, True, monkeypatch, **options)
    for want, other, got in zip(exact, eager, found, strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        bound = 2 * (other.double() - want).norm() + torch.finfo(torch.float32).eps * want.norm()
        assert (got.double() - want).norm() <= bound


def test_what_the_compiled_step_does_not_take():
    from lora_kernels.optim import flora

    group = {"beta1": 0.9, "rank": 4}
    tensors = {
        "a vector": torch.randn(8),
        "transposed": torch.randn(8, 9).T,
        "float64": torch.randn(8, 9, dtype=torch.float64),
        "momentum whole": torch.randn(64, 8),
        "empty": torch.randn(0, 8),
    }
    for name, tensor in tensors.items():
        p = nn.Parameter(tensor)
        p.grad = torch.ones_like(p)
        assert not flora._fits_native(p, group), name


def test_the_state_is_small():
    p = nn.Parameter(torch.randn(40, 20))
    optimizer = Flora([p], rank=5, beta1=0.9)
    p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(t.numel() for t in optimizer.state[p].values() if torch.is_tensor(t))
    assert held == 5 * 40 + 40 + 20


def test_accumulated_gradients_hold_one_sketch_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30, bias=False), nn.Linear(30, 8)).double()
    accumulator = FloraAccumulator(model.parameters(), rank=4, seed=3)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    whole = torch.autograd.grad(sum(model(part).square().sum() for part in x), list(model.parameters()))
    for part in x:
        model(part).square().sum().backward()
        assert model[0].weight.grad is None and model[1].weight.grad is None
        assert model[1].bias.grad is not None  # no matrix
    assert [tuple(total.shape) for total in accumulator.sums] == [(30, 4), (4, 30)]
    saved = accumulator.state_dict()
    accumulator.restore()
    for place, i in ((0, 0), (1, 1)):
        from lora_kernels.optim.flora import _seed

        p = projection(4, min(whole[i].shape), _seed(3, place, 0))
        got = list(model.parameters())[i].grad
        torch.testing.assert_close(got, decompress(compress(whole[i], p), p, whole[i].shape))
    assert accumulator.sums == [None, None]
    accumulator.load_state_dict(saved)
    assert accumulator.cycle == 0 and accumulator.sums[0] is saved["sums"][0]
    with pytest.raises(ValueError, match="state_dict: expected 2 sums, got 0"):
        accumulator.load_state_dict({"cycle": 0, "sums": []})
    accumulator.remove()
    model.zero_grad()
    model(x[0]).sum().backward()
    assert model[0].weight.grad is not None
