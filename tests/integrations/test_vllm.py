"""The vLLM bridge on the published test shapes of vLLM's own kernels, against a loop over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from servers import peers_missing, vllm_batch, vllm_loop, vllm_meta

from lora_kernels import use_backend
from lora_kernels._backend import unavailable
from lora_kernels.integrations import vllm
from lora_kernels.testing.assertions import assert_close

DTYPES = (torch.float16, torch.bfloat16)
SCALING = 0.5
# The sizes that vLLM's tests/lora/test_punica_ops.py runs over. Its sequences of 128 tokens are shorter
# here, and the hidden size 2049 is 257 where only the memory of many wide adapters would grow.
GENERAL = list(itertools.product((1, 4, 16, 32), (1, 8, 32, 128), (1, 4, 8, 16, 32, 64, 128, 256), (1, 2, 3)))
HIDDEN = (2, 4, 14, 35, 64, 128, 150, 231, 256, 419, 512, 896, 1000, 1152, 1216, 1280, 2048, 2240, 3456, 4736)
# In Triton's interpreter, the same on fewer and smaller ones.
INTERPRETED = list(itertools.product((1, 4), (1, 32), (1, 8, 64), (2,)))
ORDERLY = ("reference", "cpp", "triton")


def general_case(number):
    batches, loras, rank, slices = GENERAL[number]
    hidden = 2049 if loras * rank <= 512 else 257
    return vllm_batch(batches, loras, rank, hidden, slices, DTYPES[number % 2], 2)


def hidden_case(hidden, slices, dtype):
    return vllm_batch(4, 4, 32, hidden, slices, dtype, 4)


def need(backend, dtype=torch.float16):
    if reason := unavailable(backend, "cpu", dtype, 8):
        pytest.skip(f"{backend}: {reason}")


def shrink(batch, module=vllm):
    slices, rank = len(batch.lora_a), batch.lora_a[0].shape[2]
    h = torch.full((slices, len(batch.mapping), rank), torch.nan, dtype=torch.float32)
    module.lora_shrink(batch.x, batch.lora_a, h, *batch.meta, SCALING)
    return h


def expand(batch, h, module=vllm):
    y = batch.y.clone()
    module.lora_expand(h, batch.lora_b, y, *batch.meta, offset_start=0, add_inputs=True)
    return y


def check(batch, backend):
    """Both calls and the fused one against fp64, bounded by the error of a loop in the same dtype."""
    dtype = batch.x.dtype
    exact_h, exact_y = vllm_loop(batch, SCALING, torch.float64)
    eager_h, eager_y = vllm_loop(batch, SCALING, dtype)
    given = exact_h.float()
    with use_backend(backend):
        h, y = shrink(batch), expand(batch, given)
        fused = batch.y.clone()
        vllm.add_lora_linear(fused, batch.x, batch.lora_a, batch.lora_b, *batch.meta, scaling=SCALING)
    assert_close(h, eager_h, exact_h, "h", dtype)
    assert_close(y, eager_y, exact_y, "y", ulps=1)
    assert_close(fused, eager_y, exact_y, "fused", ulps=1)
    none = batch.mapping < 0
    assert not h[:, none].any()
    assert torch.equal(y[none], batch.y[none])
    assert torch.equal(fused[none], batch.y[none])


@pytest.mark.parametrize("number", range(len(GENERAL)))
def test_published_cases_on_the_cpu(number):
    need("cpp")
    check(general_case(number), "cpp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slices", (1, 2, 3))
@pytest.mark.parametrize("hidden", HIDDEN)
def test_published_hidden_sizes_on_the_cpu(hidden, slices, dtype):
    need("cpp")
    check(hidden_case(hidden, slices, dtype), "cpp")


@pytest.mark.parametrize(("batches", "loras", "rank", "slices"), INTERPRETED)
def test_published_cases_in_triton(batches, loras, rank, slices):
    need("triton")
    check(vllm_batch(batches, loras, rank, 257, slices, DTYPES[rank % 3 % 2], 2), "triton")


@pytest.mark.parametrize("backend", ORDERLY)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_slices_of_several_widths_at_an_offset(backend, dtype, poisoned):
    need(backend)
    # 1100 columns: the shrink splits them.
    batch = vllm_batch(9, 5, 12, 1100, 3, dtype, 5, widths=[200, 40, 40])
    wide = torch.randn(len(batch.mapping), 300).to(dtype)
    y = wide[:, 3:290]  # rows with a stride of their own
    before = y.clone()
    batch.y = before
    exact, eager = (vllm_loop(batch, 1.0, d, offset=7)[1] for d in (torch.float64, dtype))
    with use_backend(backend):
        vllm.add_lora_linear(y, batch.x, batch.lora_a, batch.lora_b, *batch.meta, offset_start=7)
    assert_close(y, eager, exact, "y", ulps=1)
    assert torch.equal(y[:, :7], before[:, :7])
    assert torch.equal(y[batch.mapping < 0], before[batch.mapping < 0])


@pytest.mark.parametrize("backend", ORDERLY)
def test_replacing_leaves_what_has_no_adapter(backend):
    need(backend)
    batch = vllm_batch(6, 3, 8, 64, 2, torch.float16, 3)
    y, h = torch.full_like(batch.y, 3.0), torch.randn(2, len(batch.mapping), 8)
    none = batch.mapping < 0
    batch.y = torch.zeros_like(batch.y)
    exact, eager = (vllm_loop(batch, 1.0, d, h=h)[1] for d in (torch.float64, torch.float16))
    with use_backend(backend):
        vllm.lora_expand(h, batch.lora_b, y, *batch.meta, add_inputs=False)
    assert_close(y[~none], eager[~none], exact[~none], "y", ulps=1)
    assert (y[none] == 3.0).all()


@pytest.mark.parametrize("backend", ORDERLY)
def test_a_batch_without_adapters_touches_nothing(backend):
    need(backend)
    batch = vllm_batch(4, 3, 8, 64, 1, torch.float16, 2)
    batch.meta = vllm_meta(torch.full_like(batch.mapping, -1), 3)
    h = torch.full((1, len(batch.mapping), 8), 7.0)
    with use_backend(backend):
        vllm.lora_shrink(batch.x, batch.lora_a, h, *batch.meta, 1.0)
        y = expand(batch, h)
        vllm.add_lora_linear(y, batch.x, batch.lora_a, batch.lora_b, *batch.meta)
    assert (h == 7.0).all()
    assert torch.equal(y, batch.y)


@pytest.mark.parametrize("backend", ORDERLY)
def test_no_flag_no_segment_the_same(backend):
    """What a CUDA graph replays: the flag is not asked, and there is no segment."""
    need(backend)
    batch = vllm_batch(4, 3, 8, 64, 1, torch.float16, 2)
    meta = list(vllm_meta(torch.full_like(batch.mapping, -1), 3))
    meta[5] = torch.tensor([False])
    y = batch.y.clone()
    with use_backend(backend):
        vllm.add_lora_linear(y, batch.x, batch.lora_a, batch.lora_b, *meta)
    assert torch.equal(y, batch.y)


@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_a_row_does_not_depend_on_its_company(backend):
    need(backend)
    batch = vllm_batch(12, 4, 16, 700, 1, torch.float16, 4)
    whole = batch.y.clone()
    with use_backend(backend):
        vllm.add_lora_linear(whole, batch.x, batch.lora_a, batch.lora_b, *batch.meta)
        for t in range(0, len(batch.mapping), 5):
            alone = batch.y[t : t + 1].clone()
            meta = vllm_meta(batch.mapping[t : t + 1], 4)
            vllm.add_lora_linear(alone, batch.x[t : t + 1], batch.lora_a, batch.lora_b, *meta)
            assert torch.equal(alone[0], whole[t])


def test_nothing_to_do_for_no_tokens():
    batch = vllm_batch(2, 2, 8, 64, 1, torch.float16, 2)
    meta = vllm_meta(batch.mapping[:0], 2)
    vllm.add_lora_linear(batch.y[:0], batch.x[:0], batch.lora_a, batch.lora_b, *meta)


BAD = {
    "inputs: expected shape": lambda b: vllm.add_lora_linear(b.y, b.x[:, :5], b.lora_a, b.lora_b, *b.meta),
    "lora_a_weights: expected a sequence": lambda b: vllm.lora_shrink(
        b.x, b.lora_a[0], torch.empty(1, len(b.x), 8), *b.meta, 1.0
    ),
    "lora_a_weights: expected slices of one shape": lambda b: vllm.add_lora_linear(
        b.y, b.x, [b.lora_a[0], b.lora_a[0][:, :, :4]], b.lora_b, *b.meta
    ),
    "lora_a_weights: expected rows with unit stride": lambda b: vllm.add_lora_linear(
        b.y, b.x, [b.lora_a[0].transpose(2, 3)], b.lora_b, *b.meta
    ),
    "lora_b_weights: expected dense": lambda b: vllm.lora_expand(
        torch.empty(2, len(b.x), 4), b.lora_b, b.y, *b.meta
    ),
    "lora_b_weights: expected 2 slices": lambda b: vllm.add_lora_linear(
        b.y, b.x, b.lora_a, b.lora_b[:1], *b.meta
    ),
    "output: expected at least 138 columns": lambda b: vllm.add_lora_linear(
        b.y, b.x, b.lora_a, b.lora_b, *b.meta, offset_start=10
    ),
    "output_tensor: expected shape": lambda b: vllm.lora_shrink(
        b.x, b.lora_a, torch.empty(2, len(b.x), 9), *b.meta, 1.0
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    batch = vllm_batch(3, 2, 8, 64, 2, torch.float16, 2)
    with pytest.raises(ValueError, match=message):
        BAD[message](batch)


def test_stacks_of_several_dtypes_are_named():
    batch = vllm_batch(3, 2, 8, 64, 2, torch.float16, 2)
    with pytest.raises(TypeError, match="lora_b_weights: expected Tensors of one dtype"):
        vllm.lora_expand(
            torch.empty(2, 3, 8), [batch.lora_b[0], batch.lora_b[1].float()], batch.y, *batch.meta
        )


# Beside vLLM's own kernels, where they are: in the interpreter, which multiplies float16 rightly. Their tile
# sizes, which vLLM takes from a configuration, are such that the interpreter has few programs to run.
TILES = {"shrink": {"split_k": 4, "block_n": 64}, "expand": {"block_n": 256, "block_k": 64}}
BESIDE = [
    *(("general", n) for n in range(len(GENERAL)) if GENERAL[n][1] <= 32 and GENERAL[n][0] <= 16),
    *(("hidden", (hidden, slices)) for hidden in HIDDEN for slices in (1, 2, 3) if hidden <= 2300),
]


@pytest.mark.parametrize(("kind", "what"), BESIDE)
def test_beside_the_kernels_of_vllm(kind, what, record_property, monkeypatch):
    if reason := peers_missing():
        pytest.skip(reason)
    need("triton")
    from vllm.lora.ops import triton_ops
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils

    def tiles(op_type, **options):
        return utils.get_lora_op_configs(op_type, **options) | TILES[op_type]

    for module in (lora_shrink_op, lora_expand_op):
        monkeypatch.setattr(module, "get_lora_op_configs", tiles)
    if kind == "hidden":
        batch = hidden_case(*what, torch.float16)
    else:
        batches, loras, rank, slices = GENERAL[what]
        batch = vllm_batch(batches, loras, rank, 257, slices, torch.float16, 2)
    utils._LORA_A_PTR_DICT.clear()  # addresses are used again
    utils._LORA_B_PTR_DICT.clear()
    exact_h, exact_y = vllm_loop(batch, SCALING, torch.float64)
    eager_h, eager_y = vllm_loop(batch, SCALING, torch.float16)
    theirs_h, theirs_y = shrink(batch, triton_ops), expand(batch, exact_h.float(), triton_ops)
    with use_backend("triton"):
        ours_h, ours_y = shrink(batch), expand(batch, exact_h.float())
    for name, ours, theirs, eager, exact in (
        ("h", ours_h, theirs_h, eager_h, exact_h),
        ("y", ours_y, theirs_y, eager_y, exact_y),
    ):
        ours_error, theirs_error = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
        record_property(f"{name}_ours", ours_error)
        record_property(f"{name}_theirs", theirs_error)
        record_property(f"{name}_apart", (ours.double() - theirs.double()).abs().max().item())
        assert_close(ours, eager, exact, f"{name}, ours", torch.float16, ulps=1)
        assert_close(theirs, eager, exact, f"{name}, theirs", torch.float16, ulps=1)
