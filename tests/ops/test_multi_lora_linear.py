"""One batch, many adapters: against a loop of single adapters in fp64, on every backend."""

import pytest
import torch

from lora_kernels import _backend, multi_lora_linear, plan_batch, stack_adapters, use_backend
from lora_kernels._arguments import LoraInputs
from lora_kernels.reference.dropout import row_dropout_mask
from lora_kernels.reference.lora_linear import composite
from lora_kernels.testing import assert_close

BACKENDS = ("reference", "cpp", "triton")
RANKS = (3, 0, 16, 1, 33, 7)
SEED = 11


def popular(kind, rows, adapters):
    """Punica's five ways in which a batch's rows may choose adapters."""
    if kind == "identical":
        return torch.full((rows,), adapters - 1)
    if kind == "distinct":
        return torch.arange(rows) % adapters
    if kind == "uniform":
        return torch.randint(adapters, (rows,))
    weights = 1.0 / torch.arange(1, adapters + 1) ** (1.5 if kind == "zipf" else 4.0)
    return torch.multinomial(weights, rows, replacement=True)


class Batch:
    """Inputs of one call; ``tensors`` gives them in a dtype, as leaves."""

    def __init__(self, ids, ranks=RANKS, lead=None, cols=53, out=41, k=None, base=True, seed=0):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.ids, self.ranks, lead = ids, ranks, tuple(ids.shape if lead is None else lead)
        lead = lead[:-1] if k else lead
        self.x, self.dy = normal(*lead, cols), normal(*lead, out)
        self.a, self.b = [normal(r, cols) / 4 for r in ranks], [normal(out, r) / 4 for r in ranks]
        self.scalings = normal(len(ranks)).abs()
        self.weights = normal(*ids.shape) if k else None
        self.weight, self.bias = (normal(out, cols) / 8, normal(out)) if base else (None, None)

    def tensors(self, dtype, through, device="cpu"):
        """Leaves of ``dtype`` whose values were rounded to ``through`` first."""

        def leaf(t, kind=None):
            if t is None:
                return None
            return t.to(through).to(kind or dtype).to(device, copy=True).requires_grad_()

        whole = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "x": leaf(self.x),
            "a": [leaf(t) for t in self.a],
            "b": [leaf(t) for t in self.b],
            "scalings": leaf(self.scalings, whole),
            "weights": leaf(self.weights),
            "weight": leaf(self.weight),
            "bias": leaf(self.bias),
            "dy": self.dy.to(through).to(dtype).to(device),
        }


def flat(tensors):
    """Name -> tensor of everything with a gradient."""
    single = {name: tensors[name] for name in ("x", "scalings", "weights", "weight", "bias")}
    many = {f"{name}{i}": t for name in ("a", "b") for i, t in enumerate(tensors[name])}
    return {name: t for name, t in {**single, **many}.items() if t is not None}


def fused(batch, tensors, ps=None, **options):
    stack = stack_adapters(tensors["a"], tensors["b"], tensors["scalings"])
    if ps is not None:
        torch.manual_seed(SEED)
    ids = batch.ids.to(tensors["x"].device)
    args = (tensors["x"], tensors["weight"], stack, ids, tensors["weights"], tensors["bias"])
    return multi_lora_linear(*args, dropout_ps=ps, **options)


