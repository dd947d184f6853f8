"""Several adapters trained at once on a Transformers model: groups, checkpointing, and PEFT reads each."""

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import LoRAConfig
from lora_kernels.integrations.checkpoint import save_adapter
from lora_kernels.nn import layer_groups, mixed_adapters, set_adapter, train_adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
NAMES = ["a", "__base__", "b", "c", "a"]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=False, **sizes, **heads))


def trained():
    model = llama()
    configs = {
        "a": LoRAConfig(4, 8, target_modules=TARGETS, init_lora_weights=False),
        "b": LoRAConfig(3, 9, use_rslora=True, target_modules=TARGETS[:3], init_lora_weights=False),
        "c": LoRAConfig(8, 4, rank_pattern={"q_proj": 2}, target_modules=TARGETS, init_lora_weights=False),
    }
    return model, train_adapters(model, configs)


def gradients(parameters):
    return [p.grad.clone() for many in parameters.values() for p in many]


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (5, 6), generator=torch.Generator().manual_seed(1))


def alone(model, parameters, tokens):
    """The gradients when each adapter has a batch of its own samples."""
    results = []
    for name in parameters:
        rows = [i for i, other in enumerate(NAMES) if other == name]
        set_adapter(model, name)
        model(tokens[rows]).logits.pow(2).sum().backward()
        results += [p.grad.clone() for p in parameters[name]]
    return results


def test_layers_that_are_computed_together_honour_the_names(tokens):
    """Query, key and value are one group in the model, and yet each sample has its adapter."""
    model, parameters = trained()
    assert any("q_proj" in name for group in layer_groups(model) for name in group)
    model(tokens).logits.sum().backward()  # a pass before, whose groups must leave nothing behind
    model.zero_grad()
    with mixed_adapters(model, NAMES):
        logits = model(tokens).logits
    logits.pow(2).sum().backward()
    for i, name in enumerate(NAMES):
        set_adapter(model, [] if name == "__base__" else name)
        torch.testing.assert_close(logits[i : i + 1], model(tokens[i : i + 1]).logits, rtol=1e-4, atol=1e-5)
    other, theirs = trained()
    for ours, single in zip(gradients(parameters), alone(other, theirs, tokens), strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5 * float(single.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after", "backward inside"])
def test_gradient_checkpointing_gives_the_same_gradients(tokens, reentrant, inside):
    model, parameters = trained()
    with mixed_adapters(model, NAMES):
        model(tokens).logits.pow(2).sum().backward()
    expected = gradients(parameters)
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    kept = {name: vars(module).copy() for name, module in model.named_modules()}
    with mixed_adapters(model, NAMES):
        loss = model(tokens).logits.pow(2).sum()
        if inside:
            loss.backward()
    with mixed_adapters(model, NAMES[::-1]):
        model(tokens)  # another batch in between: the backward is the first one's
    if not inside:
        loss.backward()
    for ours, plain in zip(gradients(parameters), expected, strict=True):
        torch.testing.assert_close(ours, plain)
    for name, module in model.named_modules():
        assert vars(module).keys() == kept[name].keys()


def test_peft_reads_each_of_them_alone(tokens, tmp_path):
    model, parameters = trained()
    steps = {name: torch.optim.AdamW(many, lr=0.01) for name, many in parameters.items()}
    for _ in range(3):
        with mixed_adapters(model, NAMES):
            model(tokens, labels=tokens).loss.backward()
        for step in steps.values():
            step.step()
            step.zero_grad()
    with torch.no_grad(), mixed_adapters(model, NAMES):
        logits = model(tokens).logits
    for name in parameters:
        save_adapter(model, tmp_path / name, name)
        rows = [i for i, other in enumerate(NAMES) if other == name]
        peft = PeftModel.from_pretrained(llama(), tmp_path / name)
        torch.testing.assert_close(peft(tokens[rows]).logits, logits[rows], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[rows], llama()(tokens[rows]).logits, atol=1e-2)
