"""accelerate() on every tuner of PEFT beside what else touches its models, LoRA and DoRA among them.

States and dtypes as a matrix, mixed batches, merging for good, sums of adapters, files, training, sharding.
"""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel, get_peft_model
from peft_tuner_cases import CASES, Case
from test_peft_tuners import (
    ROWS,
    WIDTH,
    FixedDropout,
    Model,
    assert_same_as_peft,
    layers_of,
    run,
    shaken,
    with_another,
    without_grad,
    wrapped,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

from lora_kernels.adapters.structured import fourierft as structured
from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.integrations.tuners import fourierft
from lora_kernels.reference.dropout import dropout_apply, dropout_mask

EVERY = {
    "lora": Case("lora", {"r": 3, "lora_alpha": 5}, "lora_dropout"),
    "dora": Case("dora", {"r": 3, "use_dora": True}, "lora_dropout"),
    **CASES,
}
KINDS = [(tuner, kind) for tuner, case in EVERY.items() for kind in case.kinds]


def accelerated(tuner, *options, **more):
    model = wrapped(EVERY[tuner], *options, **more)
    accelerate(model)
    return model


def of_peft(model):
    model = copy.deepcopy(model)
    decelerate(model)
    return model


def ones_dropped(case, p, dtype):
    """What the dropout of the next call, on x of that dtype, makes of ones."""
    ones = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    if case.torch_dropout:
        return nn.functional.dropout(ones.to(dtype), p).double().clamp_max(1) / (1 - p)
    seed = torch.empty(1, dtype=torch.int64).random_()
    return dropout_apply(ones, dropout_mask(seed, ROWS, WIDTH, p), p)


def in_state(model, state):
    if state == "merged":
        with torch.no_grad():  # what PEFT's DeFT keeps for unmerging has no copy else
            model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    return model


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CELLS = [
    (tuner, kind, dtype, p, state)
    for (tuner, kind), dtype, state in itertools.product(KINDS, DTYPES, ["active", "merged", "disabled"])
    for p in ([0.0, 0.4] if EVERY[tuner].dropout else [0.0])
    if not (EVERY[tuner].half_exact and dtype == torch.float64)
]


@pytest.mark.spread("cell", of=7)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_each_cell_is_pefts(cell):
    tuner, kind, dtype, p, state = cell
    case = EVERY[tuner]
    model = accelerated(tuner, kind, p, targets=["first"]).to(dtype).train()
    in_state(model, state)
    torch.manual_seed(2)
    ones = ones_dropped(case, p, dtype)

    def fixed(peft):
        for layer in layers_of(peft) if p else []:
            getattr(layer, getattr(case.fused, "dropouts", "lora_dropout"))["default"] = FixedDropout(ones)
        return peft

    torch.manual_seed(2)
    assert_same_as_peft(model, dtype, fixed)


@pytest.mark.parametrize(("tuner", "kind"), KINDS)
def test_merged_for_good(tuner, kind):
    """``merge_and_unload`` leaves the model's own layers, ``unload`` those as they were."""
    model = accelerated(tuner, kind).eval()
    want = without_grad(model)
    base = without_grad(of_peft(model).unload())
    merged, rest = copy.deepcopy(model).merge_and_unload(), model.unload()
    assert [type(layer) for layer in merged.children()] == [type(layer) for layer in Model(kind).children()]
    torch.testing.assert_close(without_grad(merged), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(without_grad(rest), base)


@pytest.mark.parametrize("tuner", EVERY)
def test_files_and_adapters_that_come_later(tuner, tmp_path):
    model = accelerated(tuner).eval()
    want = without_grad(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model("Linear"), tmp_path).eval()
    accelerate(again)
    torch.testing.assert_close(without_grad(again), want)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(without_grad(model.eval()), want)
    assert_same_as_peft(model, torch.float32)
    model.delete_adapter("default")
    torch.testing.assert_close(without_grad(model.eval()), want)


def outcome(call):
    """What it gives, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("tuner", EVERY)
def test_mixed_batches_are_pefts(tuner):
    """Or refused, or one adapter's for all samples, where PEFT's are."""
    model = accelerated(tuner).eval()
    with_another(model)
    names = ["default", "other", "__base__", "other", "default", "default", "__base__"]
    x = torch.randn(ROWS, WIDTH)

    def mixed(model):
        with torch.no_grad():
            return model(x, adapter_names=names)

    ours, theirs = outcome(lambda: mixed(model)), outcome(lambda: mixed(of_peft(model)))
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("tuner", [name for name in EVERY if name in ("lora", "ia3")])
def test_sums_of_adapters_are_pefts(tuner):
    model = accelerated(tuner).eval()
    with_another(model)
    peft = of_peft(model)
    for one in (model, peft):
        one.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum")
        one.set_adapter("sum")
    torch.testing.assert_close(without_grad(model), without_grad(peft))
    assert_same_as_peft(model, torch.float32)


def llama(tuner):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=3))
    case = EVERY[tuner]
    config = case.config(target_modules=["q_proj", "v_proj"], **case.options)
    return shaken(get_peft_model(base, config), config)


def trained(model, folder, steps, resume=False):
    options = {"per_device_train_batch_size": 2, "save_steps": 2, "max_steps": steps, "report_to": []}
    options.update(learning_rate=1e-2, use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True)
    tokens = (torch.arange(8)[:, None] * 5 + torch.arange(6)) % 32
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(str(folder), **options)
    transformers.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tuner", EVERY)
def test_training_after_a_first_call_in_inference_mode(tuner):
    """What a call keeps for later ones serves those with gradients."""
    torch.manual_seed(0)
    model = accelerated(tuner)
    for place in (fourierft._plan, fourierft._positions, structured.places):
        place.cache_clear()
    with torch.inference_mode():
        want = model(torch.ones(ROWS, WIDTH))
    y = model(torch.ones(ROWS, WIDTH))
    y.sum().backward()
    torch.testing.assert_close(y.detach(), want.clone())


TRAINED = [name if name == "vera" else pytest.param(name, marks=pytest.mark.exhaustive) for name in EVERY]


@pytest.mark.parametrize("tuner", TRAINED)
def test_a_resumed_training_is_the_uninterrupted_one(tuner, tmp_path):
    models = [llama(tuner) for _ in range(4)]
    for model in models[1:]:
        accelerate(model)
    plain = trained(models[0], tmp_path / "peft", 3)
    whole = trained(models[1], tmp_path / "whole", 3)
    trained(models[2], tmp_path / "parts", 2)
    resumed = trained(models[3], tmp_path / "parts", 3, resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(plain[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tuner", EVERY)
def test_fully_sharded(tuner, alone):
    """Each layer by itself where they share nothing, and the model: FSDP2's hooks and DTensors."""
    model = accelerated(tuner)
    want = run(model, torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    layers = [model.base_model.model.first, model.base_model.model.second]
    shared = {*layers[0].parameters()} & {*layers[1].parameters()}
    for layer in [model] if shared else [*layers, model]:
        fully_shard(layer, mesh=mesh)
    x = torch.linspace(-2, 2, ROWS * WIDTH, dtype=torch.float64).sin().view(ROWS, WIDTH).float()
    y = model(x.requires_grad_())
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).float()
    (y * weights).sum().backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close({"y": y.detach(), "x": x.grad, **found}, want)


@pytest.mark.parametrize("tuner", [name for name in EVERY if name in ("lora", "dora", "vera", "hira", "ia3")])
def test_over_a_quantised_base_what_is_left_says_why(tuner):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.ModuleDict({"first": bnb.nn.Linear4bit(64, 8, compute_dtype=torch.float32, quant_type="nf4")})
    base.to("cpu").is_loaded_in_4bit = True
    case = EVERY[tuner]
    config = case.config(target_modules=["first"], **case.options)
    model = shaken(get_peft_model(base, config), config).eval()
    layer = model.base_model.model["first"]
    x = torch.randn(5, 64)
    want = layer(x)
    report = accelerate(model)
    assert all(reason for _, reason in report.skipped)
    assert len(report.skipped) + len(report.accelerated) == 1
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
