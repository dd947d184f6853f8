"""accelerate() on convolutions of PEFT's LoHa, LoKr and HiRA: PEFT's numbers, gradients and API."""

import copy
import itertools
import pickle

import pytest
import torch
from peft import HiraConfig, LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from torch import nn

from lora_kernels.integrations.peft import TAKEOVERS, accelerate, decelerate
from lora_kernels.testing import assert_close

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYOUTS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "of one": {"kernel_size": 1, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
}
CASES = {
    "loha": (LoHaConfig, {"r": 3}, (1, 2)),
    "loha effective": (LoHaConfig, {"r": 2, "use_effective_conv2d": True}, (2,)),
    "lokr": (LoKrConfig, {"r": 1, "decompose_both": True}, (1, 2)),
    "lokr whole": (LoKrConfig, {"r": 8}, (2,)),
    "hira": (HiraConfig, {"r": 3}, (1, 2, 3)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CELLS = [
    (tuner, dims, layout, dtype, several)
    for tuner in CASES
    for dims, layout, dtype, several in itertools.product(CASES[tuner][2], LAYOUTS, DTYPES, (False, True))
    # PEFT takes that for a convolution of two dimensions, and fails.
    if (tuner, dims, layout) != ("hira", 3, "of one")
]


def wrapped(tuner, dims, layout="plain", several=False, **more):
    torch.manual_seed(0)
    make, options, _ = CASES[tuner]
    config = make(target_modules=["0"], **options, **more)
    model = get_peft_model(nn.Sequential(CONVS[dims](4, 6, **LAYOUTS[layout]), nn.Tanh()), config)
    if several:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    return model


def run(model, dtype=torch.float32, samples=2):
    """y and every gradient, what is drawn from the same seed."""
    torch.manual_seed(3)
    conv = model.base_model.model[0].base_layer
    shape = (samples, 4, *[7] * (conv.weight.dim() - 2))
    x = torch.linspace(-9, 9, torch.Size(shape).numel(), dtype=torch.float64).sin().view(shape).to(dtype)
    x.requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), trained)]


def of_peft(model):
    model = copy.deepcopy(model)
    decelerate(model)
    return model


def assert_same_as_peft(model, dtype=torch.float32):
    peft = of_peft(model)
    ours, eager, exact = run(model, dtype), run(peft, dtype), run(copy.deepcopy(peft).double(), torch.float64)
    for at, each in enumerate(zip(ours, eager, exact, strict=True)):
        assert_close(*each, f"result {at}", ulps=4.0)


@pytest.mark.spread("cell", of=4)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_y_and_every_gradient_are_pefts(cell):
    tuner, dims, layout, dtype, several = cell
    model = wrapped(tuner, dims, layout, several).to(dtype)
    report = accelerate(model)
    assert report.accelerated == ["base_model.model.0"] and not report.skipped, str(report)
    assert_same_as_peft(model, dtype)


@pytest.mark.parametrize("tuner", CASES)
def test_pefts_api_goes_on_working(tuner, tmp_path):
    model = wrapped(tuner, 2)
    accelerate(model)
    x = torch.linspace(-2, 2, 400).sin().view(4, 4, 5, 5)
    before, frozen = model(x), torch.tanh(model.base_model.model[0].base_layer(x))
    with model.disable_adapter():
        assert torch.equal(model(x), frozen) and not torch.allclose(frozen, before)
    merged = copy.deepcopy(model)
    for change in (merged.merge_adapter, merged.unmerge_adapter):
        change()
        torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model.base_model.model))(x), before)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh()), tmp_path)
    accelerate(fresh)
    torch.testing.assert_close(fresh(x), before)
    assert decelerate(model) == 1 and type(model.base_model.model[0]) in TAKEOVERS


@pytest.mark.parametrize("tuner", CASES)
def test_no_samples(tuner):
    model = wrapped(tuner, 2)
    accelerate(model)
    y, dx, *grads = run(model, samples=0)
    assert y.shape == (0, 6, 5, 5) and dx.shape == (0, 4, 7, 7) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("tuner", ["loha", "lokr"])
def test_rank_dropout_takes_pefts_rows(tuner):
    model = wrapped(tuner, 2, rank_dropout=0.4).train()
    accelerate(model)
    assert_same_as_peft(model)
    assert any((grad.flatten(1) == 0).all(-1).any() for grad in run(model)[2:])


def test_dropout_of_x_is_pefts():
    model = wrapped("hira", 2, hira_dropout=0.4).train()
    accelerate(model)
    torch.testing.assert_close(run(model), run(of_peft(model)), rtol=0, atol=0)
    assert_same_as_peft(model.eval())


def test_one_convolution_and_what_it_keeps():
    model = wrapped("loha", 2)
    accelerate(model)
    kept = {}
    for name, one in (("ours", model), ("peft", of_peft(model))):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, n=name: kept.setdefault(n, []).append(t) or t, lambda t: t
        ):
            run(one)
    sizes = {
        name: sum(t.numel() for t in {t.data_ptr(): t for t in of}.values()) for name, of in kept.items()
    }
    assert sizes["ours"] <= sizes["peft"]


@pytest.mark.parametrize("tuner", CASES)
def test_autocast_compiled_and_checkpointed(tuner):
    model = wrapped(tuner, 2)
    peft = copy.deepcopy(model)
    accelerate(model)
    x = torch.linspace(-2, 2, 400).sin().view(4, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(x), peft(x)
    assert ours.dtype == theirs.dtype
    assert_close(ours.bfloat16(), theirs.bfloat16(), copy.deepcopy(peft).double()(x.double()), ulps=4.0)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(model))
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(again, model(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer: setattr(layer.base_layer, "padding_mode", "reflect"),
            "its convolution has a padding mode",
        ),
        (
            lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
            "it has forward or backward hooks inside",
        ),
        (lambda layer: layer.module_dropout.update(default=0.5), "adapter 'default' has module_dropout"),
    ],
)
def test_what_is_left_to_peft(change, reason):
    model = wrapped("loha", 2)
    change(model.base_model.model[0])
    assert accelerate(model).skipped == [("base_model.model.0", reason)]