def loop(batch, tensors, ps=None):
    """Every row and adapter on its own, through the oracle of the single op."""
    x = tensors["x"].reshape(-1, tensors["x"].shape[-1])
    ids = batch.ids if batch.weights is not None or batch.ids.shape == tensors["x"].shape[:-1] else None
    ids = batch.ids.repeat_interleave(len(x) // len(batch.ids)) if ids is None else ids
    slots = ids.reshape(len(x), -1)
    masks = keep_bits(slots, ps, x.shape[1])
    rows = []
    for m, chosen in enumerate(slots.tolist()):
        y = composite(LoraInputs(x[m : m + 1], tensors["weight"], *nothing(tensors), tensors["bias"]))
        for j, i in enumerate(chosen):
            if i < 0:
                continue
            s = tensors["scalings"][i].to(x.dtype)
            if tensors["weights"] is not None:
                s = s * tensors["weights"].reshape(len(x), -1)[m, j]
            mask = None if masks is None else masks[m, j][None]
            p = 0.0 if ps is None else ps[i]
            factors = (tensors["a"][i], tensors["b"][i])
            y = y + composite(LoraInputs(x[m : m + 1], None, *factors, scaling=s, dropout_p=p), mask)
        rows.append(y)
    return torch.cat(rows).view(*tensors["x"].shape[:-1], -1)


def nothing(tensors):
    x, out = tensors["x"], tensors["b"][0].shape[0]
    return x.new_zeros(0, x.shape[-1]), x.new_zeros(out, 0)


def keep_bits(slots, ps, cols):
    if ps is None:
        return None
    torch.manual_seed(SEED)
    seed = torch.empty(1, dtype=torch.int64).random_()
    per_slot = torch.tensor([*ps, 0.0])[slots.reshape(-1)]
    return row_dropout_mask(seed, per_slot, cols).view(*slots.shape, -1)


def check(backend, batch, dtype, device, ps=None):
    given, eager, exact = (
        batch.tensors(kind, dtype, where)
        for kind, where in ((dtype, device), (dtype, "cpu"), (torch.float64, "cpu"))
    )
    with use_backend(backend):
        results = {"y": fused(batch, given, ps)}
        results["y"].backward(given["dy"])
    expected = {}
    for name, tensors in (("eager", eager), ("exact", exact)):
        y = loop(batch, tensors, ps)
        y.backward(tensors["dy"])
        expected[name] = {"y": y, **{n: t.grad for n, t in flat(tensors).items()}}
    results.update({name: t.grad for name, t in flat(given).items()})
    for name, value in results.items():
        if expected["exact"][name] is None:  # an adapter that no row uses
            assert value is None or not value.any(), name
            continue
        assert_close(value.cpu(), expected["eager"][name], expected["exact"][name], name, dtype, ulps=2)


@pytest.mark.spread("backend", "dtype", "kind", of=3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "zipf", "skewed"])
def test_popularity(backend, kind, dtype, device):
    ids = popular(kind, 37, len(RANKS))
    ids[::5] = -1
    check(backend, Batch(ids), dtype, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [(1,), (64, 5), (256, 8), (2,) * 20], ids=str)
