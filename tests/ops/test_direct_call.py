"""The short way of an eager call into C++: the same as the op's, and not taken where more is asked for."""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import (
    _extension,
    add_multi_lora_,
    lora_linear,
    multi_lora_linear,
    plan_batch,
    slice_adapters,
    stack_adapters,
    use_backend,
)
from lora_kernels.ops import _dispatch

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")


def call(dtype=torch.float32, **changed):
    """Arguments of a call that goes the short way, by name."""
    shapes = {"x": (3, 8), "weight": (6, 8), "lora_a": (2, 8), "lora_b": (6, 2), "bias": (6,), "gate": (2,)}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"scaling": 2.0, "dropout_p": 0.0} | changed


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("without", ((), ("weight",), ("bias", "gate")))
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_same_as_the_op(dtype, without, p):
    given = call(dtype, **dict.fromkeys(without), dropout_p=p)
    tensors = [t.requires_grad_() for t in given.values() if isinstance(t, torch.Tensor)]
    x, *rest, scaling, _ = given.values()
    torch.manual_seed(1)
    direct = _dispatch.direct(*given.values())
    torch.manual_seed(1)
    op = torch.ops.lora_kernels.cpp_lora_linear_autograd.default(x, *rest, None, scaling, p)
    assert torch.equal(direct, op)
    ways = (torch.autograd.grad(y, tensors, torch.ones_like(y)) for y in (direct, op))
    for ours, wanted in zip(*ways, strict=True):
        assert torch.equal(ours, wanted)


