"""loralib's state dicts, against its own expressions of each layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.integrations.loralib import load_loralib

WIDE, ALPHA = torch.float64, 3


def rand(*shape):
    return torch.randn(*shape, dtype=WIDE)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.qkv = nn.Embedding(7, 6, dtype=WIDE), nn.Linear(6, 9, dtype=WIDE)
        self.out, self.conv = nn.Linear(9, 4, dtype=WIDE), nn.Conv2d(2, 3, 3, dtype=WIDE)


def test_linears_and_embeddings_of_several_ranks():
    torch.manual_seed(0)
    model = Model()
    state = {
        "emb.lora_A": rand(2, 7),
        "emb.lora_B": rand(6, 2),
        "out.lora_A": rand(3, 9),
        "out.lora_B": rand(4, 3),
    }
    load_loralib(model, state, ALPHA)
    tokens, x = torch.tensor([3, 0, 6]), rand(5, 9)
    table = model.emb.weight + (state["emb.lora_B"] @ state["emb.lora_A"]).T * ALPHA / 2
    torch.testing.assert_close(model.emb(tokens), F.embedding(tokens, table))
    branch = x @ state["out.lora_A"].T @ state["out.lora_B"].T * ALPHA / 3
    torch.testing.assert_close(model.out(x), F.linear(x, model.out.weight, model.out.bias) + branch)


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_merged_linears(enabled):
    torch.manual_seed(0)
    model, m = Model(), sum(enabled)
    state = {"qkv.lora_A": rand(2 * m, 6), "qkv.lora_B": rand(3 * m, 2)}
    load_loralib(model, state, ALPHA, enable_lora=enabled)
    change = F.conv1d(state["qkv.lora_A"][None], state["qkv.lora_B"][..., None], groups=m)[0]
    whole = torch.zeros(9, 6, dtype=WIDE)
    whole[torch.tensor(enabled).repeat_interleave(3)] = change
    x = rand(5, 6)
    weight = model.qkv.weight + whole * ALPHA / 2
    torch.testing.assert_close(model.qkv(x), F.linear(x, weight, model.qkv.bias))


def test_convolutions():
    torch.manual_seed(0)
    model = Model()
    state = {"conv.lora_A": rand(2 * 3, 2 * 3), "conv.lora_B": rand(3 * 3, 2 * 3)}
    load_loralib(model, state, ALPHA)
    weight = model.conv.weight + (state["conv.lora_B"] @ state["conv.lora_A"]).view(3, 2, 3, 3) * ALPHA / 2
    x = rand(1, 2, 5, 5)
    torch.testing.assert_close(model.conv(x), F.conv2d(x, weight, model.conv.bias))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"out.lora_A": (3, 9)}, {}, "out: expected lora_A and lora_B, got lora_A alone"),
        ({"out.bias": (4,)}, {}, "expected matrices lora_A and lora_B alone, got 'out.bias'"),
        ({"gone.lora_A": (3, 9), "gone.lora_B": (4, 3)}, {}, "gone: .* do not fit the model's NoneType"),
        (
            {"qkv.lora_A": (4, 6), "qkv.lora_B": (6, 2)},
            {},
            r"qkv: .* do not fit the model's Linear \(of a Merged",
        ),
        ({"qkv.lora_A": (4, 6), "qkv.lora_B": (6, 2)}, {"enable_lora": [True, True]}, "qkv: .* do not fit"),
        ({}, {}, "expected layers of one method, got none"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(shapes, options, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        load_loralib(model, {key: rand(*shape) for key, shape in shapes.items()}, **options)
    assert all(type(one) in (nn.Linear, nn.Embedding, nn.Conv2d) for one in model.children())
    with pytest.raises(TypeError, match="state: expected a mapping"):
        load_loralib(model, "adapter.pt")
