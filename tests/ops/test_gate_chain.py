"""QuanTA's chain of gates on every backend, against the composed one in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ops import _dispatch
from lora_kernels.ops.gate_chain import GateChain
from lora_kernels.reference import gate_chain as reference
from lora_kernels.testing import assert_close

BACKENDS = ("triton", "cpp")
# Axes, features in and out, rows. Padded or not, cut or ended early, two axes to four, several tiles.
SHAPES = {
    "even": ((4, 4, 4), 64, 64, 70),
    "odd": ((5, 3, 2), 29, 37, 7),
    "cut": ((2, 3, 2, 2), 24, 7, 9),
    "one": ((7, 1), 7, 9, 3),
}


def made(shape, dtype):
    dims, n_in, n_out, rows = shape
    generator = torch.Generator().manual_seed(rows)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    sizes = [dims[i] * dims[j] for i, j in reference.pairs(len(dims))]
    gates = [(normal(size, size) / math.sqrt(size)).to(dtype) for size in sizes]
    return gates, normal(rows, n_in), normal(rows, n_out), normal(rows, n_out)


def gradients(dims, gates, x, dy, needs, dx=None, add=True):
    grads = [
        torch.empty_like(g) if needed else g.new_empty(0) for g, needed in zip(gates, needs, strict=True)
    ]
    _dispatch.call("gate_chain_backward", dy, x, gates, dims, dx, add, grads)
    return grads


def step(dims, gates, x, dy, y):
    """y + the chain, the chain alone, dX and the gates' gradients."""
    added, alone, dx = y.clone(), torch.empty_like(y), torch.empty_like(x)
    _dispatch.call("gate_chain", added, x, gates, dims, True)
    _dispatch.call("gate_chain", alone, x, gates, dims, False)
    return [added, alone, dx, *gradients(dims, gates, x, dy, [True] * len(gates), dx, False)]


def compare(got, dims, gates, x, dy, y):
    with use_backend("reference"):
        eager = step(dims, gates, x, dy, y)
        exact = step(dims, *([g.double() for g in gates], x.double(), dy.double(), y.double()))
    for number, (one, other, true) in enumerate(zip(got, eager, exact, strict=True)):
        assert_close(one, other, true, f"result {number}", ulps=2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, shape, dtype):
    dims = list(SHAPES[shape][0])
    gates, x, dy, y = made(SHAPES[shape], dtype)
    with use_backend(backend):
        got = step(dims, gates, x, dy, y)
    compare(got, dims, gates, x, dy, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """Columns apart, of x, dY, the gates and what is written."""
    dims = list(SHAPES["odd"][0])
    gates, *rest = made(SHAPES["odd"], torch.float32)
    gates, (x, dy, y) = ([t.T.contiguous().T for t in given] for given in (gates, rest))
    with use_backend(backend):
        got = step(dims, gates, x, dy, y)
    compare(got, dims, gates, x, dy, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    dims = [4, 4, 4]
    gates, x, dy, _ = made(SHAPES["even"], torch.float32)
    with use_backend(backend):
        every = gradients(dims, gates, x, dy, [True] * 3)
        some = gradients(dims, gates, x, dy, [True, False, True])
    assert torch.equal(some[0], every[0]) and not some[1].numel() and torch.equal(some[2], every[2])


@pytest.mark.parametrize("backend", ("reference", *BACKENDS))
def test_empty(backend):
    gates, x, dy, y = made(SHAPES["odd"], torch.float32)
    with use_backend(backend):
        results = step([5, 3, 2], gates, x[:0], dy[:0], y[:0])
    assert results[0].shape == (0, 37) and all(not grad.any() for grad in results[3:])


def test_a_gate_too_wide_for_the_chip_is_multiplied_by_the_vendors_library(monkeypatch):
    pytest.importorskip("triton")
    from lora_kernels.kernels import gate_chain

    ran = []
    monkeypatch.setattr(gate_chain, "_chain", lambda *args: ran.append(args))
    dims = (32, 16)
    gates, x, _, y = made((dims, 512, 9, 2), torch.float32)
    got = [y.clone()]
    gate_chain.gate_chain(got[0], x, gates, dims, True)
    exact = y.double() + (x.double() @ gates[0].double().T)[:, :9]
    assert_close(got[0], y + (x @ gates[0].T)[:, :9], exact)
    assert not ran


def test_a_step_under_compile():
    branch = GateChain(60, (4, 4, 4))
    gates, x, dy, y = made(((4, 4, 4), 64, 60, 5), torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, dy, *gates):
        out, dx = torch.zeros_like(dy), torch.zeros_like(x)
        saved = branch.add_(out, x, *gates, write=True)
        return out, dx, *branch.gradients(dy, dx, [True] * len(gates), *saved)

    got = run(x, dy, *gates)
    with use_backend("reference"):
        want = step([4, 4, 4], gates, x, dy, y)[1:]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_exact_float32_is_multiplied_by_the_vendors_library_on_a_card(monkeypatch):
    pytest.importorskip("triton")
    from lora_kernels.kernels import gate_chain

    class OnCard:
        is_cuda, dtype = True, torch.float32

        def element_size(self):
            return 4

    for allowed in ("ieee", "tf32"):
        monkeypatch.setattr(gate_chain, "precision", lambda dtype, allowed=allowed: allowed)
        assert gate_chain._on_chip(OnCard(), [8, 8]) == (allowed == "tf32")
