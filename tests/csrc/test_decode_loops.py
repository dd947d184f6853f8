"""The loops of the CUDA decode kernels, run on the CPU by a simulation of a cluster's warps.

The same headers are compiled by nvcc and by the host's compiler. Shared memory starts as NaN, and so do
results, sums between launches and the pages of nobody: what is not written, or read beyond its end, shows.
"""

from __future__ import annotations

import decode_harness as harness
import pytest
import torch

from lora_kernels.ops import _decode
from lora_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(harness.missing is not None, reason=str(harness.missing))
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library(made_once):
    return harness.load_simulation(made_once("decode_simulation", harness.compile_simulation))


class Adapters:
    """Adapters of each projection, and the same in fp64."""

    def __init__(self, ranks, cols, outs, dtype):
        self.a = [[(torch.randn(r, cols) / cols**0.5).to(dtype) for r in ranks] for _ in outs]
        self.b = [[torch.randn(out, r).to(dtype) for r in ranks] for out in outs]
        self.scalings = torch.rand(len(ranks)) + 0.5
        self.stacks = [harness.scattered(a, b, self.scalings) for a, b in zip(self.a, self.b, strict=True)]

    def delta(self, x, ids, kind):
        """Row after row in the dtype ``kind``, as eager PyTorch computes it."""
        rows = []
        for row, i in zip(x.to(kind), ids.tolist(), strict=True):
            parts = []
            for a, b in zip(self.a, self.b, strict=True):
                if i < 0:
                    parts.append(row.new_zeros(b[0].shape[0]))
                    continue
                h = row @ a[i].to(kind).T
                parts.append((h * self.scalings[i].to(kind)) @ b[i].to(kind).T)
            rows.append(torch.cat(parts))
        return torch.stack(rows)


def check(library, ids, ranks, cols, outs, dtype, base=False, bias=False, **options):
    adapters = Adapters(ranks, cols, outs, dtype)
    x = torch.randn(len(ids), cols).to(dtype)
    weight = (torch.randn(sum(outs), cols) / cols**0.5).to(dtype) if base else None
    b = torch.randn(sum(outs)).to(dtype) if bias else None
    y = harness.simulate(library, x, adapters.stacks, ids, weight, b, **options)
    results = {}
    for kind in (dtype, torch.float64):
        results[kind] = adapters.delta(x, ids, kind)
        if base:
            results[kind] = results[kind] + x.to(kind) @ weight.to(kind).T
        if bias:
            results[kind] = results[kind] + b.to(kind)
    assert_close(y, results[dtype], results[torch.float64], "y", dtype)
    return y


