"""Embeddings of a pool: each sample's own, of any rank, on pages that had other owners before."""

import pytest
import torch
from torch import nn

from lora_kernels.serving.modules import (
    MultiLoRAEmbedding,
    apply_multi_lora,
    pool_linears,
    remove_multi_lora,
    use_adapters,
)
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.testing import assert_close

TOKENS, WIDTH, OUT = 23, 12, 5
RANKS = {"a": 1, "b": 4, "c": 7, "d": 3, "e": 8}


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(TOKENS, WIDTH, **options), nn.Linear(WIDTH, OUT)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def factors(name):
    make = torch.Generator().manual_seed(ord(name))
    rank = RANKS[name]
    shapes = {"embed": (TOKENS, WIDTH), "head": (WIDTH, OUT)}
    both = {
        site: (torch.randn(rank, cols, generator=make), torch.randn(out, rank, generator=make))
        for site, (cols, out) in shapes.items()
    }
    return {"embed": both["embed"]} if name == "d" else both


def served(dtype=torch.float32, **options):
    model = Model().to(dtype)
    sizes = pool_linears(model, ["embed", "head"])
    assert sizes == {"embed": (TOKENS, WIDTH), "head": (WIDTH, OUT)}
    pool = AdapterPool(sizes, **{"pages": 16, "slots": 3, "max_rank": 8, "dtype": dtype, **options})
    for i, name in enumerate(RANKS):
        pool.register(name, factors(name), scaling=0.5 + i)
    return apply_multi_lora(model, pool)


def embedded(tokens, name, dtype=torch.float64, through=torch.float32):
    """Of one sample, in ``dtype``, from values that were rounded to ``through``."""
    y = Model().embed.weight.to(through).to(dtype)[tokens]
    if name == "__base__":
        return y
    lora_a, lora_b = (factor.to(through).to(dtype) for factor in factors(name)["embed"])
    return y + (0.5 + list(RANKS).index(name)) * (lora_a.T[tokens] @ lora_b.T)


@torch.no_grad()
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,)], ids=str)
def test_every_sample_has_its_adapters_embedding(lead):
    """Room for three: pages change hands, and a slot of before may list pages that are another's."""
    model, draw = served(), torch.Generator().manual_seed(1)
    for _ in range(20):
        names = [[*RANKS, "__base__"][i] for i in torch.randint(6, (2,), generator=draw)] * 2
        tokens = torch.randint(TOKENS, (len(names), *lead), generator=draw)
        with use_adapters(model, names):
            y, whole = model.embed(tokens), model(tokens)
        assert y.shape == (*tokens.shape, WIDTH) and whole.shape == (*tokens.shape, OUT)
        for i, name in enumerate(names):
            eager = embedded(tokens[i], name, torch.float32)
            assert_close(y[i], eager, embedded(tokens[i], name), name, ulps=2)


@torch.no_grad()
def test_half_precision_and_more_samples_than_names():
    model = served(torch.bfloat16)
    tokens = torch.randint(TOKENS, (6, 4))
    with use_adapters(model, ["b", "__base__", "c"], repeats=[2]):
        y = model.embed(tokens)
    assert y.dtype == torch.bfloat16
    for i, name in enumerate(("b", "b", "__base__", "__base__", "c", "c")):
        eager, exact = (embedded(tokens[i], name, dtype, y.dtype) for dtype in (y.dtype, torch.float64))
        assert_close(y[i], eager, exact, name, y.dtype, ulps=2)


@torch.no_grad()
def test_outside_of_a_batch_it_is_its_base():
    model, tokens = served(), torch.arange(TOKENS)
    assert isinstance(model.embed, MultiLoRAEmbedding)
    assert torch.equal(model(tokens), Model()(tokens))
    remove_multi_lora(model)
    assert type(model.embed) is nn.Embedding and torch.equal(model(tokens), Model()(tokens))


def test_an_embedding_that_cannot_be_served_changes_nothing():
    model = Model(max_norm=1.0)
    with pytest.raises(ValueError, match=r"embed: expected an nn.Embedding without max_norm"):
        apply_multi_lora(model, AdapterPool(pool_linears(model, ["head", "embed"])))
    with pytest.raises(ValueError, match=r"embed: expected an nn.Linear or nn.Embedding of"):
        apply_multi_lora(model, AdapterPool({"embed": (WIDTH, TOKENS)}))
    assert type(model.embed) is nn.Embedding and type(model.head) is nn.Linear
