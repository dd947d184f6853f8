"""What single tuners have beside a plain linear: accelerate() against PEFT's own forward."""

import copy

import pytest
import torch
from peft import (
    DeftConfig,
    GloraConfig,
    GraloraConfig,
    OSFConfig,
    TinyLoraConfig,
    VBLoRAConfig,
    get_peft_model,
)
from test_peft_tuners import Model
from torch import nn

from lora_kernels.adapters.update import Branched, Dense, LowRank
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.tuners.deft import _is_few
from lora_kernels.integrations.tuners.tinylora import FusedTinyLoraEmbedding
from lora_kernels.integrations.tuners.wide import moved, product
from lora_kernels.testing import assert_close


def given_back(model):
    copied = copy.deepcopy(model)
    decelerate(copied)
    return copied


def results(model, x):
    """y and the gradient of each trained tensor, dropout from the same seed."""
    torch.manual_seed(3)
    y = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), list(trained.values()))]


def assert_same(model, x):
    """Ours against PEFT's, both against PEFT's in fp64."""
    peft = given_back(model)
    exact = results(copy.deepcopy(peft).double(), x.double() if x.is_floating_point() else x)
    for at, found in enumerate(zip(results(model, x), results(peft, x), exact, strict=True)):
        assert_close(*found, f"result {at}", ulps=4.0)


def tiny_embedding(dropout=0.0, **options):
    torch.manual_seed(0)
    config = TinyLoraConfig(r=3, u=4, target_modules=["0"], tinylora_dropout=dropout)
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 2))
    return get_peft_model(model, config), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dropout", "several"), [(0.0, False), (0.4, False), (0.0, True)])
def test_tinylora_embedding(dropout, several, dtype):
    model, config = tiny_embedding(dropout, padding_idx=2)
    if several:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    assert len(accelerate(model.to(dtype)).accelerated) == 1
    assert type(model.base_model.model[0]) is FusedTinyLoraEmbedding
    tokens = torch.tensor([[0, 2, 2, 10], [5, 5, 1, 0]])
    assert_same(model if dropout == 0 or dtype == torch.float32 else model.eval(), tokens)


def test_tinylora_embedding_whose_look_up_shortens_rows_is_left_to_peft():
    model, _ = tiny_embedding(max_norm=1.0)
    assert accelerate(model).skipped == [("base_model.model.0", "its embedding has max_norm")]


def test_tinylora_embedding_merged_and_disabled():
    model, _ = tiny_embedding()
    accelerate(model)
    tokens = torch.arange(11)
    model.base_model.model[0].tinylora_v["default"]["0"].data.fill_(0.5)
    before = model(tokens)
    with model.disable_adapter():
        assert not torch.allclose(model(tokens), before)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), before)


def test_vblora_with_frozen_vectors_does_not_train():
    config = VBLoRAConfig(r=3, num_vectors=6, vector_length=4, target_modules=["first"])
    model = get_peft_model(Model("Linear"), config)
    accelerate(model)
    model.base_model.model.first.vblora_logits_A["default"].data[0, 0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        model.train()(torch.ones(2, 12))


def test_gralora_with_a_lora_beside_the_blocks_is_left_to_peft():
    config = GraloraConfig(r=4, hybrid_r=2, target_modules=["first"])
    report = accelerate(get_peft_model(Model("Linear"), config))
    assert report.skipped[0][1] == "adapter 'default' has a hybrid_r, a LoRA beside the blocks"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "paths", [("constant", "none", "vector"), ("none", "lora", "none"), ("lora", "none", "none")]
)
def test_glora_of_single_paths(paths, bias, several):
    torch.manual_seed(0)
    options = dict(zip(("config_A_B", "config_C", "config_D_E"), paths, strict=True))
    config = GloraConfig(r=2, target_modules=["0"], init_weights=False, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Linear(5, 4)), config)
    model.base_model.model[1].weight.requires_grad_()
    if several:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    assert len(accelerate(model).accelerated) == 1
    assert_same(model, torch.linspace(-1, 1, 18).view(3, 6))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"decomposition_method": "qr", "alpha": 5}, {"para": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_deft_of_few_rows_and_of_many(rows, options, bias, several):
    """PEFT computes it in float32 whatever the model is in: so its formula, too, in float64."""
    torch.manual_seed(0)
    config = DeftConfig(r=2, target_modules=["0"], init_weights=False, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5, bias=bias)), config).double()
    if several:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    accelerate(model.double())
    layer = model.base_model.model[0]
    assert _is_few(torch.empty(rows, 8), layer.base_layer.weight) == (rows == 1)

    def by_formula(x):
        y, weight = layer.base_layer(x), layer.base_layer.weight
        for name in layer.active_adapters:
            given, taken = layer._project(layer.deft_P[name], name)
            put = 0 if config.para else layer.deft_R[name] * layer.deft_scaling[name]
            y = y + x @ (put - taken.double().T @ weight).T @ given.double().T
        return y

    x = torch.linspace(-1, 1, rows * 8, dtype=torch.float64).view(rows, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, wanted = ([y, *torch.autograd.grad(y.square().sum(), trained)] for y in (model(x), by_formula(x)))
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_osf_gradients_are_projected_by_pefts_hooks():
    model = get_peft_model(Model("Linear"), OSFConfig(effective_rank=3, target_modules=["first"]))
    x = torch.linspace(-1, 1, 48).view(4, 12)
    theirs = results(model, x)
    assert len(accelerate(model).accelerated) == 1
    for found, wanted in zip(results(model, x), theirs, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("rows", "kind"), [(2, LowRank), (64, Dense)])
def test_what_is_as_wide_as_the_weight_is_added_to_it_where_rows_are_many(rows, kind):
    lora_a, lora_b = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert type(product(torch.randn(rows, 10), 0.0, (lora_b, lora_a))) is kind
    assert type(product(torch.randn(rows, 10).bfloat16(), 0.0, (lora_b, lora_a))) is LowRank


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [((256, 512, 512, 480), Dense), ((256, 512, 1408, 480), Branched), ((2048, 512, 512, 256), Dense)],
)
def test_the_faster_way_measured_for_a_pair_beside_a_constant_one(sizes, kind):
    """Measured: 0.70 against 0.78 x PEFT's, 0.83 against 1.01, 0.44 against 0.88."""
    rows, width, out, r = sizes
    pairs = [(torch.empty(out, r), torch.empty(r, width)) for _ in range(2)]
    for factor in pairs[0]:
        factor.requires_grad_()
    assert type(moved(torch.empty(rows, width, requires_grad=True), *pairs)) is kind


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [((256, 512, 512), LowRank), ((256, 512, 1408), LowRank), ((2048, 512, 512), Dense)],
)
def test_the_faster_way_measured_for_a_base_scaled_on_its_small_side(sizes, kind):
    """Measured: 0.95 against 1.00 x PEFT's, 0.94 against 1.35, 0.50 against 0.97."""
    rows, width, out = sizes
    pair = torch.empty(out, width), torch.empty(width, width, requires_grad=True)
    assert type(product(torch.empty(rows, width, requires_grad=True), 0.0, pair)) is kind
