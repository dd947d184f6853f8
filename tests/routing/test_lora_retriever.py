"""The nearest adapters of a prompt, and what mixture and fusion make of them in one batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.nn import mixed_adapters, set_adapter
from lora_kernels.routing import AdapterIndex
from lora_kernels.routing.lora_retriever import INSTRUCTION

WIDE = torch.float64
WORDS = ("red", "green", "blue", "fast")


def embed(texts):
    """How often each word stands in a text, which has to begin with the instruction."""
    assert all(text.startswith(INSTRUCTION) for text in texts)
    return torch.tensor([[float(text.split().count(word)) for word in WORDS] for text in texts])


def index(cosine=False):
    found = AdapterIndex(embed, cosine=cosine)
    for name in ("red", "green", "blue"):
        found.add(name, [name, f"{name} {name} fast"])
    return found


@pytest.mark.parametrize("cosine", [False, True])
def test_the_nearest_come_first_and_their_scores_are_the_products(cosine):
    one = index(cosine)
    found = one.search(["green", "blue blue red"], k=2)
    assert found.names[0][0] == "green" and found.names[1] == ["blue", "red"]
    assert [[one.names[i] for i in row] for row in found.ids.tolist()] == found.names
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2))
    means = {name: embed([INSTRUCTION + name, f"{INSTRUCTION}{name} {name} fast"]) for name in one.names}
    unit = (lambda t: F.normalize(t, dim=-1)) if cosine else (lambda t: t)
    want = unit(embed([INSTRUCTION + "blue blue red"])) @ unit(unit(means["blue"]).mean(0))
    torch.testing.assert_close(found.scores[1, :1], want)


def test_what_a_query_excludes_is_not_found_and_a_new_mean_replaces_the_old():
    one = index()
    found = one.search(["green", "green"], 2, exclude=[["green"], []])
    assert "green" not in found.names[0] and found.names[1][0] == "green"
    one.add("red", ["green green green"])
    assert one.search(["green"], 1).names == [["red"]] and len(one.names) == 3


def test_bad_input():
    one = index()
    with pytest.raises(TypeError, match="queries: expected a list of texts, got a str"):
        one.search("green")
    with pytest.raises(ValueError, match="k: expected 1 to 3, the adapters that are left, got 4"):
        one.search(["green"], 4)
    with pytest.raises(ValueError, match="k: expected 1 to 2, the adapters that are left, got 3"):
        one.search(["green"], 3, [["red"]])
    with pytest.raises(ValueError, match="exclude: expected one for each of 1 queries, got 2"):
        one.search(["green"], 1, [[], []])
    with pytest.raises(ValueError, match="samples: expected a list of at least one text"):
        one.add("red", [])
    with pytest.raises(TypeError, match="embed: expected a function of texts, got str"):
        AdapterIndex("no function")
    with pytest.raises(ValueError, match=r"embed: expected \[1, width\] for 1 texts, got \(4,\)"):
        AdapterIndex(lambda texts: torch.ones(4)).add("red", ["red"])


def model_of(names, dropout=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    for i, name in enumerate(names):
        config = LoRAConfig(2, lora_alpha=1 + i, lora_dropout=dropout * i, target_modules="all-linear")
        apply_lora(model, config, name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters" in name:
                parameter.normal_()
    set_adapter(model, list(names))
    return model


def by_hand(model, x, names, weights, fusion):
    """Sample by sample, layer by layer, adapter by adapter."""
    ys = []
    for sample, own, w in zip(x, names, weights, strict=True):
        for layer in model:
            if isinstance(layer, nn.Tanh):
                sample = torch.tanh(sample)
                continue
            used = [(v, layer.adapters[n]) for v, n in zip(w, own, strict=True) if n != "__base__"]
            y = F.linear(sample, layer.weight, layer.bias)
            if fusion:
                a = sum(v * one.lora_A for v, one in used)
                b = sum(v * one.scaling * one.lora_B for v, one in used)
                y = y + sample @ a.T @ b.T
            else:
                y = y + sum(v * one.scaling * (sample @ one.lora_A.T @ one.lora_B.T) for v, one in used)
            sample = y
        ys.append(sample)
    return torch.stack(ys)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_several_adapters_a_sample_in_one_batch(fusion, tokens):
    names = ("red", "green", "blue")
    model, x = model_of(names), torch.randn(4, tokens, 8, dtype=WIDE)
    own = [["red", "blue"], ["green", "red"], ["blue", "__base__"], ["red", "blue"]]
    weights = torch.rand(4, 2, dtype=WIDE, requires_grad=True)
    with mixed_adapters(model, own, weights=weights, fusion=fusion, batch_dim=0):
        y = model(x)
    want = by_hand(model, x, own, weights, fusion)
    torch.testing.assert_close(y, want)
    leaves, dy = [weights, *(p for p in model.parameters() if p.requires_grad)], torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(o, leaves, dy) for o in (y, want))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("fusion", [False, True])
def test_samples_whose_names_are_alike_differ_by_their_weights(fusion):
    """So that it matters which dimension has them."""

    class TimeFirst(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = TimeFirst(model_of(("red", "green")))
    x, own = torch.randn(3, 3, 8, dtype=WIDE), [["red", "green"]] * 3
    weights = torch.rand(3, 2, dtype=WIDE)
    with mixed_adapters(model, own, weights=weights, fusion=fusion), pytest.raises(ValueError, match="which"):
        model(x)
    with mixed_adapters(model, own, weights=weights, fusion=fusion, batch_dim=1):
        y = model(x)
    torch.testing.assert_close(y, by_hand(model.inner, x, own, weights, fusion))


def test_names_and_weights_that_do_not_fit():
    model, two = model_of(("red", "green"), dropout=0.5), torch.rand(2, 2, dtype=WIDE)
    for names, weights, fusion in (
        ([["red", "green"]] * 2, None, False),
        (["red", "green"], None, True),
        (["red", "green"], two, False),
        ([["red", "green"], ["red"]], two, False),
        ([["red", "green"]] * 3, two, False),
        ([["red", "green"]] * 2, [[1, 2]] * 2, False),
    ):
        with (
            pytest.raises(ValueError, match="weights: expected one for each"),
            mixed_adapters(model, names, weights=weights, fusion=fusion),
        ):
            pass
    with (
        mixed_adapters(model, [["red", "green"]] * 2, weights=two, fusion=True, batch_dim=0),
        pytest.raises(ValueError, match=r"fusion: expected adapters of one lora_dropout, got \[0.0, 0.5\]"),
    ):
        model(torch.randn(2, 5, 8, dtype=WIDE))
