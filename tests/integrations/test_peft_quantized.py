"""accelerate() on bitsandbytes' layers: PEFT's numbers, PEFT's API, and the packed weight left in place."""

import contextlib
import copy
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear as PeftLinear
from peft_runs import assert_same_when_checkpointed, randomise, run
from test_peft import FixedDropout
from torch import nn

import lora_kernels.nn.groups as groups
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.quant import from_bitsandbytes
from lora_kernels.reference.dropout import dropout_mask
from lora_kernels.testing import assert_close

bnb = pytest.importorskip("bitsandbytes")
peft_bnb = pytest.importorskip("peft.tuners.lora.bnb")
QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
# Rows of whole blocks: else bitsandbytes' CPU code, unlike its CUDA code, takes a block to end with the row.
SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with biases on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(**SIZES, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(saved):
    """Loads it as users do, by default with NF4 weights."""

    def load(dtype=torch.float32, compute=torch.float32, **options):
        if not options.get("load_in_8bit"):
            options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
            options["bnb_4bit_compute_dtype"] = compute
        config = transformers.BitsAndBytesConfig(**options)
        return transformers.AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=config, device_map="cpu", dtype=dtype
        )

    return load


def wrap(model, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    model = get_peft_model(model, LoraConfig(**options))
    randomise(model)
    return model.train()


def dequantized(base):
    """What bitsandbytes says W is, as an ``nn.Linear`` in float64."""
    linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
    if isinstance(base, bnb.nn.Linear4bit):
        state = copy.deepcopy(base.weight.quant_state)
        state.dtype = torch.float32
        weight = bnb.functional.dequantize_4bit(base.weight.data, state)
    else:
        stats = base.weight.SCB if base.state.SCB is None else base.state.SCB
        weight = bnb.functional.int8_vectorwise_dequant(base.weight.data, stats)
    linear.weight.data = weight
    if base.bias is not None:
        linear.bias.data = base.bias.data
    return linear.requires_grad_(False)


def exact(model):
    """PEFT's own dense layers on the dequantised weights, in float64."""
    model = copy.deepcopy(model)
    decelerate(model)
    for layer in model.modules():
        if isinstance(getattr(layer, "base_layer", None), QUANTIZED):
            layer.__class__ = PeftLinear
            layer.base_layer = dequantized(layer.base_layer)
    return model.double()


def assert_same_as_peft(model, tokens, autocast=None):
    """In float32 each tensor; in a half type, whose noise every layer passes on, the sum of all errors."""
    eager_model = copy.deepcopy(model)
    decelerate(eager_model)
    ours, eager = run(model, tokens, autocast), run(eager_model, tokens, autocast)
    truth = run(exact(model), tokens)
    assert ours.keys() == eager.keys() == truth.keys()
    half = autocast or any(p.dtype == BF16 for p in model.parameters())
    for name in ours:
        assert ours[name].dtype == eager[name].dtype, name
        if not half:
            assert_close(ours[name], eager[name], truth[name], name, ulps=4.0)
    assert distance(ours, truth) <= 2 * distance(eager, truth)


def distance(got, truth):
    shares = [(got[name].double() - truth[name]).norm() / truth[name].norm() for name in truth]
    return torch.stack(shares).square().mean().sqrt()


F32, BF16 = torch.float32, torch.bfloat16
# Of x, what bitsandbytes computes in, autocast's.
DTYPES = [
    (F32, F32, None),
    (BF16, BF16, None),
    (BF16, F32, None),  # Transformers' default for a bfloat16 model
    (F32, BF16, None),
    (F32, BF16, BF16),
    (F32, F32, BF16),
]


@pytest.mark.parametrize(("dtype", "compute", "autocast"), DTYPES)
def test_outputs_and_all_gradients_are_pefts(llama, tokens, dtype, compute, autocast):
    model = wrap(llama(dtype, compute, bnb_4bit_use_double_quant=compute == BF16))
    report = accelerate(model)
    assert len(report.accelerated) == 2 * 7 and not report.skipped
    assert not any(type(layer) is peft_bnb.Linear4bit for layer in model.modules())
    assert_same_as_peft(model, tokens, autocast)


@pytest.mark.parametrize("autocast", [None, BF16])
def test_layers_that_share_an_input_are_one_call(llama, tokens, autocast, monkeypatch):
    calls, real = [], groups.fused_group
    monkeypatch.setattr(groups, "fused_group", lambda members: (calls.append(len(members)), real(members))[1])
    model = wrap(llama(BF16 if autocast else F32, autocast or F32), lora_dropout=0.3)
    report = accelerate(model)
    assert [len(group) for group in report.groups] == [3, 2] * 2 and not report.mlps
    torch.manual_seed(3)
    got = run(model, tokens, autocast)
    assert calls == [3, 2] * 2
    groups.ungroup_layers(model)
    torch.manual_seed(3)
    alone = run(model, tokens, autocast)
    assert len(calls) == 4
    dense = exact(model)
    accelerate(dense)  # for the same masks
    groups.ungroup_layers(dense)
    torch.manual_seed(3)
    truth = run(dense, tokens)
    assert distance(got, truth) <= 2 * distance(alone, truth)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "compute", "autocast"), DTYPES)
