"""Mixed batches of a Transformers model against PEFT's own, and against each adapter alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels.integrations.pool import load_into_pool
from lora_kernels.serving.modules import apply_multi_lora, pool_linears, remove_multi_lora, use_adapters
from lora_kernels.serving.pool import AdapterPool

TARGETS = ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"]
ADAPTERS = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[1:]},
    "two": {"r": 3, "lora_alpha": 9, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "three": {
        "r": 8,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "target_modules": ["q_proj", "lm_head"],
    },
    "four": {"r": 5, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "five": {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens"]},
}
NAMES = ["one", "__base__", "two", "three", "one", "four", "five", "four"]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=False, **sizes, **heads)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, options in ADAPTERS.items():
        model = get_peft_model(llama(), LoraConfig(**options))
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "lora_embedding_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def served(folders):
    model = llama()
    pool = AdapterPool(pool_linears(model, TARGETS), pages=32, slots=6, max_rank=8)
    for name in ADAPTERS:
        load_into_pool(pool, folders / name, name)
    return apply_multi_lora(model, pool)


@pytest.fixture
def peft(folders):
    model = PeftModel.from_pretrained(llama(), folders / "one", adapter_name="one")
    for name in list(ADAPTERS)[1:]:
        model.load_adapter(folders / name, name)
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 61, (8, 6), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_mixed_batch_is_pefts(served, peft, tokens):
    ours = served(tokens, adapter_names=NAMES).logits
    theirs = peft(tokens, adapter_names=NAMES).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, served(tokens).logits, atol=1e-2)  # the adapters do something


@torch.no_grad()
def test_every_row_is_its_adapter_alone(served, peft, tokens):
    ours = served(tokens, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with peft.disable_adapter():
                alone = peft(tokens[i : i + 1]).logits
        else:
            peft.set_adapter(name)
            alone = peft(tokens[i : i + 1]).logits
        torch.testing.assert_close(ours[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_is_pefts(served, peft, tokens, options):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "adapter_names": NAMES, **options}
    mask = torch.ones_like(tokens)
    ours = served.generate(input_ids=tokens, attention_mask=mask, **settings)
    theirs = peft.generate(input_ids=tokens, attention_mask=mask, **settings)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_removed_the_model_is_as_it_was(served, tokens):
    before = llama()(tokens).logits
    assert torch.equal(served(tokens).logits, before)
    remove_multi_lora(served)
    assert torch.equal(served(tokens).logits, before)
    assert not any("Multi" in type(m).__name__ for m in served.modules())
    with pytest.raises(ValueError, match="apply_multi_lora"), use_adapters(served, NAMES):
        pass


@torch.no_grad()
def test_a_failed_call_leaves_nothing_held(served, tokens):
    with pytest.raises(ValueError, match="expected a registered adapter, got 'absent'"):
        served(tokens, adapter_names=["absent"] * 8)
    with pytest.raises(ValueError, match="adapter_names: expected one for each of 8 samples, got 3"):
        served(tokens, adapter_names=["one", "two", "one"])
    pool = next(m for m in served.modules() if "Multi" in type(m).__name__).batch.pool
    assert not any(adapter.users for adapter in pool._adapters.values())
    assert torch.equal(served(tokens).logits, llama()(tokens).logits)


def test_gradients_flow_to_the_input(served, tokens):
    embedded = served.get_input_embeddings()(tokens).detach().requires_grad_()
    served(inputs_embeds=embedded, adapter_names=NAMES).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_truncated_checkpoints_do_not_enter(served, folders, tmp_path, file):
    """Cut off anywhere; what is there is as it was, and the whole file still loads."""
    pool = next(m for m in served.modules() if "Multi" in type(m).__name__).batch.pool
    for whole in (folders / "one").iterdir():
        (tmp_path / whole.name).write_bytes(whole.read_bytes())
    content = (tmp_path / file).read_bytes()
    for length in (0, 1, 7, 9, len(content) // 3, len(content) // 2, len(content) - 50, len(content) - 2):
        (tmp_path / file).write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged|does not parse"):
            load_into_pool(pool, tmp_path, "broken")
        assert len(pool) == 5 and "broken" not in pool and not pool.resident
    (tmp_path / file).write_bytes(content)
    load_into_pool(pool, tmp_path, "whole")
    assert len(pool) == 6


def test_a_checkpoint_without_one_of_its_halves_does_not_enter(served, folders, tmp_path):
    pool = next(m for m in served.modules() if "Multi" in type(m).__name__).batch.pool
    (tmp_path / "adapter_config.json").write_bytes((folders / "one" / "adapter_config.json").read_bytes())
    tensors = load_file(folders / "one" / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    for change, match in (({}, "expected an A and a B, got A"), ({key: tensors[key].int()}, "floating")):
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        save_file({**rest, **change}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=match):
            load_into_pool(pool, tmp_path, "broken")
    assert len(pool) == 5 and "broken" not in pool


def test_a_pool_that_does_not_fit_changes_nothing():
    model = llama()
    kinds = [type(m) for m in model.modules()]
    for linears, match in (
        ({"absent": (4, 4)}, "no linear 'absent'"),
        ({"lm_head": (4, 4)}, "lm_head: expected an nn.Linear"),
    ):
        with pytest.raises(ValueError, match=match):
            apply_multi_lora(model, AdapterPool(linears))
    assert [type(m) for m in model.modules()] == kinds
