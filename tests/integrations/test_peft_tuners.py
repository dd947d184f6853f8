"""accelerate() on PEFT's tuners beside LoRA: PEFT's numbers, gradients and API."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft_tuner_cases import CASES
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft import TAKEOVERS, accelerate, decelerate
from lora_kernels.reference.dropout import dropout_apply, dropout_mask
from lora_kernels.testing import assert_close
from lora_kernels.testing.peft_tuners import DenseBlocks

ROWS, WIDTH = 7, 12


def test_pefts_c3a_gets_the_gradient_of_x_wrong():
    """So that conftest.py compares with it again once it is right."""
    x, kernel = torch.randn(2, 8, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    x.requires_grad_()
    found, right = (
        torch.autograd.grad(one.apply(x, kernel).square().sum(), x)[0]
        for one in (BlockCircularConvolution, DenseBlocks)
    )
    assert not torch.allclose(found, right)


class Model(nn.Module):
    """Two linears in a row, of whichever kind."""

    def __init__(self, kind):
        super().__init__()
        self.first = nn.Linear(WIDTH, 8) if kind == "Linear" else Conv1D(8, WIDTH)
        self.second = nn.Linear(8, WIDTH) if kind == "Linear" else Conv1D(WIDTH, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class FixedDropout(nn.Module):
    """Dropout by what it made of ones."""

    def __init__(self, ones):
        super().__init__()
        self.ones = ones

    def forward(self, x):
        return x * self.ones.to(x.dtype).view(x.shape)


def wrapped(case, kind="Linear", dropout=0.0, targets=("first", "second"), **more):
    torch.manual_seed(0)
    options = dict(case.options) | more | ({case.dropout: dropout} if case.dropout else {})
    if kind == "Conv1D" and "fan_in_fan_out" in case.config.__dataclass_fields__:
        options["fan_in_fan_out"] = True
    config = case.config(target_modules=list(targets), **options)
    return shaken(get_peft_model(Model(kind), config), config)


def shaken(model, config):
    """With no tensor at a start of zeros; it remembers its config for a second adapter."""
    model.made_of = config
    without_hooks(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def without_hooks(model):
    """OSF's parameters have some, which those of a copy have not."""
    for layer in model.modules():
        if hasattr(layer, "_detach_hooks"):
            layer._detach_hooks()


def run(model, dtype):
    x = torch.linspace(-2, 2, ROWS * WIDTH, dtype=torch.float64).sin().view(ROWS, WIDTH).to(dtype)
    x.requires_grad_()
    y = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
    grads = torch.autograd.grad((y * weights).sum(), [x, *trained.values()], allow_unused=True)
    found = dict(zip(["x", *trained], grads, strict=True))
    return {"y": y.detach()} | {name: g for name, g in found.items() if g is not None}


def layers_of(model):
    ours = {one.fused for one in TAKEOVERS.values()}
    return [m for m in model.modules() if type(m) in TAKEOVERS or type(m) in ours]


def assert_same_as_peft(model, dtype, prepared=lambda model: model):
    """Ours against PEFT's own forward, both against PEFT's in fp64."""
    without_hooks(model)
    peft, exact_peft = copy.deepcopy(model), copy.deepcopy(model).double()
    for one in (peft, exact_peft):
        decelerate(one)
    eager, exact = run(prepared(peft), dtype), run(prepared(exact_peft), torch.float64)
    ours = run(model, dtype)
    assert ours.keys() == eager.keys()
    for name in ours:
        assert_close(ours[name], eager[name], exact[name], name, ulps=4.0)


@pytest.mark.parametrize("tuner", CASES)
def test_no_rows(tuner):
    model = wrapped(CASES[tuner])
    accelerate(model)
    x = torch.randn(0, 3, WIDTH, requires_grad=True)
    y = model(x)
    assert y.shape[:-1] == x.shape[:-1]
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tuner", "kind"), [(name, kind) for name in CASES for kind in CASES[name].kinds])
def test_outputs_and_gradients_are_pefts(tuner, kind, dtype):
    case = CASES[tuner]
    if case.half_exact and dtype == torch.float64:
        pytest.skip("PEFT computes in float32")
    model = wrapped(case, kind).to(dtype)
    report = accelerate(model)
    assert len(report.accelerated) == 2 and not report.skipped, str(report)
    assert [type(layer) for layer in layers_of(model)] == [case.fused] * 2
    assert_same_as_peft(model, dtype)


@pytest.mark.parametrize("tuner", [name for name, case in CASES.items() if case.dropout])
def test_dropout_is_pefts_but_for_the_bits(tuner):
    case, p = CASES[tuner], 0.4
    model = wrapped(case, dropout=p, targets=["first"]).train()
    accelerate(model)
    torch.manual_seed(2)
    ones = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    if case.torch_dropout:
        ones = torch.nn.functional.dropout(ones.float(), p).double()
    else:
        seed = torch.empty(1, dtype=torch.int64).random_()
        ones = dropout_apply(ones, dropout_mask(seed, ROWS, WIDTH, p), p)

    def fixed(peft):
        for layer in layers_of(peft):
            getattr(layer, case.fused.dropouts)["default"] = FixedDropout(ones)
        return peft

    torch.manual_seed(2)
    assert_same_as_peft(model, torch.float32, fixed)