def test_ranks(backend, ranks, device):
    check(backend, Batch(torch.arange(23) % len(ranks), ranks), torch.float32, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cols", "out"), [(1, 1), (8, 129), (257, 3), (640, 300)])
def test_shapes(backend, cols, out, device):
    check(backend, Batch(torch.arange(19) % 4 - 1, (4, 9, 2), cols=cols, out=out), torch.float32, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_base(backend, device):
    check(backend, Batch(torch.arange(9) % 6, base=False), torch.float32, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_adapter_a_sample(backend, device):
    check(backend, Batch(torch.tensor([2, -1, 4]), lead=(3, 7)), torch.float32, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mixture_of_adapters(backend, dtype, device):
    """Twice the same adapter in a row, and none, too."""
    ids = torch.randint(-1, len(RANKS), (13, 3))
    ids[0] = torch.tensor([2, 2, -1])
    check(backend, Batch(ids, k=3), dtype, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [None, 2])
def test_dropout_of_each_adapter(backend, k, device):
    if device.type == "cuda":
        pytest.skip("the oracle draws its seed from the CPU's generator")
    ids = torch.randint(-1, len(RANKS), (21,) if k is None else (21, k))
    check(backend, Batch(ids, k=k), torch.float32, device, ps=[0.1, 0.2, 0.0, 0.5, 0.9, 0.3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend, device):
    batch = Batch(torch.empty(0, dtype=torch.long), (2, 3))
    tensors = batch.tensors(torch.float32, torch.float32, device)
    with use_backend(backend):
        y = fused(batch, tensors)
        y.sum().backward()
    assert y.shape == (0, 41) and not tensors["a"][0].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_delta_does_not_depend_on_its_company(backend, dtype, device):
    """Bitwise. The reference runs each adapter's rows through the vendor's GEMM, which promises nothing."""
    if backend == "reference":
        pytest.skip("eager PyTorch is not invariant")
    batches = 100 if backend == "cpp" else 4
    batch = Batch(torch.zeros(1, dtype=torch.long), base=False, cols=600)
    tensors = batch.tensors(dtype, dtype, device)
    stack = stack_adapters(tensors["a"], tensors["b"], tensors["scalings"])
    x = torch.randn(64, 600).to(device, dtype)
    ids = torch.randint(-1, len(RANKS), (64,), device=device)
    with use_backend(backend), torch.no_grad():
        whole = multi_lora_linear(x, None, stack, ids)
        for _ in range(batches):
            some = torch.randperm(64, device=device)[: int(torch.randint(1, 40, ()))]
            assert torch.equal(multi_lora_linear(x[some], None, stack, ids[some]), whole[some])


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_batches_give_a_row_the_same_delta(backend, device):
    """Bitwise, on small shapes; the reference's promise is that of ``batch_invariant``."""
    make = torch.Generator().manual_seed(7)
    ranks, cols, out, rows = (3, 0, 8, 1, 5), 48, 32, 12
    factors = [[torch.randn(r, cols, generator=make).to(device) for r in ranks]]
    factors += [[torch.randn(out, r, generator=make).to(device) for r in ranks]]
    stack = stack_adapters(*factors, [1.0, 2.0, 0.5, 3.0, 0.25])
    x = torch.randn(rows, cols, generator=make).to(device)
    ids = torch.randint(-1, len(ranks), (rows,), generator=make).to(device)
    options = {"batch_invariant": backend == "reference"}
    with use_backend(backend), torch.no_grad():
        whole = multi_lora_linear(x, None, stack, ids, **options)
        for _ in range(20 if backend == "triton" else 100):
            count = int(torch.randint(1, 8, (), generator=make))
            some = torch.randperm(rows, generator=make)[:count].to(device)
            assert torch.equal(multi_lora_linear(x[some], None, stack, ids[some], **options), whole[some])
    assert whole[ids >= 0].any() and not whole[ids < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_serves_several_layers(backend, device):
    ids = torch.arange(15, device=device) % 3
    plan = plan_batch(ids, 3)
    for seed in (1, 2):
        batch = Batch(ids.cpu(), (4, 2, 6), seed=seed)
        tensors = batch.tensors(torch.float32, torch.float32, device)
        with use_backend(backend):
            assert torch.equal(fused(batch, tensors, plan=plan), fused(batch, tensors))


@pytest.mark.parametrize(("rows", "adapters"), [(1, 1), (7, 3), (40, 2), (33, 50), (0, 4)])
def test_the_plan_covers_every_slot_once(rows, adapters):
    ids = torch.randint(-2, adapters + 2, (rows,))
    plan = plan_batch(ids, adapters)
    served = []
    for adapter, first in plan.tiles.tolist():
        if adapter < 0:
            continue
        last = min(first + 16, int(plan.offsets[adapter + 1]))
        slots = plan.order[first:last].tolist()
        wanted = adapter if adapter < adapters else None
        assert all((wanted is None) != (0 <= int(ids[s]) < adapters) for s in slots)
        assert all(wanted is None or int(ids[s]) == wanted for s in slots)
        served += slots
    assert sorted(served) == list(range(rows))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    batch = Batch(torch.arange(12) % 6)

    def run(tensors):
        return fused(batch, tensors, plan=plan)

    plan = plan_batch(batch.ids, 6)
    with use_backend(backend):
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            tensors = batch.tensors(torch.float32, torch.float32)
            y = function(tensors)
            y.sum().backward()
            results.append([y, *(t.grad for t in flat(tensors).values())])
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend, device):
    batch = Batch(torch.arange(8) % 6)
    tensors = batch.tensors(torch.float32, torch.float32, device)
    for name, tensor in flat(tensors).items():
        tensor.requires_grad_(name == "b2")
    with use_backend(backend):
        fused(batch, tensors).sum().backward()
    assert tensors["b"][2].grad.any() and tensors["x"].grad is None and tensors["a"][2].grad is None


def call(**changes):
    values = {
        "x": torch.randn(4, 5),
        "weight": torch.randn(3, 5),
        "adapters": stack_adapters([torch.randn(2, 5)], [torch.randn(3, 2)]),
        "adapter_ids": torch.zeros(4, dtype=torch.long),
    }
    return multi_lora_linear(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.randn(4, 6)}, ValueError, "x: expected last dimension 5"),
        ({"x": torch.ones(4, 5, dtype=torch.long)}, TypeError, "x: expected a floating dtype"),
        ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"weight": torch.randn(3, 6)}, ValueError, "weight: expected shape"),
        ({"weight": torch.randn(3, 5).half()}, TypeError, "weight: expected torch.float32"),
        ({"bias": torch.randn(2)}, ValueError, "bias: expected shape"),
        ({"adapters": [1]}, TypeError, "adapters: expected an AdapterStack"),
        ({"adapter_ids": torch.zeros(3, dtype=torch.long)}, ValueError, "adapter_ids: expected shape"),
        ({"adapter_ids": torch.zeros(4)}, TypeError, "adapter_ids: expected a Tensor of integers"),
        ({"adapter_ids": torch.full((4,), 1)}, ValueError, "adapter_ids: expected below 1, got 1"),
        ({"weights": torch.randn(4, 2)}, ValueError, "weights: expected"),
        ({"dropout_ps": [0.1, 0.2]}, ValueError, "dropout_ps: expected one for each of 1"),
        ({"dropout_ps": [1.0]}, ValueError, "dropout_ps: expected 0 <= p < 1"),
        ({"plan": plan_batch(torch.zeros(3, dtype=torch.long), 1)}, ValueError, "plan: expected one of 4"),
        ({"plan": plan_batch(torch.zeros(4, dtype=torch.long), 9)}, ValueError, "adapters, got 9"),
    ],
    ids=range(15),
)
def test_bad_input(changes, error, match):
    with pytest.raises(error, match=match):
        call(**changes)


@pytest.mark.parametrize(
    ("lora_as", "lora_bs", "scalings", "match"),
    [
        ([], [], 1.0, "lora_bs"),
        ([torch.ones(2, 5), torch.ones(2, 4)], [torch.ones(3, 2)] * 2, 1.0, r"lora_as\[1\]"),
        ([torch.ones(2, 5)], [torch.ones(3, 1)], 1.0, r"lora_bs\[0\]"),
        ([torch.ones(2, 5)], [torch.ones(3, 2)], [1.0, 2.0], "scalings"),
    ],
)
def test_bad_stacks(lora_as, lora_bs, scalings, match):
    with pytest.raises(ValueError, match=match):
        stack_adapters(lora_as, lora_bs, scalings)


def test_the_mask_of_rows_is_the_mask_where_all_rows_agree():
    seed = torch.tensor([5])
    for backend in BACKENDS:
        if _backend.unavailable(backend, "cpu", torch.float32, 1):
            continue
        both = [_backend.implementation(backend, op) for op in ("dropout_mask", "row_dropout_mask")]
        assert torch.equal(both[0](seed, 9, 21, 0.3), both[1](seed, torch.full((9,), 0.3), 21))
