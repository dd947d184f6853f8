"""Schedules under the Transformers Trainer: steps, optimiser and checkpoints, on our models and PEFT's."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import LoRAConfig, accelerate, apply_lora
from lora_kernels.schedules import ReLoRA, as_callback

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TARGETS = ["q_proj", "v_proj"]


def model(kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16)
    base = transformers.LlamaForCausalLM(config)
    if kind == "ours":
        return apply_lora(base, LoRAConfig(r=2, target_modules=TARGETS))
    made = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=TARGETS))
    accelerate(made)
    return made


def trainer(kind, folder, steps):
    made = model(kind)
    schedule = ReLoRA(made, every=2, ratio=1.0)
    options = {"per_device_train_batch_size": 2, "save_steps": 3, "max_steps": steps, "report_to": []}
    options.update(learning_rate=1e-2, use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True)
    arguments = transformers.TrainingArguments(str(folder), **options)
    tokens = (torch.arange(8)[:, None] * 5 + torch.arange(6)) % 32
    data = [{"input_ids": row, "labels": row} for row in tokens]
    callbacks = [as_callback(schedule)]
    return transformers.Trainer(made, arguments, train_dataset=data, callbacks=callbacks), schedule


def weights(made):
    return {name: p.detach().clone() for name, p in made.named_parameters()}


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, tmp_path):
    whole, schedule = trainer(kind, tmp_path / "whole", 5)
    start = weights(whole.model)
    whole.train()
    assert schedule.steps == 5 and schedule.optimizer is not None
    want = weights(whole.model)
    moved = [name for name, value in want.items() if not torch.equal(value, start[name])]
    assert any("lora" not in name for name in moved)  # W took what the adapters had

    trainer(kind, tmp_path / "parts", 3)[0].train()
    resumed, schedule = trainer(kind, tmp_path / "parts", 5)
    resumed.train(resume_from_checkpoint=True)
    assert schedule.steps == 5
    for name, value in weights(resumed.model).items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    trainer("ours", tmp_path, 3)[0].train()
    next(tmp_path.glob("checkpoint-3/relora*.pt")).unlink()
    with pytest.raises(ValueError, match="resume_from: expected a checkpoint with relora_lora_kernels"):
        trainer("ours", tmp_path, 5)[0].train(resume_from_checkpoint=True)
