"""Averaged factors in one batch: against the sum as it is written, in fp64, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import multi_lora_fusion, multi_lora_linear, stack_adapters, use_backend
from lora_kernels.testing import assert_close

COLS, OUT = 19, 13
WIDE = torch.float64
# x's leading dimensions, and how many of them have adapters of their own.
SHAPES = {
    "long samples": ((3, 9), 1),
    "short samples": ((3, 2), 1),
    "rows": ((3, 9), 2),
    "a matrix": ((7,), 1),
    "a vector": ((), 0),
    "more dimensions": ((2, 3, 4), 1),
    "no samples": ((0, 9), 1),
    "no rows": ((2, 0), 1),
}
RANKS = {"equal": (3, 3, 3), "different": (3, 1, 0, 4)}


class Batch:
    """Leaves of one call; ``k`` adapters a row or sample, some of them none."""

    def __init__(self, shape="long samples", ranks=(3, 3, 3), k=2, dtype=WIDE, seed=0):
        make = torch.Generator().manual_seed(seed)
        lead, depth = SHAPES[shape]

        def leaf(*size):
            return torch.randn(*size, generator=make, dtype=WIDE).to(dtype).requires_grad_()

        self.x, self.weight, self.bias = leaf(*lead, COLS), leaf(OUT, COLS), leaf(OUT)
        self.lora_as, self.lora_bs = [leaf(r, COLS) for r in ranks], [leaf(OUT, r) for r in ranks]
        self.scalings, self.weights = leaf(len(ranks)), leaf(*lead[:depth], k)
        self.ids = torch.randint(-1, len(ranks), self.weights.shape, generator=make)
        self.leaves = [self.x, self.weight, self.bias, self.scalings, self.weights]
        self.leaves += [*self.lora_as, *self.lora_bs]

    def to(self, dtype):
        """The same numbers in another dtype, as leaves of their own."""
        other = object.__new__(type(self))
        other.ids = self.ids
        for name in ("x", "weight", "bias", "scalings", "weights"):
            setattr(other, name, getattr(self, name).detach().to(dtype).requires_grad_())
        for name in ("lora_as", "lora_bs"):
            setattr(other, name, [t.detach().to(dtype).requires_grad_() for t in getattr(self, name)])
        other.leaves = [other.x, other.weight, other.bias, other.scalings, other.weights]
        other.leaves += [*other.lora_as, *other.lora_bs]
        return other

    def stack(self):
        return stack_adapters(self.lora_as, self.lora_bs, self.scalings)

    def fused(self, **options):
        args = (self.x, self.weight, self.stack(), self.ids, self.weights, self.bias)
        return multi_lora_fusion(*args, **options)

    def each_row(self, values):
        """What a sample has, for each row."""
        lead, k = self.x.shape[:-1], values.shape[-1]
        missing = [1] * (len(lead) + 1 - values.dim())
        return values.reshape(*values.shape[:-1], *missing, k).expand(*lead, k).reshape(-1, k)

    def plain(self):
        """One row after the other, adapter by adapter."""
        rank = max(len(a) for a in self.lora_as)
        lora_as = [F.pad(a, (0, 0, 0, rank - len(a))) for a in self.lora_as]
        lora_bs = [
            F.pad(b, (0, rank - b.shape[1])) * s for b, s in zip(self.lora_bs, self.scalings, strict=True)
        ]
        ys = []
        for x, ids, weights in zip(
            self.x.reshape(-1, COLS), self.each_row(self.ids), self.each_row(self.weights), strict=True
        ):
            own = [(w, i) for w, i in zip(weights, ids.tolist(), strict=True) if i >= 0]
            a = sum((w * lora_as[i] for w, i in own), torch.zeros_like(lora_as[0]))
            b = sum((w * lora_bs[i] for w, i in own), torch.zeros_like(lora_bs[0]))
            ys.append(b @ (a @ x))
        delta = torch.stack(ys).view(*self.x.shape[:-1], OUT) if ys else self.x[..., :OUT]
        return F.linear(self.x, self.weight, self.bias) + delta


def outputs(batch, y, dy):
    return [y, *torch.autograd.grad(y, batch.leaves, dy.to(y.dtype), materialize_grads=True)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient(shape, ranks):
    batch = Batch(shape, RANKS[ranks])
    dy = torch.randn(*batch.x.shape[:-1], OUT, dtype=WIDE)
    for got, want in zip(outputs(batch, batch.fused(), dy), outputs(batch, batch.plain(), dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("shape", ["long samples", "rows"])
def test_backends_and_dtypes(any_backend, backend, shape):
    exact = Batch(shape)
    dy = torch.randn(*exact.x.shape[:-1], OUT, dtype=WIDE)
    for dtype in (torch.float32, torch.bfloat16)[: 1 if backend == "triton" else 2]:
        ours, eager, wide = exact.to(dtype), exact.to(dtype), exact.to(dtype).to(WIDE)
        with use_backend(backend):
            got = outputs(ours, ours.fused(), dy)
        plain, want = (outputs(one, one.plain(), dy.to(dtype)) for one in (eager, wide))
        for one, two, three in zip(got, plain, want, strict=True):
            assert_close(one, two, three, dtype=dtype, ulps=4)


@pytest.mark.parametrize("shape", ["long samples", "rows"])
@pytest.mark.parametrize("fusion", [True, False])
def test_a_row_is_the_same_whoever_else_is_in_the_batch(shape, fusion):
    """Bit for bit, with the base left out, whose product is the vendor's."""
    call = multi_lora_fusion if fusion else multi_lora_linear
    batch = Batch(shape, RANKS["different"], dtype=torch.float32)
    stack = batch.stack()
    with torch.no_grad():
        whole = call(batch.x, None, stack, batch.ids, batch.weights)
        for i in range(len(whole)):
            part = slice(i, i + 1)
            assert torch.equal(
                call(batch.x[part], None, stack, batch.ids[part], batch.weights[part]), whole[part]
            )


