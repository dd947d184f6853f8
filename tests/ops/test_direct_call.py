"""The short way of an eager call into C++: the same as the op's, and not taken where more is asked for."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import _extension, lora_linear, use_backend
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
