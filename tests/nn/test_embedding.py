"""LoRAEmbedding: the layer, its options, merging, DoRA, on models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.adapters import METHODS, LoRAConfig
from lora_kernels.nn import LoRAEmbedding, apply_lora, lora_layers, merge_adapters, remove_lora
from lora_kernels.testing.method_cases import case

ROWS, DIM, RANK = 20, 12, 4
TOKENS = torch.tensor([[1, 7, 7, 0], [3, 19, 2, 7]])
# Those that an embedding takes, and that have one ΔW.
TAKEN = [name for name, one in METHODS.items() if not one.reads_x and one.mergeable]
METHOD = pytest.mark.parametrize("method", sorted(TAKEN))


def new_layer(method="lora", *, dtype=torch.float64, **options):
    torch.manual_seed(0)
    given = {"r": RANK, "lora_alpha": 6, **case(method).options, **options}
    layer = LoRAEmbedding(ROWS, DIM, method=method, dtype=dtype, **given)
    shake(layer)
    return layer


def shake(layer):
    with torch.no_grad():
        for adapter in layer.adapters.values():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.normal_()


def dense(layer, tokens):
    weight = layer.weight.T
    for name in layer.active:
        weight = layer.adapters[name].merged(weight, layer.weight.T)
    return F.embedding(tokens, weight.T)


@METHOD
def test_values_and_gradients_are_those_of_the_dense_embedding(method):
    layer = new_layer(method)
    trained = [p for p in layer.parameters() if p.requires_grad]
    dy = torch.randn(*TOKENS.shape, DIM, dtype=torch.float64)
    y, want = layer(TOKENS), dense(layer, TOKENS)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(y, trained, dy), torch.autograd.grad(want, trained, dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", sorted(name for name, one in METHODS.items() if one.reads_x))
def test_what_reads_its_input_is_refused(method):
    with pytest.raises(ValueError, match=f"method: {method} reads its input and sits on linears alone"):
        new_layer(method)


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(method, dtype):
    layer = new_layer(method, dtype=dtype)
    weight, before, y = layer.weight, layer.weight.clone(), layer(TOKENS)
    layer.merge()
    torch.testing.assert_close(
        layer(TOKENS), y, **({} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1})
    )
    with layer.disable_adapters():
        assert torch.equal(layer(TOKENS), F.embedding(TOKENS, before))
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight, before)
    assert torch.equal(layer(TOKENS), y)


@METHOD
def test_starts_at_the_base(method):
    torch.manual_seed(0)
    given = {"r": RANK, **case(method).options}
    layer = LoRAEmbedding(ROWS, DIM, method=method, dtype=torch.float64, **given)
    error = (layer(TOKENS) - F.embedding(TOKENS, layer.weight)).abs().max()
    assert error == 0 if METHODS[method].zero_start else error < 1e-2
    layer.adapters["default"].reset_parameters(layer.weight.T)
    layer.reset_parameters()
    if method == "lora":  # as PEFT starts it
        assert layer.adapters["default"].lora_A.count_nonzero() == 0
        assert layer.adapters["default"].lora_B.count_nonzero() == DIM * RANK


@pytest.mark.parametrize("second", ["lora", "dora"])
def test_two_adapters(second):
    layer = new_layer("dora")
    layer.add_adapter("second", LoRAConfig(r=2, method=second))
    layer.set_adapter(["default", "second"])
    shake(layer)
    torch.testing.assert_close(layer(TOKENS), dense(layer, TOKENS))
    layer(TOKENS).sum().backward()


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 7}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}, {"sparse": True}],
    ids=str,
)
def test_options_of_the_look_up(options):
    """As F.embedding on E and on Aᵀ."""
    torch.manual_seed(0)
    base = nn.Embedding(ROWS, DIM, dtype=torch.float64, **options)
    layer = LoRAEmbedding.from_embedding(base, r=RANK)
    shake(layer)
    twin = copy.deepcopy(layer)
    adapter, other = layer.adapters["default"], twin.adapters["default"]
    want = F.embedding(TOKENS, twin.weight, **vars_of(base))
    h = F.embedding(TOKENS, other.lora_A.T, **{**vars_of(base), "sparse": False})
    want = want + other.scaling * h @ other.lora_B.T
    y = layer(TOKENS)
    torch.testing.assert_close(y, want)
    assert torch.equal(layer.weight, twin.weight) and torch.equal(adapter.lora_A, other.lora_A)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(adapter.lora_A.grad, other.lora_A.grad)
    torch.testing.assert_close(adapter.lora_B.grad, other.lora_B.grad)


def vars_of(base):
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    return {name: getattr(base, name) for name in names}


def test_shapes_dtypes_and_state():
    layer = new_layer(dtype=torch.bfloat16)
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    assert layer(torch.tensor(3)).shape == (DIM,) and layer(TOKENS[:0]).shape == (0, 4, DIM)
    layer(TOKENS).float().sum().backward()
    assert layer.adapters["default"].lora_A.grad.dtype == torch.float32
    other = LoRAEmbedding(ROWS, DIM, r=RANK, lora_alpha=6, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(TOKENS), layer(TOKENS))
    with pytest.raises(TypeError, match=r"embedding: expected an nn\.Embedding, got Linear"):
        LoRAEmbedding.from_embedding(nn.Linear(2, 2))


def test_in_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, DIM), nn.Linear(DIM, 3))
    original = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=2, target_modules=["0", "1"], bias="lora_only"))
    assert [type(layer).__name__ for layer in lora_layers(model).values()] == ["LoRAEmbedding", "LoRALinear"]
    assert torch.equal(model(TOKENS), original(TOKENS))
    for layer in lora_layers(model).values():
        shake(layer)
    y = model(TOKENS)
    merge_adapters(model)
    torch.testing.assert_close(model(TOKENS), y)
    remove_lora(model)
    assert [type(m) for m in model] == [nn.Embedding, nn.Linear]
    assert torch.equal(model(TOKENS), original(TOKENS))
    with pytest.raises(ValueError, match="matches no"):
        apply_lora(nn.Sequential(nn.Embedding(3, 2)), LoRAConfig(target_modules="all-linear"))