def test_a_layer_is_pefts(dtype, compute, autocast, bias, rows):
    layer = one_layer(bias=bias, compute_dtype=compute)
    if (dtype, autocast) == (BF16, None):
        layer.to(BF16)  # adapters wider than x are cast to its dtype, PEFT casts x to theirs
    eager, truth = copy.deepcopy(layer), exact(layer)
    accelerate(layer)
    x, found = torch.randn(2, rows, 128).to(dtype), []
    weights = torch.linspace(-1, 1, 80 * rows).view(2, rows, 40).to(dtype)
    for one in (layer, eager, truth):
        wide = next(one.parameters()).dtype == torch.float64
        v, w = (t.double() if wide else t for t in (x, weights))
        v.requires_grad_()
        with torch.autocast("cpu", autocast) if autocast and not wide else contextlib.nullcontext():
            y = one(v)
        inputs = (v, one.lora_A["default"].weight, one.lora_B["default"].weight)
        found.append([y, *torch.autograd.grad((y * w).sum(), inputs)])
    for got, want, best in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, best, ulps=4.0)


@pytest.mark.parametrize("autocast", [None, BF16])
def test_a_model_prepared_for_training(llama, tokens, autocast):
    model = prepare_model_for_kbit_training(
        llama(BF16, BF16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = wrap(model)
    assert len(accelerate(model).accelerated) == 14
    assert_same_as_peft(model, tokens, autocast)


def test_int8_in_training_is_pefts(llama, tokens):
    model = wrap(llama(load_in_8bit=True))
    assert len(accelerate(model).accelerated) == 14
    assert_same_as_peft(model, tokens)


def test_int8_in_inference_is_closer_to_the_dense_layer(llama, tokens):
    model = wrap(llama(load_in_8bit=True)).eval()
    plain, truth = copy.deepcopy(model), exact(model)
    accelerate(model)
    with torch.no_grad():
        ours, peft, dense = (m(input_ids=tokens).logits for m in (model, plain, truth))
    assert (ours - dense).norm() < 0.1 * (peft - dense).norm()


def one_layer(kind="Linear4bit", bias=True, config=None, **options):
    """PEFT's layer over one of bitsandbytes'."""
    torch.manual_seed(0)
    defaults = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
    base = getattr(bnb.nn, kind)(128, 40, bias, **{**defaults, **options}).to("cpu")
    config = LoraConfig(r=3, lora_alpha=6, **(config or {}))
    loaded = {"loaded_in_4bit": True, "loaded_in_8bit": True}
    dispatch = peft_bnb.dispatch_bnb_4bit if kind == "Linear4bit" else peft_bnb.dispatch_bnb_8bit
    layer = dispatch(base, "default", config, r=3, lora_alpha=6, **loaded)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer.train()


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_packed_weight_is_read_in_place(storage, double_quant):
    layer = one_layer(quant_storage=storage, compress_statistics=double_quant)
    plain = copy.deepcopy(layer)
    assert len(accelerate(layer).accelerated) == 1
    base = layer.base_layer
    assert from_bitsandbytes(base).codes.data_ptr() == base.weight.data_ptr()
    x = torch.randn(33, 128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved = []
        layer(x.requires_grad_())
    packed = {t.data_ptr() for t in saved if t.dtype == torch.uint8}
    assert base.weight.data_ptr() in packed
    assert all(t.numel() < 128 * 40 for t in saved), "nothing dense is kept"
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("rows", [1, 33])
def test_dropout_with_a_known_mask(kind, rows):
    p = 0.3
    layer = one_layer(kind, config={"lora_dropout": p})
    plain, x = copy.deepcopy(layer), torch.randn(rows, 128, requires_grad=True)
    torch.manual_seed(2)
    seed = torch.empty(1, dtype=torch.int64).random_()
    plain.lora_dropout["default"] = FixedDropout(dropout_mask(seed, rows, 128, p), p)
    accelerate(layer)
    found = []
    for one in (layer, plain):
        torch.manual_seed(2)
        y = one(x)
        inputs = (x, one.lora_A["default"].weight, one.lora_B["default"].weight)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dropout_averages_to_no_dropout():
    layer = one_layer(config={"lora_dropout": 0.5})
    accelerate(layer)
    x = torch.randn(1, 128).expand(20000, -1)
    expected = layer.eval()(x[:1])
    y = layer.train()(x)
    assert ((y.mean(0) - expected).abs() <= 5 * y.std(0) / 20000**0.5 + 1e-5).all()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_adapters(llama, tokens, dropout):
    model = wrap(llama(), lora_dropout=dropout)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    model.base_model.set_adapter(["default", "other"])
    accelerate(model)
    assert_same_as_peft(model.eval() if dropout else model, tokens)
    model.set_adapter("other")
    assert_same_as_peft(model, tokens)


@pytest.mark.parametrize(("dtype", "compute"), [(F32, F32), (BF16, BF16)])
def test_dora_is_pefts(llama, tokens, dtype, compute):
    model = wrap(llama(dtype, compute), use_dora=True, target_modules=["q_proj", "down_proj"])
    report = accelerate(model)
    assert len(report.accelerated) == 4 and not report.skipped
    assert_same_as_peft(model, tokens)


@torch.no_grad()
def test_a_mixed_batch_and_a_disabled_adapter_are_pefts(llama, tokens):
    model = wrap(llama()).eval()
    plain = copy.deepcopy(model)
    accelerate(model)
    for options in ({"adapter_names": ["default", "__base__"]}, {}):
        got, want = model(input_ids=tokens, **options), plain(input_ids=tokens, **options)
        torch.testing.assert_close(got.logits, want.logits)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_gradient_checkpointing(llama, tokens):
    model = wrap(llama(), lora_dropout=0.5)
    accelerate(model)
    assert_same_when_checkpointed(model, tokens)


def test_save_reload_and_merge(llama, tokens, tmp_path):
    model = wrap(llama())
    plain = copy.deepcopy(model)
    accelerate(model)
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path).train()
    torch.testing.assert_close(reloaded(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
    for m in (model, plain):
        m.base_model.merge_adapter()
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_copies_and_the_way_back(llama, tokens):
    model = wrap(llama())
    before = [type(m) for m in model.modules()]
    accelerate(model)
    expected = model(input_ids=tokens).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=tokens).logits, expected)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 128)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert decelerate(model) == 14
    assert [type(m) for m in model.modules()] == before


def test_torch_compile_traces_a_layer_whole():
    layer = one_layer(compute_dtype=F32)
    accelerate(layer)
    x = torch.randn(33, 128)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def replace_forward(layer):
    layer.base_layer.forward = layer.base_layer.forward


def pack(layer):
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True


class OwnForward(bnb.nn.LinearNF4):
    def forward(self, x):
        return super().forward(x) + 1


def own_forward(layer):
    layer.base_layer.__class__ = OwnForward


@pytest.mark.parametrize(
    ("reason", "options", "change"),
    [
        ("quant_type is 'fp4'", {"quant_type": "fp4"}, None),
        ("forward of its base layer was replaced", {}, replace_forward),
        ("packed for bitsandbytes' own CPU kernels", {}, pack),
        ("a OwnForward with a forward that is not bitsandbytes'", {}, own_forward),
        ("not quantised", {"kind": "Linear8bitLt", "has_fp16_weights": True}, None),
    ],
)
def test_what_stays_pefts_says_why(reason, options, change):
    layer = one_layer(**options)
    if change:
        change(layer)
    report = accelerate(layer)
    assert not report.accelerated
    assert reason in str(report)


def test_what_changes_later_goes_to_peft():
    layer, x = one_layer(), torch.randn(5, 128)
    accelerate(layer)
    seen = []
    layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(1))
    layer(x)
    own_forward(layer)
    layer.base_layer.register_forward_hook(lambda *args: seen.append(2))
    layer(x)
    assert seen == [1, 2, 1]
