"""TRL's trainers on accelerated models of PEFT and on models of apply_lora: the numbers of PEFT alone."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("trl")

import datasets
import peft
import torch
import trl
from text import llama, preferences, sums, tokenizer

from lora_kernels import LoRAConfig, accelerate, apply_lora, load_adapter
from lora_kernels.integrations.peft_linear import FusedLoraLinear
from lora_kernels.nn import disable_adapters, frozen_copy, lora_state_dict

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def config(**options):
    return peft.LoraConfig(r=4, target_modules=TARGETS, **options)


def options(folder, **more):
    own = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    off = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder), "max_length": 24, **own, **off, **more}


def history(trainer, key="loss"):
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def sft(model, folder, peft_config=None, **more):
    data = datasets.Dataset.from_list(sums())
    args = trl.SFTConfig(**options(folder, **more))
    return trl.SFTTrainer(
        model, args, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )


def dpo(model, folder, ref_model=None, peft_config=None, **more):
    data = datasets.Dataset.from_list(preferences())
    args = trl.DPOConfig(**options(folder, **more))
    rest = {"processing_class": tokenizer(), "peft_config": peft_config}
    return trl.DPOTrainer(model, ref_model, args, train_dataset=data, **rest)


def adapted(fused, **more):
    model = llama()
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config(**more))
    if fused:
        accelerate(model)
    return model


def is_fused(trainer):
    layers = [m for m in trainer.model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    return bool(layers) and all(type(layer) is FusedLoraLinear for layer in layers)


def close(got, want):
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6)


WAYS = {
    "checkpointing": {},  # TRL's default
    "plain": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "packing": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
FIRST = ("checkpointing", "packing")


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w in FIRST else pytest.mark.exhaustive) for w in WAYS]
)
def test_sft_of_an_accelerated_model(way, tmp_path):
    want = history(sft(adapted(False), tmp_path, **WAYS[way]))
    trainer = sft(adapted(True), tmp_path, **WAYS[way])
    close(history(trainer), want)
    assert is_fused(trainer)


def test_sft_makes_the_adapter_and_is_accelerated_afterwards(tmp_path):
    want = history(sft(llama(), tmp_path, config()))
    trainer = sft(llama(), tmp_path, config())
    accelerate(trainer.model)
    close(history(trainer), want)
    assert is_fused(trainer)


@pytest.mark.parametrize(
    "more",
    [{}, pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.exhaustive)],
    ids=["at-each-step", "precomputed"],
)
def test_dpo_of_a_trained_adapter_has_a_second_one_as_the_reference(more, tmp_path):
    start = {"init_lora_weights": False}
    want = history(dpo(adapted(False, **start), tmp_path, **more))
    trainer = dpo(adapted(True, **start), tmp_path, **more)
    reference = [p.clone() for name, p in trainer.model.named_parameters() if ".ref." in name]
    close(history(trainer), want)
    assert is_fused(trainer) and list(trainer.model.peft_config) == ["default", "ref"]
    after = [p for name, p in trainer.model.named_parameters() if ".ref." in name]
    assert all(torch.equal(*pair) for pair in zip(after, reference, strict=True))
    assert not any(p.requires_grad for p in after)


@pytest.mark.exhaustive
def test_dpo_of_a_new_adapter_has_the_base_as_the_reference(tmp_path):
    want = history(dpo(llama(), tmp_path, peft_config=config()), "rewards/margins")
    trainer = dpo(llama(), tmp_path, peft_config=config())
    accelerate(trainer.model)
    close(history(trainer, "rewards/margins"), want)
    assert want[0] == 0 and want[-1] != 0


def ours(model, folder):
    """A model of apply_lora with the adapter of a PEFT model."""
    model.save_pretrained(folder)
    made = load_adapter(llama(), folder)
    made.train()
    return made


@pytest.mark.exhaustive
def test_our_models_train_as_pefts_do(tmp_path):
    start = ours(adapted(False), tmp_path / "start")
    close(history(sft(start, tmp_path)), history(sft(adapted(False), tmp_path)))


def test_dpo_of_our_model_with_a_frozen_copy_is_pefts_with_two_adapters(tmp_path):
    start = {"init_lora_weights": False}
    model = ours(adapted(False, **start), tmp_path / "start")
    reference = frozen_copy(model)
    before = {name: p.clone() for name, p in lora_state_dict(reference).items()}
    want = history(dpo(adapted(False, **start), tmp_path))
    close(history(dpo(model, tmp_path, ref_model=reference)), want)
    after = lora_state_dict(reference)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(lora_state_dict(model)[name := next(iter(before))], before[name])


def test_an_adapter_of_the_output_layer_trains_where_trl_reads_its_weight(tmp_path):
    model = apply_lora(llama(), LoRAConfig(r=4, target_modules=["lm_head"]))
    with disable_adapters(model):
        base = model(torch.arange(8)[None]).logits
    first = history(sft(model, tmp_path))
    assert model.lm_head.adapters["default"].lora_B.abs().max() > 0
    assert not torch.allclose(model(torch.arange(8)[None]).logits, base, atol=1e-4)
    assert first[-1] < first[0]


@pytest.mark.exhaustive
def test_grpo_generates_and_trains(tmp_path):
    def losses(fused):
        own = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
        asked = options(tmp_path, **own)
        del asked["max_length"]
        data = datasets.Dataset.from_list([{"prompt": f"{i} + "} for i in range(8)])
        trainer = trl.GRPOTrainer(
            adapted(fused),
            lambda completions, **_: [float(len(set(one))) for one in completions],
            trl.GRPOConfig(**asked),
            train_dataset=data,
            processing_class=tokenizer(),
        )
        return history(trainer, "grad_norm")

    close(losses(True), losses(False))
