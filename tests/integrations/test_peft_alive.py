"""PEFT's own machinery over accelerated layers of every kind: hot swaps, status, caches, absent adapters."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_layer_status, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.testing import assert_close
from lora_kernels.testing.peft_tuners import CASES

bnb = pytest.importorskip("bitsandbytes")

# Base layer, and what it is called on.
KINDS = {
    "linear": (lambda: nn.Linear(16, 12), torch.randn(5, 16)),
    "gpt2": (lambda: Conv1D(12, 16), torch.randn(5, 16)),
    "embedding": (lambda: nn.Embedding(16, 12), torch.arange(7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2), torch.randn(2, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), torch.randn(2, 3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), torch.randn(2, 2, 4, 3, 3)),
    "nf4": (
        lambda: _quantized(bnb.nn.Linear4bit(64, 12, compute_dtype=torch.float32, quant_type="nf4")),
        torch.randn(5, 64),
    ),
}
DORA = [kind for kind in KINDS if kind != "nf4"]


def _quantized(layer):
    return layer.to("cpu")


class Two(nn.Module):
    """The layer in question, and another that an adapter may have in its place."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other = KINDS[kind][0](), nn.Linear(4, 4)
        self.is_loaded_in_4bit = kind == "nf4"

    def forward(self, x):
        return self.layer(x), self.other(torch.ones(1, 4).to(self.other.weight))


def config(kind, targets=("layer",), **options):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **options}, fan_in_fan_out=kind == "gpt2"
    )


def peft(kind, **options):
    model = get_peft_model(Two(kind), config(kind, **options)).eval()
    shake(model)
    return model


def shake(model, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            parameter.data = parameter.data * 1.3 + (0.05 if "magnitude" in name else 0.3) * noise


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def assert_is_pefts(model, kind, **options):
    """The accelerated model against itself given back to PEFT."""
    x = KINDS[kind][1]
    ours, plain = model(x)[0], copy.deepcopy(model)
    assert decelerate(plain) > 0
    theirs = plain(x)[0]
    exact = (
        plain.double()(x.double() if x.is_floating_point() else x)[0] if kind != "nf4" else theirs.double()
    )
    assert_close(ours, theirs, exact, kind, ulps=4)


@pytest.mark.parametrize("kind", KINDS)
def test_status_and_repr_are_pefts(kind):
    model = peft(kind)
    before, status = repr(model), get_layer_status(model)
    assert accelerate(model).accelerated
    assert repr(model) == before
    assert get_layer_status(model) == status


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_a_layer_lacks_becomes_active(kind):
    """And comes beside one that it has, and goes again."""
    model = peft(kind)
    accelerate(model)
    x, base = KINDS[kind][1], Two(kind)(KINDS[kind][1])[0]
    model.add_adapter("elsewhere", config(kind, ["other"]))
    shake(model)
    model.set_adapter("elsewhere")
    torch.testing.assert_close(model(x)[0], base)
    model.base_model.set_adapter(["default", "elsewhere"])
    assert_is_pefts(model, kind)
    model.delete_adapter("elsewhere")
    assert_is_pefts(model, kind)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scalings_that_hot_swapping_made_tensors(kind, use_dora):
    if use_dora and kind not in DORA:
        pytest.skip("accelerate leaves it to PEFT")
    model = peft(kind, use_dora=use_dora)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layer_of(model).scaling["default"], torch.Tensor)
    accelerate(model)
    assert_is_pefts(model, kind)
    model.add_adapter("second", config(kind, r=3, lora_alpha=5, use_dora=use_dora))
    shake(model)
    model.base_model.set_adapter(["default", "second"])
    assert_is_pefts(model, kind)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_compiled_model_takes_swapped_adapters_without_compiling_anew(kind, tmp_path):
    """Of another rank and another scale, as diffusers' ``enable_lora_hotswap`` promises."""
    for name, options in (("one", {"r": 4, "lora_alpha": 6}), ("two", {"r": 7, "lora_alpha": 3})):
        model = peft(kind, **options)
        shake(model, seed=len(name) + options["r"])
        model.save_pretrained(tmp_path / name)
    want = {"two": model(KINDS[kind][1])[0]}
    model = peft(kind)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    accelerate(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        hotswap_adapter(model, str(tmp_path / "one"), adapter_name="default")
        first = compiled(KINDS[kind][1])[0]
        frames = counter.frame_count
        hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default")
        second = compiled(KINDS[kind][1])[0]
    assert counter.frame_count == frames
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, want["two"])


@torch.no_grad()
@pytest.mark.parametrize("kind", DORA)
def test_dora_caching_spares_the_norms(kind):
    model, x = peft(kind, use_dora=True), KINDS[kind][1]
    accelerate(model)
    want = model(x)[0]
    with DoraCaching():
        torch.testing.assert_close(model(x)[0], want)
        magnitude = layer_of(model).lora_magnitude_vector["default"]
        norm = magnitude._dora_cache["weight-norm-default"]
        magnitude._dora_cache["weight-norm-default"] = 2 * norm
        assert not torch.allclose(model(x)[0], want), "the kept norm is what counts"
    torch.testing.assert_close(model(x)[0], want)
    assert not magnitude._dora_cache, "a call outside forgets it, as PEFT's does"


class Sparing(nn.Dropout):
    """A dropout of the user's."""


def _dropout(layer):
    layer.lora_dropout["default"] = Sparing(0.5)


def _hook_inside(layer):
    part = layer.lora_A["default"] if layer.lora_A else layer.base_layer
    part.register_forward_hook(lambda *args: None)


def _hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda *args: None)


REASONS = [(_dropout, "Sparing for its dropout"), (_hook_inside, "hooks"), (_hook_on_base, "hooks")]


@pytest.mark.parametrize(("change", "words"), REASONS, ids=lambda one: getattr(one, "__name__", None))
@pytest.mark.parametrize("kind", KINDS)
def test_the_reason_for_a_skipped_layer_is_the_true_one(kind, change, words):
    model = peft(kind)
    change(layer_of(model))
    ((_, reason),) = accelerate(model).skipped
    assert words in reason
    assert ("hooks" in reason) == (change is not _dropout)


@pytest.mark.parametrize("kind", ["linear", "gpt2"])
def test_reasons_that_are_no_hooks(kind):
    model = peft(kind)
    layer_of(model).base_layer.forward = lambda x: x
    with warnings.catch_warnings(record=True):
        assert accelerate(model).skipped[0][1] == "the forward of its base layer was replaced"


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(64, 64), nn.Linear(64, 64)


@pytest.mark.parametrize("kind", CASES)
def test_an_optimiser_made_before_goes_on(kind):
    """Whatever the tuner, the parameters are PEFT's own, taken over and given back."""
    made = CASES[kind].made(4, 64, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(Square(), made)
    before = {name: id(one) for name, one in model.named_parameters()}
    accelerate(model)
    assert {name: id(one) for name, one in model.named_parameters()} == before
    decelerate(model)
    assert {name: id(one) for name, one in model.named_parameters()} == before
