"""GaLore through the adapters is GaLore on W; its gradient is in memory only where vectors are taken."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_models import loss, net, ours, train, values
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import remove_lora
from lora_kernels.optim import GaLoreAdamW
from lora_kernels.optim._vectors import leading_vectors

LR, GAP, SCALE, DECAY, RANK = 2e-2, 3, 0.7, 0.05, 4
TARGETS = ("wide", "tall", "square")


def fresh(dtype=torch.float64, **options):
    return ours(dtype, **({"init_lora_weights": True} | options))


def optimizer_of(model, **options):
    return GaLoreAdamW(model, LR, weight_decay=DECAY, update_proj_gap=GAP, scale=SCALE, **options)


class Reference:
    """The paper's loop on plain weights, from their whole gradients."""

    def __init__(self, weights, proj_type):
        self.weights, self.proj_type, self.t = weights, proj_type, 0
        self.m, self.v, self.vectors, self.outer = {}, {}, {}, {}

    def right(self, name):
        out, cols = self.weights[name].shape
        return {"std": out >= cols, "reverse_std": out < cols}.get(
            self.proj_type, self.proj_type in ("right", "full")
        )

    @torch.no_grad()
    def step(self):
        self.t += 1
        for name, weight in self.weights.items():
            grad = weight.grad
            if (self.t - 1) % GAP == 0:
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                self.vectors[name] = vh[:RANK] if self.right(name) else u[:, :RANK]
                self.outer[name] = u[:, :RANK]
            p = self.vectors[name]
            r = grad @ p.T if self.right(name) else p.T @ grad
            r = self.outer[name].T @ r if self.proj_type == "full" else r
            self.m[name] = 0.9 * self.m.get(name, torch.zeros_like(r)) + 0.1 * r
            self.v[name] = 0.999 * self.v.get(name, torch.zeros_like(r)) + 0.001 * r * r
            size = LR * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
            n = self.m[name] / (self.v[name].sqrt() + 1e-6)
            n = self.outer[name] @ n if self.proj_type == "full" else n
            weight -= size * SCALE * (n @ p if self.right(name) else p @ n)
            weight -= LR * DECAY * weight


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
def test_it_is_galore_on_the_base_weights(proj_type):
    model, plain = fresh(), net()
    weights = {name: getattr(plain, name).weight for name in TARGETS}
    reference = Reference(weights, proj_type)
    optimizer = optimizer_of(model, proj_type=proj_type)
    for seed in range(7):
        for one in (model, plain):
            one.zero_grad()
            loss(one, seed).backward()
        optimizer.step()
        reference.step()
    for name, weight in weights.items():
        torch.testing.assert_close(getattr(model, name).weight, weight, rtol=1e-9, atol=1e-9, msg=name)
        assert not torch.equal(weight, getattr(net(), name).weight)


def test_what_remains_is_the_plain_model():
    model = fresh()
    train(model, optimizer_of(model), 3)
    x = torch.arange(6).view(2, 3)
    y = model(x)
    plain = remove_lora(model)
    assert {type(module) for module in plain.modules()} >= {nn.Linear}
    torch.testing.assert_close(plain(x), y, rtol=0, atol=0)


def test_a_sum_of_backward_passes_is_one():
    one, other = fresh(), fresh()
    for model, parts in ((one, 1), (other, 2)):
        optimizer = GaLoreAdamW(model, LR, update_proj_gap=10**6)
        loss(model, 0).backward()  # takes the vectors
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(parts):
            (loss(model, 1) / parts).backward()
        optimizer.step()
    want = values(one)
    for key, value in values(other).items():
        torch.testing.assert_close(value, want[key], rtol=1e-9, atol=1e-12, msg=key)


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x):
            return self.linear(torch.tanh(self.linear(x)))

    plain, model = Twice(), apply_lora(Twice(), LoRAConfig(r=RANK, target_modules=["linear"]))
    reference, optimizer = Reference({"linear": plain.linear.weight}, "std"), optimizer_of(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(4):
        for one, stepper in ((model, optimizer), (plain, reference)):
            one.zero_grad()
            one(x).square().sum().backward()
            stepper.step()
    torch.testing.assert_close(model.linear.weight, plain.linear.weight, rtol=1e-9, atol=1e-9)


def peak_bytes(run):
    """The most that is allocated at once during ``run``, above what was before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("shape", [(256, 256), (128, 256), (256, 128)], ids=str)
def test_no_gradient_of_w_between_the_steps_that_take_vectors(shape):
    """W is 4 to 16 times larger than everything else: its gradient would show in the peak."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, bias=False))
    size = model[0].weight.nbytes
    apply_lora(model, LoRAConfig(r=4, target_modules="all-linear"))
    optimizer = GaLoreAdamW(model, update_proj_gap=3)
    x = torch.randn(6, shape[0])

    def forward_and_backward():
        optimizer.zero_grad()
        model(x).square().sum().backward()

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t
        ):
            model(x)
        return sizes

    peaks = []
    for _ in range(4):
        peaks.append(peak_bytes(forward_and_backward))
        optimizer.step()
        assert model[0].weight.grad is None
    assert peaks[0] > size and peaks[3] > size  # the check sees a gradient where there is one
    assert max(peaks[1:3]) < size / 2
    assert tuple(x.shape) not in kept() or shape[0] > shape[1]  # Q: h is kept, and not x


