"""CLIP-LoRA on a tiny CLIP, against PEFT's rsLoRA of the same layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from lora_kernels.nn import layer_groups, lora_layers, merge_adapters, unmerge_adapters
from lora_kernels.nn.methods.clip_lora import apply_clip_lora, few_shot_loss, few_shot_recipe

HIDDEN, BLOCKS = 16, 2


def clip():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=8, eos_token_id=19, bos_token_id=0)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    return CLIPModel(config).double().eval()


def inputs():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(1, 19, (3, 6)), "pixel_values": torch.randn(2, 3, 8, 8).double()}


def test_scale_places_and_counts_with_pefts_numbers():
    ours = apply_clip_lora(clip(), dropout=0.0)
    layers = lora_layers(ours)
    assert len(layers) == 2 * BLOCKS * 3
    assert {layer.adapters["default"].scaling for layer in layers.values()} == {1 / 2**0.5}
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == 2 * BLOCKS * 3 * 2 * 2 * HIDDEN
    config = LoraConfig(r=2, lora_alpha=1, use_rslora=True, target_modules=["q_proj", "k_proj", "v_proj"])
    theirs = get_peft_model(clip(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, layer in layers.items():
            other = theirs.base_model.model.get_submodule(name)
            for half in "AB":
                own = getattr(layer.adapters["default"], f"lora_{half}")
                own.normal_()
                getattr(other, f"lora_{half}")["default"].weight.copy_(own)
    want = theirs(**inputs()).logits_per_image
    torch.testing.assert_close(ours(**inputs()).logits_per_image, want)
    merge_adapters(ours)
    torch.testing.assert_close(ours(**inputs()).logits_per_image, want)
    unmerge_adapters(ours)
    assert any(set(group) >= {"q_proj", "k_proj", "v_proj"} for group in map(_ends, layer_groups(ours)))


def _ends(group):
    return [str(name).rpartition(".")[2] for name in group]


@pytest.mark.parametrize("encoder,params,count", [("text", "q", 1), ("vision", "qo", 2), ("both", "qkvo", 8)])
def test_choices(encoder, params, count):
    model = apply_clip_lora(clip(), params=params, encoder=encoder)
    assert len(lora_layers(model)) == BLOCKS * count
    assert all(f"{encoder}_model" in name or encoder == "both" for name in lora_layers(model))


def test_the_recipe_and_the_loss():
    model = apply_clip_lora(clip())
    recipe = few_shot_recipe(model, 4)
    (group,) = recipe.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], recipe.steps) == (2e-4, 1e-2, 2000)
    assert len(group["params"]) == 2 * len(lora_layers(model))
    recipe.optimizer.step()
    for _ in range(recipe.steps):
        recipe.schedule.step()
    assert group["lr"] == pytest.approx(1e-6)
    images, texts, labels = (
        torch.randn(5, 8).double(),
        torch.randn(3, 8).double(),
        torch.tensor([0, 2, 1, 1, 0]),
    )
    cosine = F.cosine_similarity(images[:, None], texts[None], dim=-1)
    want = -(30 * cosine).log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(few_shot_loss(images, texts, labels, 30.0), want)


def test_bad_input():
    model = clip()
    for options, message in (
        ({"params": "qx"}, "params: expected letters of qkvo, got 'qx'"),
        ({"encoder": "all"}, "encoder: expected one of text, vision, both, got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_clip_lora(model, **options)
    assert not lora_layers(model)
    with pytest.raises(ValueError, match="shots: expected a model with adapters"):
        few_shot_recipe(model, 1)
    with pytest.raises(ValueError, match="matches no"):
        apply_clip_lora(torch.nn.Linear(3, 3))
