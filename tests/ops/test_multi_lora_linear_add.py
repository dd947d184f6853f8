"""The delta added in place, alone and for several linears at once, against the loop in fp64."""

import pytest
import torch

from lora_kernels import (
    add_multi_lora_,
    multi_lora_linear,
    multi_lora_linear_slices,
    plan_batch,
    slice_adapters,
    stack_adapters,
    use_backend,
)
from lora_kernels.testing import assert_close

BACKENDS = ("reference", "cpp", "triton")
RANKS = {"q": (3, 0, 16, 40), "k": (5, 2, 0, 1), "v": (0, 33, 4, 8)}
WIDTHS = {"q": 50, "k": 17, "v": 64}
SCALINGS = [0.5, 2.0, 1.0, 0.25]


def factors(linear, cols=72):
    make = torch.Generator().manual_seed(len(linear) + WIDTHS[linear])
    ranks = RANKS[linear]
    return (
        [torch.randn(r, cols, generator=make) / 4 for r in ranks],
        [torch.randn(WIDTHS[linear], r, generator=make) / 4 for r in ranks],
    )


def stack(linear, dtype, device):
    lora_as, lora_bs = factors(linear)
    return stack_adapters(
        [a.to(device, dtype) for a in lora_as], [b.to(device, dtype) for b in lora_bs], SCALINGS
    )


def added(linear, y, x, ids, weights, dtype):
    """y + the deltas, row by row in x's dtype from factors rounded to ``dtype``."""
    lora_as, lora_bs = ([t.to(dtype).to(x.dtype) for t in part] for part in factors(linear))
    y = y.clone()
    for m, row in enumerate(ids.reshape(len(x), -1).tolist()):
        for j, i in enumerate(row):
            if i >= 0:
                c = SCALINGS[i] * (1.0 if weights is None else weights.reshape(len(x), -1)[m, j].to(x.dtype))
                y[m] += (c * (x[m : m + 1] @ lora_as[i].T) @ lora_bs[i].T)[0]
    return y


