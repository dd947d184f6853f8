"""The ops of a server's stacks: schema, fake, tracing, and that the backends take the same arguments."""

from __future__ import annotations

import inspect

import pytest
import torch

from lora_kernels import _backend, _extension, _ops
from lora_kernels.ops import _dispatch
from lora_kernels.testing.assertions import assert_close

BACKENDS = ("reference", "cpp", "triton")


def segments():
    """Six rows: 4, 1 and 2 of adapter 1, 3 of adapter 0, the rest of none; one entry unused."""
    order, starts = torch.tensor([0, 5, 3, 4, 1, 2]).int(), torch.tensor([0, 2, 3, 0]).int()
    return order, starts, torch.tensor([2, 1, 3, 0]).int(), torch.tensor([-1, 0, 1, -1]).int()


MAPPING = torch.tensor([-1, 1, 1, 0, 1, -1], dtype=torch.int32)


def samples(dtype=torch.float32):
    x, y = torch.randn(6, 24).to(dtype), torch.randn(6, 20).to(dtype)
    lora_a = [torch.randn(2, 3, 24).to(dtype), torch.randn(2, 3, 24).to(dtype)]
    lora_b = [torch.randn(2, 12, 3).to(dtype), torch.randn(2, 8, 3).to(dtype)]
    ranks, scalings = torch.tensor([3, 2]).int(), torch.tensor([0.5, 2.0])
    packed = [torch.cat(lora_a, 1)]
    return {
        "stacked_lora_shrink": (x, lora_a, *segments(), MAPPING, 0.5, torch.empty(2, 6, 3)),
        "stacked_lora_expand": (torch.randn(2, 6, 3), lora_b, *segments(), 0, True, y),
        "stacked_lora_linear": (x, packed, lora_b, *segments(), ranks, scalings, 0.5, 0, True, y.clone()),
    }


OPS = [op for op in _ops.IN_PLACE if op.startswith("stacked_")]


def test_every_op_has_samples():
    assert set(samples()) == set(OPS)


@pytest.mark.parametrize("prefix", ("", "cpp_"))
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, prefix):
    if prefix and (reason := _extension.load()):
        pytest.skip(reason)
    torch.library.opcheck(getattr(torch.ops.lora_kernels, prefix + op).default, samples()[op])


@pytest.mark.parametrize("backend", ("reference", "triton"))
@pytest.mark.parametrize("op", OPS)
def test_backends_take_the_arguments_of_the_schema(op, backend):
    if backend == "triton" and (reason := _backend.triton_missing()):
        pytest.skip(reason)
    schema = getattr(torch.ops.lora_kernels, op).default._schema
    function = _backend.implementation(backend, op)
    assert list(inspect.signature(function).parameters) == [a.name for a in schema.arguments]


def exact(op, args):
    """In fp64 on the reference; what is written."""
    wide = [
        [t.double() for t in a]
        if isinstance(a, list)
        else a.double()
        if torch.is_tensor(a) and a.is_floating_point()
        else a
        for a in args
    ]
    _backend.implementation("reference", op)(*wide)
    return wide[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("op", OPS)
def test_against_fp64(op, backend, dtype, poisoned):
    if reason := _backend.unavailable(backend, "cpu", dtype, 3):
        pytest.skip(reason)
    args = samples(dtype)[op]
    args = (*args[:-1], args[-1].to(dtype))
    want, eager = exact(op, args), args[-1].clone()
    _backend.implementation("reference", op)(*args[:-1], eager)
    _backend.implementation(backend, op)(*args)
    assert_close(args[-1], eager, want, ulps=1)


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op):
    args = samples()[op]
    want = args[-1].clone()
    _dispatch.call(op, *args[:-1], want)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(out):
        _dispatch.call(op, *args[:-1], out)
        return out

    torch.testing.assert_close(run(args[-1].clone()), want)
