"""HiddenKey: masks, cuts, the divergence, and a Transformers model as it was afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.schedules import HiddenKey
from lora_kernels.schedules.hiddenkey import bidirectional_kl, dropkey_mask


def test_dropped_keys_are_renormalised_weights():
    """softmax(z + mask) = softmax(z) ⊙ kept over its sum, value and gradient."""
    mask = dropkey_mask(2, 3, 6, 0.4, torch.Generator().manual_seed(1)).double()
    assert mask.shape == (2, 3, 1, 6) and 0 < torch.isinf(mask).sum() < mask.numel()
    z = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(z)
    one = (z + mask).softmax(-1)
    kept = z.softmax(-1) * torch.isfinite(mask)
    other = kept / kept.sum(-1, keepdim=True)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(torch.autograd.grad(y, z, dy, retain_graph=True)[0] for y in (one, other)))


def test_the_divergence():
    p, q = torch.randn(2, 4, 7, dtype=torch.float64)
    want = 0.5 * sum(
        F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
        for a, b in ((p, q), (q, p))
    )
    torch.testing.assert_close(bidirectional_kl(p, q), want)
    assert bidirectional_kl(p, p) == 0 and bidirectional_kl(p, q) > 0


def test_a_cut_keeps_the_mean():
    torch.manual_seed(0)
    module = torch.nn.Identity()
    regulariser = HiddenKey(hidden=[module], p_hidden=0.3, kl=0.0)
    x = torch.ones(4, 50, 100, dtype=torch.float64, requires_grad=True)
    with regulariser.dropping():
        y, other = module(x), module(x)
    kept = y != 0
    torch.testing.assert_close(y, kept.double() / 0.7)
    assert abs(kept.double().mean() - 0.7) < 0.01 and not torch.equal(y, other)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llama(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=16, attn_implementation=request.param
    )
    return transformers.LlamaForCausalLM(config).train()


TOKENS = (torch.arange(3)[:, None] * 5 + torch.arange(8)) % 32


def parts(model):
    layers = model.model.layers
    return [one.self_attn for one in layers], [one.mlp for one in layers]


@pytest.mark.parametrize("padded", [False, True])
def test_on_a_transformer(llama, padded):
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    if padded:
        batch["attention_mask"] = torch.ones_like(TOKENS).index_fill_(1, torch.tensor([6, 7]), 0)
    plain = llama(**batch)
    attention, hidden = parts(llama)
    nothing = HiddenKey(attention, hidden, p_key=0.0, p_hidden=0.0, kl=1.0)
    torch.testing.assert_close(nothing.loss(lambda: llama(**batch)), plain.loss)
    one = HiddenKey(attention, hidden, p_key=0.5, p_hidden=0.1, kl=0.5)
    loss = one.loss(lambda: llama(**batch))
    loss.backward()
    assert loss.isfinite() and loss != plain.loss
    assert all(p.grad.isfinite().all() for p in llama.parameters() if p.grad is not None)
    assert torch.equal(llama(**batch).logits, plain.logits)
    llama.eval()
    with one.dropping():
        torch.testing.assert_close(llama(**batch).logits, plain.logits)
    llama.train()


def test_dropping_no_key_is_the_causal_mask(llama):
    """The mask that is made where there is none hides the future and no more."""
    attention, _ = parts(llama)
    want = llama(input_ids=TOKENS).logits
    with HiddenKey(attention, p_key=1e-12, kl=0.0).dropping():
        torch.testing.assert_close(llama(input_ids=TOKENS).logits, want, rtol=1e-4, atol=1e-5)
    with HiddenKey(attention, p_key=0.9, kl=0.0).dropping():
        first = llama(input_ids=TOKENS).logits[:, 0]
    torch.testing.assert_close(first, want[:, 0], rtol=1e-4, atol=1e-5)  # its one key stays


def test_bad_input():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="attention: expected modules to act on"):
        HiddenKey()
    with pytest.raises(TypeError, match="hidden: expected modules, got str"):
        HiddenKey(hidden=["mlp"])
    with pytest.raises(ValueError, match="p_key: expected 0 <= p_key < 1, got 1"):
        HiddenKey([module], p_key=1)
    with pytest.raises(ValueError, match="kl: expected 0 <= kl, got -1"):
        HiddenKey([module], kl=-1)
