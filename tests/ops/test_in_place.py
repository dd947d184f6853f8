"""What an op or a layer returns may be written to in place, as torch's own outputs may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import (
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    LoRAMixtureLinear,
    QuantizedLinear,
    disable_adapters,
    merge_adapters,
)
from lora_kernels.ops._lora_function import LoRALinearFunction
from lora_kernels.ops.invariant_linear import invariant_linear
from lora_kernels.ops.quantized_linear import quantized_linear

K, N, R = 6, 5, 2
LEADS = [(), (3,), (2, 3)]
# The interpreter is slow: each op there with each dropout and each shape, and not all with all.
SLOW = pytest.mark.spread("op", "p", "lead", of=3)
BACKENDS = ("reference", "cpp", pytest.param("triton", marks=SLOW))


def draw(*shape):
    return torch.randn(*shape, requires_grad=True)


def factors(cols=K, out=N):
    return draw(R, cols), draw(out, R)


def lora_linear(p):
    weight, (a, b), bias = torch.randn(N, K), factors(), draw(N)
    return lambda x: lk.lora_linear(x, weight, a, b, 2.0, bias, dropout_p=p), (a, b, bias)


def branch_alone(p):
    a, b = factors()
    return lambda x: lk.lora_linear(x, None, a, b, dropout_p=p), (a, b)


def python_function(p):
    weight, (a, b) = torch.randn(N, K), factors()
    return lambda x: LoRALinearFunction.apply(x, weight, a, b, None, None, None, None, 2.0, p), (a, b)


def group(p):
    weights, pairs = (torch.randn(N, K), torch.randn(4, K)), (factors(), factors(out=4))
    lora_as, lora_bs = zip(*pairs, strict=True)
    return lambda x: lk.lora_linear_group(x, weights, lora_as, lora_bs, dropout_p=p), (*lora_as, *lora_bs)


def quantised_group(p):
    weights = tuple(lk.quantize(torch.randn(out, K), "int8") for out in (N, 4))
    lora_as, lora_bs = zip(factors(), factors(out=4), strict=True)
    return lambda x: lk.lora_linear_group(x, weights, lora_as, lora_bs, dropout_p=p), (*lora_as, *lora_bs)


def mlp(p):
    sizes = ((K, N), (K, N), (N, K))
    parts = [
        lk.LoRAProjection(torch.randn(out, cols), *factors(cols, out), dropout_p=p) for cols, out in sizes
    ]
    return lambda x: lk.lora_mlp(x, *parts), [t for part in parts for t in part[1:3]]


def dora(p):
    weight, (a, b), m, bias = torch.randn(N, K), factors(), draw(N), draw(N)
    return lambda x: lk.dora_linear(x, weight, a, b, m, 2.0, bias, dropout_p=p), (a, b, m, bias)


def quantised(p):
    weight, (a, b) = lk.quantize(torch.randn(N, K), "int8"), factors()
    return lambda x: lk.lora_linear(x, weight, a, b, dropout_p=p), (a, b)


def quantised_base(p):
    weight, bias = lk.quantize(torch.randn(N, K), "int8"), draw(N)
    return lambda x: quantized_linear(x, weight, bias), (bias,)


def invariant(p):
    weight = draw(N, K)
    return lambda x: invariant_linear(x, weight), (weight,)


def stack_of(p, out=N):
    lora_as, lora_bs = zip(factors(out=out), factors(out=out), strict=True)
    return lk.stack_adapters(lora_as, lora_bs, [1.0, 2.0]), (*lora_as, *lora_bs)


def ids_of(x):
    return torch.arange(max(1, x[..., 0].numel())).remainder(3).sub(1).view(x.shape[:-1])


def many(p):
    (stack, leaves), weight = stack_of(p), torch.randn(N, K)
    drops = {"dropout_ps": [p, p]} if p else {}
    return lambda x: lk.multi_lora_linear(x, weight, stack, ids_of(x), **drops), leaves


def many_invariant(p):
    (stack, leaves), weight = stack_of(p), torch.randn(N, K)
    return lambda x: lk.multi_lora_linear(x, weight, stack, ids_of(x), batch_invariant=True), leaves


def many_slices(p):
    pairs = [stack_of(p), stack_of(p, 4)]
    weights = [torch.randn(out, K) for out in (N, 4)]
    slices = lk.slice_adapters(*(stack for stack, _ in pairs))
    call = lambda x: lk.multi_lora_linear_slices(x, weights, slices, ids_of(x))  # noqa: E731
    return call, [leaf for _, leaves in pairs for leaf in leaves]


OPS = [
    *(lora_linear, branch_alone, python_function, group, quantised_group, mlp, dora, quantised),
    *(quantised_base, invariant, many, many_invariant, many_slices),
]


def of_layer(layer):
    return layer, [p for p in layer.parameters() if p.requires_grad]


def linear(p, **options):
    return of_layer(LoRALinear(K, N, R, lora_dropout=p, init_lora_weights=False, **options))


def two_adapters(p):
    layer = LoRALinear(K, N, R, lora_dropout=p, init_lora_weights=False)
    layer.add_adapter("other", LoRAConfig(3, lora_dropout=p, init_lora_weights=False))
    layer.set_adapter(["default", "other"])
    return of_layer(layer)


def merged(p):
    layer = LoRALinear(K, N, R)
    layer.merge()
    return layer, []


def disabled(p):
    layer = LoRALinear(K, N, R)
    layer.enable_adapters(False)
    return layer, []


def over_quantised(p):
    base = QuantizedLinear.from_linear(nn.Linear(K, N), "int8")
    return of_layer(LoRALinear.from_linear(base, r=R, lora_dropout=p, init_lora_weights=False))


def mixture(p, top_k=None):
    layer = LoRAMixtureLinear(K, N, 3, top_k, r=R, lora_dropout=p)
    nn.init.normal_(layer.experts.lora_B)
    return of_layer(layer)


def sequential_model(p):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(inplace=True), nn.Linear(N, N))
    apply_lora(model, LoRAConfig(R, lora_dropout=p, target_modules="all-linear", init_lora_weights=False))
    return of_layer(model)


LAYERS = {
    **{kind: lambda p, kind=kind: linear(p, method=kind) for kind in ("lora", "dora", "sora", "lora_xs")},
    **{f.__name__: f for f in (two_adapters, merged, disabled, over_quantised, mixture, sequential_model)},
    "chosen experts": lambda p: mixture(p, 2),
}


def outputs(call, x):
    y = call(x)
    return list(y) if isinstance(y, (tuple, list)) else [y]


def gradients(call, x, leaves, change):
    """The outputs as ``change`` leaves them, and the gradients of everything."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_(x.is_floating_point())
    for leaf in leaves:
        leaf.grad = None
    changed = [change(y, i + 1.0) for i, y in enumerate(outputs(call, x))]
    loss = sum((y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum() for y in changed)
    if loss.requires_grad:
        loss.backward()
    return [y.detach().clone() for y in changed] + [t.grad for t in (x, *leaves) if t.grad is not None]


def beside(y, by):
    return torch.relu(y + by)


def in_place(y, by):
    return y.add_(by).relu_()


def check(call, x, leaves, compiled=False):
    want = gradients(call, x, leaves, beside)

    def changed(x):
        return [in_place(y, i + 1.0) for i, y in enumerate(outputs(call, x))]

    run = torch.compile(changed, backend="aot_eager", fullgraph=True) if compiled else changed
    got = gradients(run, x, leaves, lambda y, by: y)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_ops(op, p, lead, backend):
    call, leaves = op(p)
    with lk.use_backend(backend):
        check(call, torch.randn(*lead, K), leaves)


@pytest.mark.spread("op", "lead", of=2)
@pytest.mark.parametrize("lead", LEADS[1:], ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_compiled_ops(op, lead):
    torch._dynamo.reset()
    call, leaves = op(0.0)
    check(call, torch.randn(*lead, K), leaves, compiled=True)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, p, lead):
    call, leaves = LAYERS[layer](p)
    check(call, torch.randn(*lead, K), leaves)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings(use_dora, lead):
    layer = LoRAEmbedding(7, N, R, init_lora_weights=False, use_dora=use_dora)
    check(*of_layer_with(layer, torch.randint(0, 7, lead)))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4)], ids=str)