def test_state_is_of_the_projected_size():
    model = fresh()
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    sizes = {"wide": 20, "tall": 20, "square": 9}
    total = sum(t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    assert total == sum(2 * RANK * size for size in sizes.values())


def test_both_sides_keep_less_and_go_on_from_a_checkpoint():
    model, other = fresh(), fresh()
    optimizer = optimizer_of(model, proj_type="full")
    train(model, optimizer, 2)
    sizes = {"wide": 20, "tall": 9, "square": 9}
    total = sum(t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    assert total == sum(2 * RANK**2 + RANK * size for size in sizes.values())
    again = optimizer_of(other, proj_type="full")
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(model, optimizer, 3, first=2)
    train(other, again, 3, first=2)
    want = values(model)
    assert all(torch.equal(value, want[name]) for name, value in values(other).items())


def test_gradients_that_are_forgotten_do_not_come_back():
    one, other = fresh(), fresh()
    optimizers = [optimizer_of(model, proj_type="full") for model in (one, other)]
    for model, optimizer in zip((one, other), optimizers, strict=True):
        train(model, optimizer, 1)
    loss(one, 5).backward()
    optimizers[0].zero_grad()
    for model, optimizer in zip((one, other), optimizers, strict=True):
        train(model, optimizer, 1, first=1)
    want = values(other)
    assert all(torch.equal(value, want[name]) for name, value in values(one).items())


def test_each_step_has_the_rank_of_the_adapter():
    model = fresh()
    optimizer = GaLoreAdamW(model, LR, update_proj_gap=1)
    start = model.wide.weight.clone()
    ranks = []
    for seed in range(2):
        before = model.wide.weight.clone()
        train(model, optimizer, 1, first=seed)
        ranks.append(torch.linalg.matrix_rank(model.wide.weight - before, rtol=1e-9).item())
    assert ranks == [RANK, RANK]
    assert torch.linalg.matrix_rank(model.wide.weight - start, rtol=1e-9) == 2 * RANK


def test_a_half_precision_base():
    torch.manual_seed(0)
    model = apply_lora(
        nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)), LoRAConfig(r=2, target_modules=["0"])
    )
    optimizer = GaLoreAdamW(model, 1e-2, scale=1.0)
    before = model[0].weight.clone()
    model(torch.randn(4, 8, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    assert model[0].weight.dtype == torch.bfloat16 and not torch.equal(model[0].weight, before)
    assert model[0].adapters["default"].lora_B.count_nonzero() == 0


REFUSED = {
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: wide: expected 0, got 0.1"),
    "started": ({"init_lora_weights": False}, "expected an adapter that is still zero"),
    "dora": ({"use_dora": True}, "expected an adapter that is s · B A and no more"),
    "rank": ({"r": 15}, "r: wide: expected at most 12, got 15"),
    "embedding": ({"target_modules": ["table"]}, "table: expected a linear over a dense weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_adapters_that_cannot_carry_it(what):
    options, message = REFUSED[what]
    model = fresh(**options)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW(model)
    assert all(torch.equal(value, before[key]) for key, value in values(model).items())


def test_two_active_adapters_are_refused():
    model = fresh()
    apply_lora(model, LoRAConfig(r=2, target_modules=["wide"]), "second")
    from lora_kernels.nn import set_adapter

    set_adapter(model, ["default", "second"])
    with pytest.raises(ValueError, match="wide: expected one active adapter, got several"):
        GaLoreAdamW(model)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_leading_vectors_span_what_the_decomposition_does(shape, right):
    """As near to those of float64 as a decomposition in float32, up to twice its error."""
    sizes = torch.linspace(0, -3, min(shape), dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(n, len(sizes), dtype=torch.float64)).Q for n in shape)
    matrix = (u * 10**sizes @ v.T).float()

    def projection(found):
        found = found.double()
        return found.T @ found if right else found @ found.T

    _, _, vh = torch.linalg.svd(matrix.double() if right else matrix.T.double())
    want = projection(vh[:4] if right else vh[:4].T)
    eager_u, _, eager_vh = torch.linalg.svd(matrix, full_matrices=False)
    eager = (projection(eager_vh[:4] if right else eager_u[:, :4]) - want).norm()
    got = leading_vectors(matrix, 4, right)
    assert got.shape == ((4, shape[1]) if right else (shape[0], 4))
    assert (projection(got) - want).norm() <= 2 * eager
