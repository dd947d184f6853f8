"""The plan of a batch: every slot once, sorted by adapter, in fixed buffers."""

import pytest
import torch

from lora_kernels import BatchPlan, plan_batch, use_backend

BACKENDS = ("reference", "cpp", "triton")
SHAPES = [(1, 1), (7, 3), (40, 2), (33, 50), (0, 4), (100, 7)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "adapters"), SHAPES)
def test_it_is_the_sort_of_the_ids(backend, rows, adapters, device):
    ids = torch.randint(-2, adapters + 3, (rows,), device=device)
    with use_backend(backend):
        plan = plan_batch(ids, adapters)
    known = torch.where((ids >= 0) & (ids < adapters), ids, adapters)
    assert torch.equal(plan.ids, known)
    assert torch.equal(plan.order.long(), known.sort(stable=True).indices)
    assert plan.offsets.tolist() == [int((known < a).sum()) for a in range(adapters + 2)]
    served = []
    for adapter, first in plan.tiles.tolist():
        if adapter >= 0:
            last = min(first + 16, int(plan.offsets[adapter + 1]))
            slots = plan.order[first:last].tolist()
            assert slots and all(int(known[s]) == adapter for s in slots)
            served += slots
    assert sorted(served) == list(range(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_are_reused_and_what_is_left_has_no_adapter(backend, device):
    plan = BatchPlan.allocate(20, 3, device)
    addresses = [t.data_ptr() for t in plan]
    for rows in (20, 5, 13):
        ids = torch.randint(-1, 3, (rows,), device=device)
        with use_backend(backend):
            assert plan_batch(ids, 3, out=plan) is plan
            padded = torch.cat([ids, ids.new_full((20 - rows,), -1)])
            whole = plan_batch(padded, 3)
        assert [t.data_ptr() for t in plan] == addresses
        assert torch.equal(plan.order, whole.order) and torch.equal(plan.offsets, whole.offsets)
        assert torch.equal(plan.ids, whole.ids) and torch.equal(plan.tiles[:, 0], whole.tiles[:, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_any_width_and_shape(backend, dtype, device):
    ids = torch.tensor([[2, 0, 7], [1, 2, 2]], device=device, dtype=dtype)
    with use_backend(backend):
        assert plan_batch(ids, 3).ids.tolist() == [2, 0, 3, 1, 2, 2]


def test_a_batch_too_large_for_one_program(device):
    ids = torch.randint(-1, 5, (700,), device=device)
    plans = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            plans.append(plan_batch(ids, 5))
    assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))


@pytest.mark.parametrize(
    ("ids", "out", "error", "match"),
    [
        (torch.zeros(3), None, TypeError, "adapter_ids: expected a Tensor of integers"),
        ([1], None, TypeError, "adapter_ids: expected a Tensor of integers, got list"),
        (torch.zeros(3, dtype=torch.long), (2, 4), ValueError, "out: expected 3 slots and 4 adapters, got 2"),
        (torch.zeros(3, dtype=torch.long), (3, 5), ValueError, "out: expected 3 slots and 4 adapters"),
    ],
)
def test_bad_input(ids, out, error, match):
    with pytest.raises(error, match=match):
        plan_batch(ids, 4, out=None if out is None else BatchPlan.allocate(*out))