def test_convolutions(use_dora, kernel, shape):
    layer = LoRAConv2d(3, N, kernel, R, init_lora_weights=False, use_dora=use_dora)
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if kernel == 1 and x.dim() == 4 else x
    check(*of_layer_with(layer, x))


def of_layer_with(layer, x):
    call, leaves = of_layer(layer)
    return call, x, leaves


@pytest.mark.parametrize("of", ["peft", "ours"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_a_model_that_writes_in_place(of, options):
    peft = pytest.importorskip("peft")
    layers = [nn.Linear(K, N), nn.ReLU(inplace=True), nn.Conv1d(3, 4, 1), nn.ReLU(inplace=True)]
    model, fields = nn.Sequential(*layers), {"r": R, "target_modules": ["0", "2"], **options}
    if of == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(**fields))
        lk.accelerate(model)
    else:
        apply_lora(model, LoRAConfig(**fields))
    model(torch.randn(2, 3, K)).sum().backward()


def test_outputs_of_inference_can_take_part_in_training():
    call, _ = many_slices(0.0)
    with torch.no_grad():
        ys = call(torch.randn(3, K))
    for y in ys:
        weight = torch.ones(y.shape[-1], requires_grad=True)
        y.mul_(weight).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize("verb", [merge_adapters, disable_adapters])
def test_models_off_or_merged(verb):
    model = sequential_model(0.0)[0]
    scope = verb(model)
    x = torch.randn(3, K, requires_grad=True)
    if scope is None:
        model(x).add_(1).sum().backward()
    else:
        with scope:
            model(x).add_(1).sum().backward()
    assert x.grad is not None
