"""A mixture of experts with its router: y and every gradient against the dense sum in fp64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import use_backend
from lora_kernels.nn import LoRALinear, LoRAMixtureLinear, side_inputs
from lora_kernels.reference.dropout import dropout_mask, keep_of, row_dropout_mask
from lora_kernels.routing import balance_loss
from lora_kernels.testing import assert_close

IN, OUT = 19, 13


def mixture(dtype=torch.float32, **options):
    """A layer whose experts all matter: nothing in it is zero."""
    torch.manual_seed(3)
    options = {"num_experts": 5, "r": 3, "lora_alpha": 4, **options}
    layer = LoRAMixtureLinear(IN, OUT, dtype=dtype, **options)
    nn.init.normal_(layer.experts.lora_B, std=0.4)
    return layer


def leaves(layer, x, dtype):
    """x, W, b, A, B and R as leaves of ``dtype`` (the router at least in fp32)."""
    router = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = (x, layer.weight, layer.bias, layer.experts.lora_A, layer.experts.lora_B)
    parts = [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    return [*parts, layer.experts.router.detach().to(router, copy=True).requires_grad_()]


def router_weights(layer, probs):
    """w of every expert, zero where it is not chosen."""
    top = probs.topk(layer.experts.top_k, -1).indices
    chosen = torch.zeros_like(probs).scatter(-1, top, 1.0) * probs
    return chosen / chosen.sum(-1, keepdim=True) if layer.experts.norm_topk_prob else chosen


def dense(layer, x, weight, bias, lora_a, lora_b, router, drop=lambda x, j: x):
    """The mixture as its equation has it: every expert on every row, one after the other."""
    w = router_weights(layer, F.linear(x.to(router.dtype), router).softmax(-1)).to(x.dtype)
    y, r = F.linear(x, weight, bias), layer.experts.r
    for j in range(layer.experts.experts):
        part = slice(j * r, (j + 1) * r)
        y = y + w[..., j, None] * (layer.experts.scaling * drop(x, j) @ lora_a[part].T @ lora_b[:, part].T)
    return y


def results(layer, x, dy):
    """y and the gradients of x, A, B and the router, of the layer itself."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [
        y.detach(),
        x.grad,
        layer.experts.lora_A.grad,
        layer.experts.lora_B.grad,
        layer.experts.router.grad,
    ]


def eager(layer, x, dy, dtype, **options):
    parts = leaves(layer, x, dtype)
    y = dense(layer, *parts, **options)
    y.backward(dy.to(dtype))
    return [y.detach(), parts[0].grad, *(p.grad for p in parts[3:])]


def check(layer, x, dy):
    """All of it by the tolerance rule."""
    ours = results(layer, x, dy)
    theirs, exact = (eager(layer, x, dy, dtype) for dtype in (x.dtype, torch.float64))
    names = ("y", "dx", "dA", "dB", "drouter")
    for name, got, plain, true in zip(names, ours, theirs, exact, strict=True):
        assert_close(got, plain, true, name, dtype=x.dtype, ulps=2)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_y_and_every_gradient(any_backend, backend, top_k):
    layer = mixture(top_k=top_k, norm_topk_prob=top_k != 1)
    x, dy = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)
    with use_backend(backend):
        check(layer, x, dy)
    assert layer.experts.router.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("top_k", [None, 2])
def test_dtypes(dtype, top_k):
    layer = mixture(dtype, top_k=top_k)
    whole = torch.promote_types(dtype, torch.float32)
    assert layer.experts.lora_A.dtype == layer.experts.router.dtype == whole
    x, dy = torch.randn(9, IN, dtype=dtype), torch.randn(9, OUT, dtype=dtype)
    assert layer(x).dtype == dtype
    check(layer, x, dy)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_k": 3, "norm_topk_prob": False}], ids=str)
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 3, 4, IN)], ids=str)
def test_shapes(poisoned, shape, options):
    layer = mixture(**options)
    x = torch.randn(shape)
    check(layer, x, torch.randn(*shape[:-1], OUT))
    with torch.no_grad():
        assert_close(layer(x), *(dense(layer, *leaves(layer, x, d)) for d in (x.dtype, torch.float64)))


def test_a_view_of_something_wider():
    layer = mixture(top_k=2, bias=True)
    x = torch.randn(2 * IN, 6).T[:, ::2]
    check(layer, x, torch.randn(6, OUT))


@pytest.mark.parametrize("top_k", [None, 2])
def test_dropout_of_the_backward_is_that_of_the_forward(top_k):
    """By the mask that the seed gives: y and every gradient, in fp64."""
    p, rows = 0.5, 8
    layer = mixture(torch.float64, top_k=top_k, lora_dropout=p)
    x, dy = torch.randn(rows, IN, dtype=torch.float64), torch.randn(rows, OUT, dtype=torch.float64)
    torch.manual_seed(5)
    ours = results(layer, x, dy)
    torch.manual_seed(5)
    seed = torch.empty(1, dtype=torch.int64).random_()
    if top_k is None:
        keep = keep_of(dropout_mask(seed, rows, IN, p), IN)[:, None].expand(rows, 5, IN)
    else:
        slots = keep_of(row_dropout_mask(seed, torch.full((rows * top_k,), p), IN), IN)
        top = F.linear(x, layer.experts.router).topk(top_k, -1).indices
        keep = torch.zeros(rows, 5, IN, dtype=torch.bool)
        keep.scatter_(1, top[..., None].expand(rows, top_k, IN), slots.view(rows, top_k, IN))
    assert keep.any() and not keep.all()

    def drop(x, j):
        return torch.where(keep[:, j], x, 0) / (1 - p)

    for got, exact in zip(ours, eager(layer, x, dy, torch.float64, drop=drop), strict=True):
        assert_close(got, exact, exact)
    layer.eval()
    assert_close(layer(x), layer(x), dense(layer, *leaves(layer, x, torch.float64)))