class Pair(nn.Module):
    """Two linears that read one x, as query and key do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.first(x) * self.second(x)


@pytest.mark.parametrize("tuner", CASES)
def test_layers_that_share_an_input_make_each_update_once(tuner, monkeypatch):
    """What draws would draw once more than PEFT, and all of it would be for nothing."""
    case = CASES[tuner]
    torch.manual_seed(0)
    config = case.config(target_modules=["first", "second"], **case.options)
    model = shaken(get_peft_model(Pair(), config), config)
    accelerate(model)
    made = []

    def counted(layer, *args, update=case.fused.update, **read):
        made.append(layer)
        return update(layer, *args, **read)

    monkeypatch.setattr(case.fused, "update", counted)
    run(model, torch.float32)
    assert len(made) == 2
    assert_same_as_peft(model, torch.float32)


def without_grad(model):
    with torch.no_grad():
        return model(torch.linspace(-2, 2, ROWS * WIDTH).sin().view(ROWS, WIDTH))


def with_another(model):
    """A second adapter, accelerated too; PEFT's AdaLoRA wants all but one of them not to be trained."""
    config = copy.deepcopy(model.made_of)
    config.inference_mode = config.peft_type == "ADALORA"
    model.add_adapter("other", config)
    accelerate(shaken(model, model.made_of))


@pytest.mark.parametrize("tuner", [name for name, case in CASES.items() if not case.adds_up])
def test_several_adapters_are_what_they_are_merged(tuner):
    model = wrapped(CASES[tuner])
    with_another(model)
    model.base_model.set_adapter(["default", "other"])
    found = without_grad(model)
    model.merge_adapter()
    torch.testing.assert_close(without_grad(model), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuner", [name for name, case in CASES.items() if case.adds_up])
def test_several_adapters_are_pefts(tuner):
    model = wrapped(CASES[tuner])
    with_another(model)
    model.base_model.set_adapter(["default", "other"])
    assert_same_as_peft(model, torch.float32)
    model.base_model.set_adapter("other")
    assert_same_as_peft(model, torch.float32)


@pytest.mark.parametrize("tuner", CASES)
def test_pefts_api_goes_on_working(tuner):
    """Disabled, merged and not again, copied, pickled, given back."""
    model = wrapped(CASES[tuner]).eval()
    accelerate(model)
    before = without_grad(model)
    with model.disable_adapter():
        assert not torch.allclose(without_grad(model), before)
    merged = copy.deepcopy(model)
    changes = (merged.merge_adapter, merged.unmerge_adapter)
    for change in changes if CASES[tuner].unmerges else changes[:1]:
        change()
        torch.testing.assert_close(without_grad(merged), before, rtol=1e-4, atol=1e-4)
    again = pickle.loads(pickle.dumps(model.base_model.model))
    torch.testing.assert_close(without_grad(again), before)
    assert decelerate(model) == 2
    assert all(TAKEOVERS[type(layer)].fused is CASES[tuner].fused for layer in layers_of(model))


@pytest.mark.parametrize("tuner", CASES)
def test_what_listens_inside_is_left_to_peft(tuner):
    model = wrapped(CASES[tuner])
    model.base_model.model.first.base_layer.register_forward_hook(lambda *_: None)
    report = accelerate(model)
    assert report.skipped == [("base_model.model.first", "it has forward or backward hooks inside")]


def assert_draws_as_peft(model):
    """The same seed gives the same numbers; our outcome."""
    accelerate(model)

    def run_at(model, dtype):
        torch.manual_seed(3)
        return run(model.to(dtype), dtype)

    peft = copy.deepcopy(model)
    decelerate(peft)
    eager, exact = run_at(peft, torch.float32), run_at(copy.deepcopy(peft), torch.float64)
    ours = run_at(model, torch.float32)
    for name in ours:
        assert_close(ours[name], eager[name], exact[name], name, ulps=4.0)
    return ours


@pytest.mark.parametrize("tuner", ["loha", "loha of rank 1", "lokr"])
def test_rank_dropout_takes_pefts_rows(tuner):
    ours = assert_draws_as_peft(wrapped(CASES[tuner], rank_dropout=0.4).train())
    assert any((grad == 0).all(-1).any() for grad in ours.values())


def test_boft_drops_pefts_blocks():
    ours = assert_draws_as_peft(wrapped(CASES["boft"], boft_dropout=0.5).train())
    assert any((grad == 0).all((-1, -2)).any() for name, grad in ours.items() if "boft_R" in name)


def test_module_dropout_is_left_to_peft():
    model = wrapped(CASES["loha"], module_dropout=0.5)
    assert accelerate(model).skipped[0][1] == "adapter 'default' has module_dropout"


@pytest.mark.parametrize("tuner", CASES)
def test_autocast_is_pefts(tuner):
    def in_bf16(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, torch.float32)

    model = wrapped(CASES[tuner])
    peft = copy.deepcopy(model)
    accelerate(model)
    ours, eager, exact = in_bf16(model), in_bf16(peft), run(peft.double(), torch.float64)
    assert ours.keys() == eager.keys()
    for name in ours:
        assert ours[name].dtype == eager[name].dtype
        assert_close(ours[name].bfloat16(), eager[name].bfloat16(), exact[name], name, ulps=4.0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("tuner", CASES)
def test_gradient_checkpointing(tuner, reentrant):
    model = wrapped(CASES[tuner])
    accelerate(model)
    x = torch.linspace(-2, 2, ROWS * WIDTH).sin().view(ROWS, WIDTH).requires_grad_()

    def grads(call):
        model.zero_grad()
        call().square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = grads(lambda: model(x))
    again = grads(lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(again, plain)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tuner", [name for name, case in CASES.items() if case.compiles])
def test_compiled_whole(tuner):
    model = wrapped(CASES[tuner])
    accelerate(model)
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    plain, found = run(model, torch.float32), run(compiled, torch.float32)
    torch.testing.assert_close(found, plain)