@pytest.mark.spread("backend", "dtype", "linears", "k", of=3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linears", [("q",), ("q", "k", "v")], ids="-".join)
@pytest.mark.parametrize("k", [None, 2])
def test_it_adds_what_the_loop_adds(backend, dtype, linears, k, device):
    ids = torch.randint(-1, 4, (27,) if k is None else (27, k))
    weights = None if k is None else torch.rand(27, k)
    x, base = torch.randn(27, 72).to(dtype), torch.randn(27, sum(WIDTHS[name] for name in linears)).to(dtype)
    y = base.to(device, copy=True)
    slices = slice_adapters(*(stack(name, dtype, device) for name in linears))
    with use_backend(backend):
        given = None if weights is None else weights.to(device)
        assert add_multi_lora_(y, x.to(device), slices, ids.to(device), given) is y
    parts = base.split([WIDTHS[name] for name in linears], 1)
    eager, exact = (
        torch.cat(
            [
                added(n, p.to(kind), x.to(kind), ids, weights, dtype)
                for n, p in zip(linears, parts, strict=True)
            ],
            1,
        )
        for kind in (dtype, torch.float64)
    )
    assert_close(y.cpu(), eager, exact, dtype=dtype, ulps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_y_may_be_part_of_a_wider_matrix_and_x_strided(backend, device):
    ids, x = torch.arange(9, device=device) % 4, torch.randn(9, 144, device=device)[:, ::2]
    wide = torch.zeros(9, 90, device=device)
    with use_backend(backend):
        add_multi_lora_(wide[:, 20:70], x, stack("q", torch.float32, device), ids)
        alone = multi_lora_linear(x, None, stack("q", torch.float32, device), ids)
    torch.testing.assert_close(wide[:, 20:70], alone)
    assert not wide[:, :20].any() and not wide[:, 70:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_strided(backend, device):
    ids, x = torch.arange(9, device=device)[:, None] % 4, torch.randn(9, 72, device=device)
    weights, adapters = torch.rand(9, 2, device=device)[:, :1], stack("q", torch.float32, device)
    with use_backend(backend):
        y = add_multi_lora_(torch.zeros(9, 50, device=device), x, adapters, ids, weights)
        plain = add_multi_lora_(torch.zeros(9, 50, device=device), x, adapters, ids, weights.clone())
    assert torch.equal(y, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_slices_are_their_linears(backend, grad, device):
    stacks = [stack(name, torch.float32, device) for name in RANKS]
    x, ids = torch.randn(2, 5, 72, device=device, requires_grad=grad), torch.tensor([3, 1], device=device)
    bases = [torch.randn(WIDTHS[name], 72, device=device) for name in RANKS]
    bases[1] = None
    biases = [torch.randn(50, device=device), None, None]
    with use_backend(backend):
        ys = multi_lora_linear_slices(x, bases, slice_adapters(*stacks), ids, biases=biases)
        for y, w, s, b in zip(ys, bases, stacks, biases, strict=True):
            torch.testing.assert_close(y, multi_lora_linear(x, w, s, ids, bias=b))
        if grad:
            sum(y.sum() for y in ys).backward()
            assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_row_does_not_depend_on_its_company(backend, dtype, invariant, device):
    """Bitwise, over random batches of random sizes; with the switch, base product included."""
    if backend == "reference" and not invariant:
        pytest.skip("eager PyTorch is not invariant")
    held = stack("q", dtype, device)
    x, weight = torch.randn(64, 72).to(device, dtype), torch.randn(50, 72).to(device, dtype)
    ids = torch.randint(-1, 4, (64,), device=device)

    def run(some):
        base = weight if invariant else None
        return multi_lora_linear(x[some], base, held, ids[some], batch_invariant=invariant)

    with use_backend(backend):
        whole = run(torch.arange(64, device=device))
        for _ in range(5 if backend == "triton" else 100):
            some = torch.randperm(64, device=device)[: int(torch.randint(1, 65, ()))]
            assert torch.equal(run(some), whole[some])


def test_threads_change_nothing():
    before, x, ids = torch.get_num_threads(), torch.randn(40, 72), torch.arange(40) % 5 - 1
    slices = slice_adapters(*(stack(name, torch.float32, "cpu") for name in RANKS))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(add_multi_lora_(torch.ones(40, 131), x, slices, ids))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    slices, ids = slice_adapters(stack("q", torch.float32, "cpu")), torch.arange(12) % 4
    plan, x = plan_batch(ids, 4), torch.randn(12, 72)

    def run(x):
        return add_multi_lora_(x[:, :50] * 2, x, slices.stacks[0], ids, plan=plan)

    with use_backend(backend):
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def call(**changes):
    values = {
        "y": torch.zeros(4, 50),
        "x": torch.randn(4, 72),
        "adapters": stack("q", torch.float32, "cpu"),
        "adapter_ids": torch.zeros(4, dtype=torch.long),
    }
    return add_multi_lora_(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"y": torch.zeros(4, 51)}, ValueError, r"y: expected shape \(4, 50\)"),
        ({"y": torch.zeros(4, 50).half()}, TypeError, "y: expected torch.float32"),
        ({"y": 1}, TypeError, "y: expected a Tensor"),
        ({"x": torch.randn(4, 5)}, ValueError, "x: expected last dimension 72"),
        ({"adapters": 3}, TypeError, "adapters: expected AdapterStack or AdapterSlices, got int"),
        ({"x": torch.randn(4, 72, requires_grad=True)}, RuntimeError, "it has no gradient"),
        ({"adapter_ids": torch.full((4,), 4)}, ValueError, "adapter_ids: expected below 4, got 4"),
    ],
    ids=range(7),
)
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match):
        call(**changes)


def test_bad_slices():
    with pytest.raises(TypeError, match="stacks: expected AdapterStacks, got int"):
        slice_adapters(1)
    with pytest.raises(ValueError, match="stacks: expected at least one, alike"):
        slice_adapters()
    other = stack_adapters([torch.randn(2, 71)] * 4, [torch.randn(9, 2)] * 4)
    with pytest.raises(ValueError, match="alike in"):
        slice_adapters(stack("q", torch.float32, "cpu"), other)
    with pytest.raises(ValueError, match="base_weights: expected 1, got 2"):
        multi_lora_linear_slices(
            torch.randn(1, 72),
            [None, None],
            slice_adapters(stack("q", torch.float32, "cpu")),
            torch.tensor([0]),
        )
