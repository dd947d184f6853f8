"""The SGLang bridge against a loop over tokens, and beside SGLang's own kernels where they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from servers import cut, peers_missing, sglang_info, sglang_loop

from lora_kernels import use_backend
from lora_kernels._backend import unavailable
from lora_kernels.integrations import sglang
from lora_kernels.testing.assertions import assert_close

BACKENDS = ("reference", "cpp", "triton")
RANKS, SCALINGS = torch.tensor([0, 8, 16, 4], dtype=torch.int32), torch.tensor([0.0, 0.5, 2.0, 1.0])


def need(backend):
    if reason := unavailable(backend, "cpu", torch.float16, 8):
        pytest.skip(f"{backend}: {reason}")


def stacks(dtype, sizes, cols=160, max_rank=16):
    """A and B of four adapters; what an adapter does not own is not a number."""
    count, total = len(sizes), sum(sizes)
    lora_a = torch.full((4, count * max_rank, cols), torch.nan, dtype=dtype)
    lora_b = torch.full((4, total, max_rank), torch.nan, dtype=dtype)
    for i, rank in enumerate(RANKS.tolist()):
        lora_a[i, : count * rank] = cut(dtype, count * rank, cols, place=i, scale=cols**-0.5)
        lora_b[i, :, :rank] = cut(dtype, total, rank, place=i, scale=0.25)
    return lora_a, lora_b


def batch(dtype, sizes, tokens=23, cols=160):
    adapters = torch.randint(0, 4, (tokens,), generator=torch.Generator().manual_seed(3))
    return torch.randn(tokens, cols).to(dtype), torch.randn(tokens, sum(sizes)).to(dtype), adapters


@pytest.mark.spread("backend", "chunk", "sizes", of=3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", (None, 3, 64))
@pytest.mark.parametrize("sizes", ([96], [64, 24, 24], [40, 40]))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_segments_ranks_and_slices(backend, chunk, sizes, dtype):
    need(backend)
    lora_a, lora_b = stacks(dtype, sizes)
    x, y, adapters = batch(dtype, sizes)
    info = sglang_info(adapters, RANKS, SCALINGS, chunk=chunk, spare=3)
    given = (x, lora_a, lora_b, adapters, RANKS, SCALINGS, sizes, y)
    exact, eager = (sglang_loop(*given, kind) for kind in (torch.float64, dtype))
    with use_backend(backend):
        got = sglang.add_lora_linear(y.clone(), x, lora_a, lora_b, info, sizes)
    assert_close(got, eager, exact, "y", ulps=1)
    assert torch.equal(got[adapters == 0], y[adapters == 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_from_the_bounds(backend):
    need(backend)
    lora_a, lora_b = stacks(torch.float16, [96])
    x, y, adapters = batch(torch.float16, [96])
    info = sglang_info(adapters, RANKS, SCALINGS, chunk=5)
    with use_backend(backend):
        one, other = (
            sglang.add_lora_linear(y.clone(), x, lora_a, lora_b, which)
            for which in (info, replace(info, seg_lens=None))
        )
    assert torch.equal(one, other)


def test_no_tokens():
    lora_a, lora_b = stacks(torch.float16, [96])
    info = sglang_info(torch.tensor([1]), RANKS, SCALINGS)
    y = torch.empty(0, 96, dtype=torch.float16)
    assert sglang.add_lora_linear(y, torch.empty(0, 160, dtype=torch.float16), lora_a, lora_b, info) is y


@pytest.mark.parametrize(
    ("message", "sizes", "cols", "out"),
    [
        ("output_sizes: expected a sum of 96", [90], 160, 96),
        ("lora_a: expected 2 x 16 rows", [48, 48], 160, 96),
        ("x: expected shape", None, 150, 96),
        ("output: expected at least 96 columns", None, 160, 90),
    ],
)
def test_what_does_not_fit_is_named(message, sizes, cols, out):
    lora_a, lora_b = stacks(torch.float16, [96])
    info = sglang_info(torch.tensor([1, 2]), RANKS, SCALINGS)
    x, y = torch.empty(2, cols, dtype=torch.float16), torch.empty(2, out, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        sglang.add_lora_linear(y, x, lora_a, lora_b, info, sizes)


@pytest.mark.parametrize("sizes", ([128], [128, 64, 64]))
@pytest.mark.parametrize("tokens", (1, 9, 40))
def test_beside_the_kernels_of_sglang(sizes, tokens):
    if reason := peers_missing():
        pytest.skip(reason)
    need("triton")
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward

    lora_a, lora_b = (stack.nan_to_num(0.0) for stack in stacks(torch.float16, sizes, cols=512))
    x, y, adapters = batch(torch.float16, sizes, tokens, cols=512)
    info = sglang_info(adapters, RANKS, SCALINGS, chunk=16)
    info.max_len = 16
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    h = chunked_sgmv_lora_shrink_forward(x, lora_a, info, len(sizes))
    theirs = y.clone()
    chunked_sgmv_lora_expand_forward(h, lora_b, info, offsets, max(sizes), theirs)
    with use_backend("triton"):
        ours = sglang.add_lora_linear(y.clone(), x, lora_a, lora_b, info, sizes)
    given = (x, lora_a, lora_b, adapters, RANKS, SCALINGS, sizes, y)
    exact, eager = (sglang_loop(*given, kind) for kind in (torch.float64, torch.float16))
    assert_close(ours, eager, exact, "ours", ulps=1)
    assert_close(theirs, eager, exact, "theirs", ulps=1)