@pytest.mark.parametrize("two_launches", (False, True), ids=("cluster", "two_launches"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_ranks_and_rows_without_an_adapter(library, dtype, two_launches):
    ids = torch.tensor([3, -1, 0, 5, 0, 2, 4, -1, 1, 0])
    y = check(library, ids, (3, 16, 33, 1, 0, 8), 304, [160], dtype, two_launches=two_launches)
    assert not y[ids < 0].any() and not y[ids == 4].any()


@pytest.mark.parametrize("rank", (1, 7, 15, 17, 64, 128, 256))
def test_ranks(library, rank):
    check(library, torch.tensor([0, 1, 0]), (rank, 5), 128, [48], torch.bfloat16)


@pytest.mark.parametrize(("cols", "out"), ((16, 16), (48, 4112), (4112, 16), (640, 272)))
@pytest.mark.parametrize("two_launches", (False, True), ids=("cluster", "two_launches"))
def test_shapes(library, cols, out, two_launches):
    """Slices that are empty, of one unit, and of more steps than there are stages."""
    check(library, torch.tensor([1, 0]), (4, 20), cols, [out], torch.bfloat16, two_launches=two_launches)


def test_more_rows_of_one_adapter_than_a_tile_has(library):
    ids = torch.cat([torch.zeros(19, dtype=torch.long), torch.tensor([1, -1])])[torch.randperm(21)]
    check(library, ids, (6, 9), 80, [64], torch.float16)


@pytest.mark.parametrize("two_launches", (False, True), ids=("cluster", "two_launches"))
def test_projections_of_one_input(library, two_launches):
    """Query, key and value in one launch, side by side in y."""
    ids = torch.tensor([1, 0, -1, 1])
    check(library, ids, (5, 18), 144, [96, 32, 48], torch.bfloat16, two_launches=two_launches)


QKV = {"q": (5, 18, 0, 1), "k": (0, 3, 40, 0), "v": (16, 0, 2, 0)}
WIDTHS = {"q": 96, "k": 32, "v": 304}


def qkv(dtype, cols=144):
    """Stacks of other widths, ranks and scalings, for one x."""
    return [Adapters(ranks, cols, [WIDTHS[name]], dtype) for name, ranks in QKV.items()]


def added(linears, y, x, ids, weights, kind):
    """y + w delta in the dtype ``kind``, one linear after the other."""
    deltas = torch.cat([linear.delta(x, ids, kind) for linear in linears], 1)
    return y.to(kind) + (deltas if weights is None else weights.to(kind)[:, None] * deltas)


@pytest.mark.parametrize("two_launches", (False, True), ids=("cluster", "two_launches"))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_adds_the_deltas_of_query_key_and_value(library, dtype, weighted, two_launches):
    """Each with its own ranks and scalings; rows with no page in a linear keep their bits."""
    linears, ids = qkv(dtype), torch.tensor([1, 0, -1, 3, 1, 2, 0, -1, 2])
    x, base = torch.randn(9, 144).to(dtype), torch.randn(9, 432).to(dtype)
    weights = torch.rand(9) if weighted else None
    stacks, y = [linear.stacks[0] for linear in linears], base.clone()
    harness.simulate_add(library, y, x, stacks, ids, weights, two_launches)
    eager, exact = (added(linears, base, x, ids, weights, kind) for kind in (dtype, torch.float64))
    assert_close(y, eager, exact, "y", dtype)
    broken = torch.full_like(base, torch.nan)
    harness.simulate_add(library, broken, x, stacks, ids, weights, two_launches)
    assert broken.isnan().all(), "what was there counts"
    first = 0
    for ranks, width in zip(QKV.values(), WIDTHS.values(), strict=True):
        untouched = torch.tensor([i < 0 or ranks[i] == 0 for i in ids.tolist()])
        part = slice(first, first + width)
        assert torch.equal(y[untouched, part], base[untouched, part])
        first += width


@pytest.mark.parametrize("rank", (1, 15, 17, 128, 256))
def test_it_adds_to_part_of_a_wider_matrix(library, rank):
    """More rows of an adapter than a tile has, more columns than a step has, and nothing beside them."""
    linear = Adapters((rank, 5), 80, [2080], torch.float16)
    x, ids = torch.randn(21, 80).half(), torch.tensor([0] * 18 + [1, -1, 1])
    wide = torch.randn(21, 2112).half()
    before = wide.clone()
    harness.simulate_add(library, wide[:, 16:2096], x, linear.stacks, ids)
    eager, exact = (
        added([linear], before[:, 16:2096], x, ids, None, kind) for kind in (x.dtype, torch.float64)
    )
    assert_close(wide[:, 16:2096], eager, exact, "y", x.dtype)
    assert torch.equal(wide[:, :16], before[:, :16]) and torch.equal(wide[:, 2096:], before[:, 2096:])


def test_what_is_added_does_not_depend_on_the_company(library):
    """Bitwise: of rows, of linears in the launch, and whether the sums go through a cluster's memory."""
    stacks = [linear.stacks[0] for linear in qkv(torch.bfloat16)]
    x, base, ids = torch.randn(20, 144).bfloat16(), torch.randn(20, 432).bfloat16(), torch.arange(20) % 5 - 1
    whole = base.clone()
    harness.simulate_add(library, whole, x, stacks, ids)
    some = torch.randperm(20)[:7]
    few, two, alone = base[some], base.clone(), base.clone()
    harness.simulate_add(library, few, x[some].contiguous(), stacks, ids[some])
    harness.simulate_add(library, two, x, stacks, ids, two_launches=True)
    for part, stack in zip(alone.split(list(WIDTHS.values()), 1), stacks, strict=True):
        harness.simulate_add(library, part, x, [stack], ids)
    assert torch.equal(few, whole[some]) and torch.equal(two, whole) and torch.equal(alone, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 3, 8))
def test_with_the_base_product(library, rows, dtype):
    ids = torch.tensor([2, -1, 0, 0, 1, 3, 2, -1])[:rows]
    check(library, ids, (4, 16, 21, 0), 272, [304], dtype, base=True, bias=True)


@pytest.mark.parametrize(("cols", "out", "clusters"), ((16, 16, 1), (2160, 48, 3), (96, 2064, 1)))
def test_shapes_with_the_base_product(library, cols, out, clusters):
    ids = torch.tensor([1, 0, 0])
    check(library, ids, (17, 2), cols, [out], torch.bfloat16, base=True, clusters=clusters)


def test_projections_with_the_base_product(library):
    ids = torch.tensor([1, 0, -1, 1])
    check(library, ids, (5, 18), 144, [96, 32, 48], torch.bfloat16, base=True, bias=True)


def test_the_base_product_where_no_row_has_an_adapter(library):
    check(library, torch.tensor([-1, -1]), (5, 18), 144, [96], torch.float16, base=True)


@pytest.mark.parametrize("base", (False, True))
def test_a_row_does_not_depend_on_its_company(library, base):
    """Bitwise, and whether the sums go through a cluster's memory or through two launches."""
    adapters = Adapters((3, 16, 40), 288, [112], torch.bfloat16)
    weight = torch.randn(112, 288).bfloat16() if base else None
    rows = 8 if base else 20
    x, ids = torch.randn(rows, 288).bfloat16(), torch.randint(-1, 3, (rows,))
    whole = harness.simulate(library, x, adapters.stacks, ids, weight)
    for _ in range(3):
        some = torch.randperm(rows)[: int(torch.randint(1, rows, ()))]
        y = harness.simulate(library, x[some].contiguous(), adapters.stacks, ids[some], weight, clusters=1)
        assert torch.equal(y, whole[some])
    if not base:
        assert torch.equal(harness.simulate(library, x, adapters.stacks, ids, two_launches=True), whole)


@pytest.mark.parametrize("base", (False, True))
def test_a_broken_adapter_harms_its_own_rows_alone(library, base):
    adapters = Adapters((3, 5), 64, [32], torch.bfloat16)
    stack = adapters.stacks[0]
    own = stack.pages[:3].long()
    stack.a_pages[own], stack.b_pages[own] = torch.nan, torch.inf
    weight = torch.randn(32, 64).bfloat16() if base else None
    x, ids = torch.randn(4, 64).bfloat16(), torch.tensor([0, 1, -1, 0])
    y = harness.simulate(library, x, adapters.stacks, ids, weight)
    assert y[ids == 0].isnan().all() and y[ids != 0].isfinite().all()


@pytest.mark.parametrize("cols", (16, 512, 4096, 14336, 28672))
def test_the_bound_on_shared_memory_holds(library, cols):
    """What Python decides by, against the layout that the kernels use."""
    for rank in (1, 16, 100, 256):
        needed = library.shared_bytes_of(16, cols, rank, 64, 0)
        assert needed <= _decode.shared_bytes(16, cols, rank) <= needed + 4 * 1024
    largest = library.shared_bytes_of(8, 16384, 32, 8, 1024)
    assert largest <= 163 * 1024, "the fused kernel fits every card with clusters"


def test_columns_of_a_cluster_cover_the_weight(library):
    for out in (16, 48, 4096, 14336, 128256):
        for clusters in (1, 16, 33):
            each = library.columns_per_cluster_of(out, clusters)
            assert each % 16 == 0 and 16 <= each <= 1024 and each * -(-out // each) >= out
