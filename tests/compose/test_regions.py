"""LoRA-Composer's regions against an attention for each adapter, pasted together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import LoRAConfig
from lora_kernels.compose import (
    RegionLoRA,
    composer_loss,
    region_masks,
    region_row_index,
    region_self_attn_mask,
)
from lora_kernels.nn import LoRALinear

WIDE, SIZE = torch.float64, (8, 8)
BOXES = [(0, 0, 4, 5), (2, 3, 8, 8)]


def attention(names=("a", "b")):
    torch.manual_seed(0)
    layers = {}
    for name, cols in (("to_q", 6), ("to_k", 5), ("to_v", 5), ("to_out", 6)):
        layer = LoRALinear(cols, 6, r=2, adapter_name="a", dtype=WIDE)
        layer.add_adapter("b", LoRAConfig(r=3))
        for adapter in layer.adapters.values():
            torch.nn.init.normal_(adapter.lora_B)
        layers[name] = layer
    return RegionLoRA(**layers, adapters=names, heads=2), layers


def alone(layers, name, h, prompt):
    """Attention of the whole image to one prompt under one adapter; the queries are the base's."""

    def under(layer, x):
        delta = 0 if name is None else layer.adapters[name].delta()
        return F.linear(x, layer.weight + delta, layer.bias)

    q = F.linear(h, layers["to_q"].weight, layers["to_q"].bias)
    k, v = under(layers["to_k"], prompt), under(layers["to_v"], prompt)
    out = []
    for one in range(2):
        part = slice(3 * one, 3 * one + 3)
        out.append((q[:, part] @ k[:, part].T / 3**0.5).softmax(-1) @ v[:, part])
    return under(layers["to_out"], torch.cat(out, 1))


def pasted(layers, h, prompts, names, boxes):
    masks = region_masks(boxes, *SIZE).to(WIDE)
    total = alone(layers, None, h, prompts[0]) * (masks.sum(0) == 0)[:, None]
    for name, prompt, mask in zip(names, prompts[1:], masks, strict=True):
        total = total + alone(layers, name, h, prompt) * mask[:, None] / masks.sum(0).clamp(min=1)[:, None]
    return total


def test_regions_are_the_adapters_pasted_with_overlaps_averaged():
    module, layers = attention()
    h, prompts = torch.randn(64, 6, dtype=WIDE), torch.randn(3, 4, 5, dtype=WIDE)
    y = module(h, prompts, BOXES, SIZE)
    torch.testing.assert_close(y, pasted(layers, h, prompts, "ab", BOXES))
    bare = ~region_masks(BOXES, *SIZE).any(0)
    torch.testing.assert_close(y[bare], alone(layers, None, h, prompts[0])[bare])
    both = region_masks(BOXES, *SIZE).all(0)
    assert both.any()


def test_a_box_of_everything_is_the_adapter_by_itself():
    module, layers = attention(["b"])
    h, prompts = torch.randn(64, 6, dtype=WIDE), torch.randn(2, 4, 5, dtype=WIDE)
    torch.testing.assert_close(module(h, prompts, [(0, 0, 8, 8)], SIZE), alone(layers, "b", h, prompts[1]))


def test_rows_and_the_mask_of_self_attention():
    rows, masks = region_row_index(BOXES, *SIZE), region_masks(BOXES, *SIZE)
    assert len(rows.pixel) == int(masks.sum()) + int((masks.sum(0) == 0).sum())
    torch.testing.assert_close(torch.zeros(64).index_add(0, rows.pixel, rows.weight), torch.ones(64))
    mask = region_self_attn_mask(BOXES, *SIZE)
    seen = (torch.randn(64, 64) + mask).softmax(-1)
    for i in range(64):
        for j in range(64):
            apart = masks[:, i].any() and masks[:, j].any() and not (masks[:, i] & masks[:, j]).any()
            assert bool(mask[i, j] < 0) == bool(apart)
            assert not apart or seen[i, j] < 1e-6


def test_the_loss_falls_as_attention_moves_into_its_box():
    boxes = [(0, 0, 4, 4)]
    inside = torch.zeros(1, 8, 8)
    inside[:, :4, :4] = 1.0
    own = region_masks(boxes, *SIZE)[0]
    closed = torch.zeros(64, 64)
    closed[own] = own.float() / own.sum()
    kept = composer_loss(inside, closed, boxes)
    assert kept < composer_loss(inside.flip(1, 2), closed, boxes)
    assert kept < composer_loss(inside, torch.full((64, 64), 1 / 64), boxes)
    latent = torch.rand(1, 8, 8, requires_grad=True)
    composer_loss(latent, closed, boxes).backward()
    assert latent.grad is not None and torch.isfinite(latent.grad).all() and latent.grad.any()


def test_bad_input():
    module, _ = attention()
    h, prompts = torch.randn(64, 6, dtype=WIDE), torch.randn(3, 4, 5, dtype=WIDE)
    with pytest.raises(ValueError, match=r"boxes\[1\]: expected one within 8 x 8, got \(2, 3, 9, 8\)"):
        module(h, prompts, [BOXES[0], (2, 3, 9, 8)], SIZE)
    with pytest.raises(ValueError, match="prompts: expected 3 for 2 boxes and 64 pixels, got 2, 2 and 64"):
        module(h, prompts[:2], BOXES, SIZE)
    with pytest.raises(ValueError, match="adapters: expected ones of a, b, got 'c'"):
        attention(["c"])