def test_it_is_the_mixture_where_one_adapter_has_all_the_weight_and_else_not():
    batch = Batch()
    with torch.no_grad():
        mixed = [batch.x, batch.weight, batch.stack(), batch.ids]
        weights = torch.zeros_like(batch.weights)
        weights[:, 1] = 1.0
        torch.testing.assert_close(multi_lora_fusion(*mixed, weights), multi_lora_linear(*mixed, weights))
        other = multi_lora_linear(*mixed, batch.weights)
        assert not torch.allclose(multi_lora_fusion(*mixed, batch.weights), other)


def test_weights_of_a_sample_are_those_of_its_rows_in_a_mixture():
    batch = Batch()
    samples, rows, k = *batch.x.shape[:2], batch.ids.shape[1]
    spread = [t[:, None].expand(samples, rows, k) for t in (batch.ids, batch.weights)]
    args = (batch.x, batch.weight, batch.stack())
    y, want = (multi_lora_linear(*args, *own) for own in ((batch.ids, batch.weights), spread))
    assert torch.equal(y, want)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(one, [batch.weights, *batch.lora_as], dy) for one in (y, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


class _Largest(TorchDispatchMode):
    """The largest result that any operation gave."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.size = max(self.size, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("shape", ["long samples", "rows"])
def test_nothing_grows_by_rows_and_adapters_and_columns(shape):
    experts, rows, cols = 8, 16, 40
    torch.manual_seed(0)
    stack = stack_adapters([torch.randn(2, cols)] * experts, [torch.randn(cols, 2)] * experts)
    x = torch.randn(2, rows, cols, requires_grad=True)
    lead = (2,) if shape == "long samples" else (2, rows)
    weights = torch.rand(*lead, experts, requires_grad=True)
    ids = torch.arange(experts).expand_as(weights)
    with _Largest() as seen:
        multi_lora_fusion(x, torch.randn(cols, cols), stack, ids, weights).sum().backward()
    assert seen.size <= max(x.numel(), cols * cols)


def test_dropout_has_one_mask_for_all_factors():
    batch = Batch("long samples")
    with torch.no_grad():
        for part in (batch.lora_as, batch.lora_bs):
            for factor in part:
                factor.copy_(part[0])
        ids, ones = torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5, dtype=WIDE)
        args = (batch.x, None, stack_adapters(batch.lora_as, batch.lora_bs), ids, ones)
        torch.manual_seed(5)
        first = multi_lora_fusion(*args, dropout_p=0.5)
        torch.manual_seed(5)
        assert torch.equal(first, multi_lora_fusion(*args, dropout_p=0.5))
        single = stack_adapters(batch.lora_as[:1], batch.lora_bs[:1])
        torch.manual_seed(5)
        alone = multi_lora_linear(batch.x, None, single, torch.zeros(3, dtype=torch.long), dropout_ps=[0.5])
        torch.testing.assert_close(first, alone)
        plain = multi_lora_fusion(*args, dropout_p=0.5, training=False)
        assert torch.equal(plain, multi_lora_fusion(*args)) and not torch.allclose(plain, first)


def test_a_pool_of_many_takes_those_that_are_used():
    torch.manual_seed(0)
    lora_as, lora_bs = [torch.randn(2, COLS) for _ in range(40)], [torch.randn(OUT, 2) for _ in range(40)]
    x, ids, weights = torch.randn(2, 5, COLS), torch.tensor([[39, -1], [7, 39]]), torch.rand(2, 2)
    y = multi_lora_fusion(x, None, stack_adapters(lora_as, lora_bs), ids, weights)
    few = torch.tensor([[1, -1], [0, 1]])
    want = multi_lora_fusion(x, None, stack_adapters(lora_as[7::32], lora_bs[7::32]), few, weights)
    torch.testing.assert_close(y, want)


def test_compiles_whole():
    torch._dynamo.reset()
    batch = Batch(dtype=torch.float32)
    compiled = torch.compile(batch.fused, fullgraph=True, backend="aot_eager")
    y, want = compiled(), batch.fused()
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for one, other in zip(outputs(batch, y, dy), outputs(batch, want, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["long samples", "rows"])
def test_under_autocast(shape):
    batch = Batch(shape, dtype=torch.float32)
    half = batch.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = batch.fused()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, half.fused(), rtol=0.05, atol=0.5)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in batch.leaves)


def test_bad_input():
    batch = Batch(dtype=torch.float32)
    args = (batch.x, batch.weight, batch.stack(), batch.ids)
    with pytest.raises(TypeError, match="weights: expected a Tensor, got NoneType"):
        multi_lora_fusion(*args, None)
    with pytest.raises(ValueError, match=r"dropout_p: expected 0 <= p < 1, got 1\.0"):
        multi_lora_fusion(*args, batch.weights, dropout_p=1.0)
    with pytest.raises(
        ValueError, match=r"weights: expected \(3, 9, 'k'\) or \(3, 'k'\) for both, got \(3, 1\)"
    ):
        multi_lora_fusion(*args, batch.weights[:, :1])
    with pytest.raises(ValueError, match="adapter_ids: expected below 3, got 3"):
        multi_lora_fusion(*args[:3], torch.full_like(batch.ids, 3), batch.weights)
    with pytest.raises(TypeError, match="adapters: expected an AdapterStack, got list"):
        multi_lora_fusion(*args[:2], batch.lora_as, batch.ids, batch.weights)