class _Subclass(torch.Tensor):
    pass


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Overridden(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LONG_WAY = {
    "subclass": {"x": torch.ones(3, 8).as_subclass(_Subclass)},
    "other device": {"x": torch.ones(3, 8, device="meta")},
    "integers": {"x": torch.ones(3, 8, dtype=torch.int64)},
    "sparse": {"x": torch.ones(3, 8).to_sparse()},
    "no tensor": {"x": [1.0]},
    "a number": {"x": torch.ones(())},
    "other dtype": {"x": torch.ones(3, 8, dtype=torch.float64)},
    "other width": {"x": torch.ones(3, 7)},
    "no A": {"lora_a": None},
    "an A for each sample": {"lora_a": torch.ones(3, 2, 8)},
    "other rank": {"lora_b": torch.ones(6, 3)},
    "other weight": {"weight": torch.ones(5, 8)},
    "other bias": {"bias": torch.ones(5)},
    "gate of rows": {"gate": torch.ones(3, 2)},
    "s as a tensor": {"scaling": torch.ones(1)},
    "s as a truth": {"scaling": True},
    "s beyond a float": {"scaling": 10**400},
    "p of one": {"dropout_p": 1.0},
    "p below zero": {"dropout_p": -0.1},
    "p that is none": {"dropout_p": float("nan")},
}


@pytest.mark.parametrize("changed", LONG_WAY.values(), ids=LONG_WAY)
def test_what_does_not_fit_goes_the_long_way(changed):
    assert _dispatch.direct(*call(**changed).values()) is None


@pytest.mark.parametrize(
    "block",
    (
        lambda: torch.autocast("cpu", torch.bfloat16),
        _Seen,
        _Overridden,
        lambda: use_backend("reference"),
        lambda: torch.device("cpu"),
    ),
    ids=("autocast", "dispatch mode", "function mode", "another backend", "default device"),
)
def test_whoever_watches_sees_the_call(block):
    with block():
        assert _dispatch.direct(*call().values()) is None
    assert _dispatch.direct(*call().values()) is not None


def test_transforms_go_the_long_way():
    x, *rest = call().values()
    seen = []

    def each(row):
        seen.append(_dispatch.direct(row, *rest))
        return row

    torch.func.vmap(each)(x)
    torch.func.jvp(each, (x,), (x,))
    torch.func.grad(lambda x: each(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        each(torch.autograd.forward_ad.make_dual(x, x))
    assert seen == [None] * 4


def test_short_way_is_taken():
    given = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kernels.ops.lora_linear.check", None)
        y = lora_linear(**given)
    with torch.inference_mode():
        assert torch.equal(lora_linear(**given), y)


def stack(dtype=torch.float32, out=6, adapters=2):
    """Adapters of different ranks."""
    generator = torch.Generator().manual_seed(2)
    ranks = range(2, 2 + adapters)
    made = ([torch.randn(r, 8, generator=generator), torch.randn(out, r, generator=generator)] for r in ranks)
    lora_as, lora_bs = zip(*made, strict=True)
    return stack_adapters(
        [a.to(dtype) for a in lora_as], [b.to(dtype) for b in lora_bs], [2.0, 0.5][:adapters]
    )


def multi_call(dtype=torch.float32, **changed):
    """Arguments of ``multi_lora`` that go the short way, by name."""
    given = call(dtype)
    made = {"y": torch.ones(3, 6, dtype=dtype), "x": given["x"], "weight": None, "bias": None}
    made |= {"stacks": stack(dtype)._linears, "ids": torch.tensor([1, -1, 0]), "weights": None, "plan": None}
    return made | changed


def multi(given):
    return _dispatch.short_way("multi_lora")(*given.values())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("planned", (False, True))
@pytest.mark.parametrize("k", (None, 2))
@pytest.mark.parametrize("lead", ((3,), (3, 5), ()))
@torch.no_grad()
def test_multi_is_the_same_as_the_op(dtype, planned, k, lead):
    x, y = torch.randn(*lead, 8).to(dtype), torch.randn(*lead, 10).to(dtype)
    ids = torch.randint(-1, 2, lead if k is None else (*lead, k))
    weights = None if k is None else torch.rand(*lead, k)
    slices = slice_adapters(stack(dtype), stack(dtype, out=4))
    plan = plan_batch(ids, 2) if planned else None
    want = y.clone()
    with _Seen():
        add_multi_lora_(want, x, slices, ids, weights)
    assert (
        multi({"y": y, "x": x, "w": None, "b": None, "s": slices._linears, "i": ids, "f": weights, "p": plan})
        is y
    )
    assert torch.equal(y, want)


@pytest.mark.parametrize("without", ((), ("weight",), ("bias",), ("weight", "bias")))
@torch.no_grad()
def test_multi_begins_with_the_base(without):
    given = call(**dict.fromkeys(without))
    arguments = (given["x"], given["weight"], stack(), torch.tensor([1, -1, 0]))
    with _Seen():
        want = multi_lora_linear(*arguments, bias=given["bias"])
    base = {"y": None, "weight": given["weight"], "bias": given["bias"]}
    assert torch.equal(multi(multi_call(**base)), want)
    assert torch.equal(multi_lora_linear(*arguments, bias=given["bias"]), want)


def changed_stack(**changed):
    fields = dict(zip(("a", "b", "pages", "spans", "scalings", "rank"), stack()._linears[0], strict=True))
    return (tuple((fields | changed).values()),)


SINGLE = torch.zeros(3, 1, dtype=torch.long)
PLAN = plan_batch(torch.tensor([1, -1, 0]), 2)
MULTI_LONG_WAY = {
    "subclass": {"x": torch.ones(3, 8).as_subclass(_Subclass)},
    "other device": {"x": torch.ones(3, 8, device="meta")},
    "integers": {"x": torch.ones(3, 8, dtype=torch.int64)},
    "no x": {"x": None},
    "a number": {"x": torch.ones(())},
    "no rows": {"x": torch.ones(0, 8), "y": torch.ones(0, 6), "ids": torch.ones(0, dtype=torch.long)},
    "other width": {"x": torch.ones(3, 7)},
    "other dtype": {"y": torch.ones(3, 6, dtype=torch.float64)},
    "other rows": {"y": torch.ones(2, 6)},
    "other columns": {"y": torch.ones(3, 7)},
    "more dimensions": {"y": torch.ones(1, 3, 6)},
    "other weight": {"y": None, "weight": torch.ones(5, 8)},
    "weight of another dtype": {"y": None, "weight": torch.ones(6, 8, dtype=torch.float64)},
    "other bias": {"y": None, "bias": torch.ones(5)},
    "no stacks": {"stacks": ()},
    "stacks of several widths": {"stacks": (*stack()._linears, *changed_stack(a=torch.ones(5, 7)))},
    "stacks of several sizes": {"stacks": (*stack()._linears, *stack(adapters=1)._linears)},
    "pages in int64": {"stacks": changed_stack(pages=torch.arange(5))},
    "spaced spans": {"stacks": changed_stack(spans=torch.ones(2, 4, dtype=torch.int32)[:, ::2])},
    "scalings in float64": {"stacks": changed_stack(scalings=torch.ones(2, dtype=torch.float64))},
    "ids in int32": {"ids": torch.zeros(3, dtype=torch.int32)},
    "ids of fewer rows": {"ids": torch.zeros(2, dtype=torch.long)},
    "ids of fewer dimensions": {"ids": torch.tensor(0)},
    "spaced ids": {"ids": torch.zeros(6, dtype=torch.long)[::2]},
    "an id too large": {"ids": torch.tensor([0, 2, 0])},
    "ids in a list": {"ids": [0, 0, 0]},
    "weights of one dimension": {"weights": torch.ones(3)},
    "other weights": {"weights": torch.ones(3, 2), "ids": SINGLE},
    "integer weights": {"weights": SINGLE, "ids": SINGLE},
    "a plan of fewer slots": {"plan": plan_batch(torch.tensor([1, 0]), 2)},
    "a plan of more adapters": {"plan": plan_batch(torch.tensor([1, -1, 0]), 3)},
    "a plan in int64": {"plan": PLAN._replace(order=PLAN.order.long())},
    "no plan": {"plan": (1, 2)},
}  # fmt: skip


@pytest.mark.parametrize("changed", MULTI_LONG_WAY.values(), ids=MULTI_LONG_WAY)
def test_what_does_not_fit_multi_goes_the_long_way(changed):
    assert multi(multi_call()) is not None
    assert multi(multi_call(**changed)) is None


@pytest.mark.parametrize("name", ("y", "x", "weight", "bias", "weights", "a", "b", "scalings"))
def test_a_gradient_goes_the_long_way(name):
    base = {"y": None} if name in ("weight", "bias") else {}
    given = multi_call(weights=torch.ones(3, 1), ids=SINGLE, **base)
    if name in ("a", "b", "scalings"):
        place = ("a", "b", None, None, "scalings").index(name)
        given["stacks"][0][place].requires_grad_()
    else:
        shapes = {"weight": (6, 8), "bias": (6,)}
        given[name] = (given[name] if name not in shapes else torch.ones(shapes[name])).requires_grad_()
    assert multi(given) is None
    with torch.no_grad():
        assert multi(given) is not None


@pytest.mark.parametrize("block", (lambda: torch.autocast("cpu", torch.bfloat16), _Seen, _Overridden))
def test_whoever_watches_sees_the_multi_call(block):
    with block():
        assert multi(multi_call()) is None
    with use_backend("reference"):
        assert _dispatch.short_way("multi_lora") is None


@pytest.mark.parametrize("long_way", (False, True))
def test_what_is_added_to_counts_as_changed(long_way):
    """So that autograd notices where y was kept for a backward pass."""
    given = multi_call()
    leaf = torch.ones(3, 6, requires_grad=True)
    product = (leaf * given["y"]).sum()
    with _Seen() if long_way else contextlib.nullcontext(), torch.no_grad():
        add_multi_lora_(given["y"], given["x"], stack(), given["ids"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_multi_short_way_is_taken():
    given = multi_call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_kernels.ops.multi_lora_linear.check", None)
        add_multi_lora_(given["y"], given["x"], stack(), given["ids"])
        y = multi_lora_linear(given["x"], None, stack(), given["ids"])
    with torch.inference_mode():
        assert torch.equal(multi_lora_linear(given["x"], None, stack(), given["ids"]), y)
