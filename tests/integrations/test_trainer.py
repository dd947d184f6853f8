"""Checkpoints of adapted models under the Transformers Trainer, and under Accelerate."""

from __future__ import annotations

import re

import pytest
import torch

from lora_kernels import LoRAConfig, accelerate, apply_lora, load_adapter
from lora_kernels.nn import lora_state_dict
from lora_kernels.schedules import ReLoRA, as_callback

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from lora_kernels.integrations.trainer import SaveAdapterCallback  # noqa: E402

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TARGETS = ["q_proj", "v_proj"]


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16)
    return transformers.LlamaForCausalLM(config)


def adapted(names=("default",), **options):
    model = base()
    for name in names:
        apply_lora(model, LoRAConfig(r=2, target_modules=TARGETS, **options), name)
    return model


def data():
    tokens = (torch.arange(8)[:, None] * 5 + torch.arange(6)) % 32
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model, folder, steps, callbacks=(), **options):
    options = {
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "max_steps": steps,
        "report_to": [],
    } | options
    options.update(learning_rate=1e-2, use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True)
    arguments = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(
        model, arguments, train_dataset=data(), eval_dataset=data()[:4], callbacks=list(callbacks)
    )


def same(model, want, **bounds):
    bounds = bounds or {"rtol": 1e-6, "atol": 1e-6}
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name, **bounds)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


STARTS = [{"init_lora_weights": "pissa"}, {"bias": "lora_only", "modules_to_save": ["lm_head"]}]


@pytest.mark.parametrize("options", STARTS, ids=str)
def test_a_run_resumed_from_adapters_alone_is_the_uninterrupted_one(options, tmp_path, caplog):
    whole = trainer(adapted(**options), tmp_path / "whole", 4, [SaveAdapterCallback()])
    whole.train()
    want = state(whole.model)

    trainer(adapted(**options), tmp_path / "parts", 2, [SaveAdapterCallback()]).train()
    folder = tmp_path / "parts" / "checkpoint-2"
    kept = load_file(folder / "model.safetensors")
    taken = "proj.weight" if "init_lora_weights" in options else "adapters"
    assert kept and all(re.search(f"adapters|bias|lm_head|{taken}", key) for key in kept)
    resumed = trainer(adapted(**options), tmp_path / "parts", 4, [SaveAdapterCallback()])
    resumed.train(resume_from_checkpoint=True)
    same(resumed.model, want)
    assert "missing keys" not in caplog.text


def test_a_checkpoint_is_pefts(tmp_path):
    run = trainer(adapted(("default", "other")), tmp_path, 2, [SaveAdapterCallback()])
    run.train()
    folder = tmp_path / "checkpoint-2"
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        want = run.model.eval()(ids).logits
        for reader in (peft.PeftModel.from_pretrained, load_adapter):
            torch.testing.assert_close(reader(base(), folder).eval()(ids).logits, want)
    assert (folder / "other" / "adapter_model.safetensors").exists()


def test_after_training_the_whole_model_is_saved_again(tmp_path):
    run = trainer(adapted(), tmp_path, 2, [SaveAdapterCallback()])
    run.train()
    run.save_model(str(tmp_path / "end"))
    assert load_file(tmp_path / "end" / "model.safetensors").keys() >= lora_state_dict(run.model).keys()
    assert any("layernorm" in key for key in load_file(tmp_path / "end" / "model.safetensors"))


def test_the_whole_model_where_that_is_wanted(tmp_path):
    trainer(adapted(), tmp_path, 2, [SaveAdapterCallback(whole_model=True)]).train()
    assert any("layernorm" in key for key in load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").exists()


@pytest.mark.parametrize("start", [True, "pissa"])
def test_the_best_model_is_loaded_at_the_end(start, tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    options.update(metric_for_best_model="eval_loss", greater_is_better=True)  # the worst: not the last
    run = trainer(adapted(init_lora_weights=start), tmp_path, 4, [SaveAdapterCallback()], **options)
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        want = load_adapter(base(), best).eval()(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, want)


def test_a_schedule_that_moves_the_base_goes_on(tmp_path):
    def run(folder, steps, **options):
        model = adapted()
        callbacks = [SaveAdapterCallback(), as_callback(ReLoRA(model, every=2, ratio=1.0))]
        made = trainer(model, folder, steps, callbacks)
        made.train(**options)
        return made.model

    want = state(run(tmp_path / "whole", 4))
    run(tmp_path / "parts", 2)
    same(run(tmp_path / "parts", 4, resume_from_checkpoint=True), want)


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: expected adapters of apply_lora, got a LlamaForCausalLM"):
        trainer(base(), tmp_path, 2, [SaveAdapterCallback()])


def of_peft():
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=TARGETS))
    accelerate(model)
    return model


def accelerated_steps(make, folder, steps, resume=None, save=None):
    """Weights after ``steps`` under Accelerate, from a saved state on, with one saved on the way."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(data(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if resume is not None:
        accelerator.load_state(folder)
    for step, batch in enumerate(loader):
        if step < (resume or 0) or step >= steps:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if step + 1 == save:
            accelerator.save_state(folder)
    return state(accelerator.unwrap_model(model))


@pytest.mark.parametrize("make", [adapted, of_peft])
def test_accelerate_saves_and_resumes(make, tmp_path):
    want = accelerated_steps(make, tmp_path, 4, save=2)
    got = accelerated_steps(make, tmp_path, 4, resume=2)
    start = make().state_dict()
    assert any(not torch.equal(want[name], start[name]) for name in want)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