@pytest.mark.parametrize("top_k", [None, 2])
def test_under_autocast_the_router_stays_in_fp32(top_k):
    layer = mixture(top_k=top_k)
    half = mixture(torch.bfloat16, top_k=top_k)
    x = torch.randn(9, IN).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer(x.bfloat16()), y)
    half.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y, half(x.bfloat16()), rtol=0, atol=0)
    y.float().sum().backward()
    assert layer.experts.router.grad.dtype == layer.experts.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_fresh_mixture_is_its_base(top_k):
    linear = nn.Linear(IN, OUT)
    layer = LoRAMixtureLinear.from_linear(linear, 4, top_k, r=2, lora_dropout=0.3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    x = torch.randn(6, IN)
    torch.testing.assert_close(layer(x), linear(x))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"adapters.default.{name}" for name in ("lora_A", "lora_B", "router")}
    assert set(dict(layer.named_parameters())) == trained | {"weight", "bias"}


def test_one_expert_is_a_lora_linear():
    layer = mixture(num_experts=1, use_rslora=True)
    single = LoRALinear.from_linear(nn.Linear(IN, OUT), r=3, lora_alpha=4, use_rslora=True)
    adapter = single.adapters["default"]
    with torch.no_grad():
        single.weight.copy_(layer.weight)
        single.bias.copy_(layer.bias)
        adapter.lora_A.copy_(layer.experts.lora_A)
        adapter.lora_B.copy_(layer.experts.lora_B)
    x = torch.randn(6, IN)
    torch.testing.assert_close(layer(x), single(x))


def balance(layer, x):
    with side_inputs(layer) as call:
        layer(x)
    return balance_loss(call)


def test_balance_loss():
    """Its value by hand, its gradient by what it does, and that copies work after it."""
    layer = mixture(top_k=2)
    x = torch.randn(3, 50, IN) + 1.0
    first = balance(layer, x)
    probs = F.linear(x, layer.experts.router).softmax(-1).view(150, 5)
    counts = torch.bincount(probs.topk(2, -1).indices.flatten(), minlength=5)
    expected = 5 * (counts / 300 * probs.mean(0)).sum()
    torch.testing.assert_close(first, expected)
    optimiser = torch.optim.SGD([layer.experts.router], lr=0.5)
    for _ in range(40):
        optimiser.zero_grad()
        balance(layer, x).backward()
        optimiser.step()
    after = torch.bincount(
        F.linear(x, layer.experts.router).view(150, 5).topk(2, -1).indices.flatten(), minlength=5
    )
    assert balance(layer, x) < expected and after.double().std() < counts.double().std()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    torch.testing.assert_close(balance(mixture(), x), torch.ones(()))
    with side_inputs(layer) as call, pytest.raises(ValueError, match="call: expected one whose layers had a"):
        balance_loss(call)


@pytest.mark.parametrize("top_k", [None, 2])
def test_it_learns_what_its_router_has_to_tell_apart(top_k):
    """Two kinds of rows with opposite targets: a single LoRA of all the ranks cannot fit them."""
    torch.manual_seed(0)
    kind = torch.arange(64) % 2 * 2.0 - 1
    x = torch.randn(64, IN)
    x[:, 0] = 4 * kind
    target = kind[:, None] * x[:, 1:3] @ torch.randn(2, OUT)
    losses = []
    linear = nn.Linear(IN, OUT)
    mixed = LoRAMixtureLinear.from_linear(copy.deepcopy(linear), 3, top_k, r=2, lora_alpha=2)
    for layer in (mixed, LoRALinear.from_linear(linear, r=6, lora_alpha=6)):
        optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
        for _ in range(250):
            loss = F.mse_loss(layer(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        losses.append(loss.item())
    assert losses[0] < 0.3 * losses[1]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_experts": 0}, ValueError, "experts: expected at least 1, got 0"),
        ({"num_experts": 2.0}, TypeError, "experts: expected an int, got float"),
        ({"top_k": 6}, ValueError, "top_k: expected 1 to 5, got 6"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
        ({"top_k": True}, TypeError, "top_k: expected an int, got bool"),
        ({"r": 0}, ValueError, "r: "),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: expected 0 <= lora_dropout < 1"),
    ],
    ids=str,
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        mixture(**options)
    linear = nn.Linear(IN, OUT)
    with pytest.raises(error, match=match):
        LoRAMixtureLinear.from_linear(linear, **{"num_experts": 5, **options})
    assert linear.weight.requires_grad


def test_bad_input():
    with pytest.raises(TypeError, match="options: expected r, lora_alpha"):
        LoRAMixtureLinear.from_linear(nn.Linear(IN, OUT), rank=2)
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got LoRALinear"):
        LoRAMixtureLinear.from_linear(LoRALinear(IN, OUT))
    for top_k in (None, 2):
        layer = mixture(top_k=top_k)
        with pytest.raises(ValueError, match=r"x: expected last dimension 19 \(in_features\)"):
            layer(torch.randn(3, IN + 1))
        with pytest.raises(TypeError, match=r"x: expected torch.float32 \(the weight's\)"):
            layer(torch.randn(3, IN).half())
