"""Runs one case through a path of ``lora_linear`` and holds it against eager PyTorch and fp64."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch

from lora_kernels import _backend, lora_linear, use_backend
from lora_kernels._arguments import LoraInputs
from lora_kernels.ops import _dispatch
from lora_kernels.ops._lora_function import LoRALinearFunction
from lora_kernels.ops.lora_linear import _formed
from lora_kernels.reference.dropout import dropout_apply, dropout_mask
from lora_kernels.reference.lora_linear import composite
from lora_kernels.testing import TENSORS, LoraCase, assert_close, leaves, lora_inputs

SEED = 20240607
# The path names a backend; "cpp-function" is the Python Function over the C++ kernels, which is what
# compiled code runs, where an eager "cpp" call is differentiated in C++.
PATHS = ("reference", "cpp", "cpp-function", "triton")
CPU_PATHS = PATHS[:3]


@contextlib.contextmanager
def in_python():
    """The C++ kernels below the Python Function."""
    with use_backend("cpp"), patch.object(_dispatch, "eager_cpp", lambda *args: False):
        yield


def on(path):
    """The backend of a path."""
    return in_python() if path == "cpp-function" else use_backend(path)


def skip_unavailable(path, case, device):
    backend = path.removesuffix("-function")
    reason = _backend.unavailable(backend, device.type, case.dtype, case.rank)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def call(path, inputs, case):
    with use_backend(path.removesuffix("-function")):
        if path == "cpp-function":
            args = LoraInputs(*(inputs[name] for name in TENSORS), None, case.scaling, case.dropout_p)
            return LoRALinearFunction.apply(*_formed(args))
        return lora_linear(
            *(inputs[name] for name in ("x", "weight", "lora_a", "lora_b")),
            case.scaling,
            inputs["bias"],
            dropout_p=case.dropout_p,
            gate=inputs["gate"],
            x_lora=inputs["x_lora"],
        )


def by_sample(inputs, case, mask):
    """The equation with factors for each sample along the first dimension."""
    x, weight, a, b, bias, gate, x_lora = (inputs[name] for name in TENSORS)
    branch = x if x_lora is None else x_lora
    if mask is not None:
        rows = branch.reshape(case.rows, case.width)
        branch = dropout_apply(rows, mask, case.dropout_p).view(branch.shape)
    h = torch.einsum("s...k,srk->s...r", branch, a.to(x.dtype))
    h = h if gate is None else h * gate.to(x.dtype)
    equation = "s...r,snr->s...n" if b.dim() == 3 else "s...r,nr->s...n"
    y = torch.einsum(equation, h, b.to(x.dtype)) * case.scaling
    y = y if weight is None else torch.nn.functional.linear(x, weight) + y
    return y if bias is None else y + bias


def expected(inputs, case, mask):
    """The composite on [rows, features], back in x's shape."""
    if case.factors.startswith("sample"):
        return by_sample(inputs, case, mask)

    def rows(name):
        tensor = inputs[name]
        return tensor if tensor is None or tensor.dim() == 1 else tensor.reshape(-1, tensor.shape[-1])

    args = {name: rows(name) for name in TENSORS}
    for name in ("x", "x_lora"):
        args[name] = None if args[name] is None else args[name].reshape(case.rows, args[name].shape[-1])
    if args["lora_a"] is None:
        args["lora_a"] = torch.eye(case.rank, dtype=case.adapter_dtype or case.dtype, device=args["x"].device)
    y = composite(LoraInputs(**args, scaling=case.scaling, dropout_p=case.dropout_p), mask)
    return y.view(*case.lead, case.out)


def mask_of_next_call(case, device, seed=SEED):
    """The keep bits of the first call after ``manual_seed(seed)``, and that seed set again."""
    if not case.dropout_p:
        return None
    torch.manual_seed(seed)
    drawn = torch.empty(1, dtype=torch.int64, device=device).random_()
    torch.manual_seed(seed)
    return dropout_mask(drawn, case.rows, case.width, case.dropout_p)


def results(y, inputs, dy):
    if y.requires_grad:
        y.backward(dy)
    return {"y": y.detach(), **{name: None if t is None else t.grad for name, t in inputs.items()}}


def run_case(path, case, device, requires_grad=None, ulps=0.5):
    """Checks y and every gradient of the case; returns what the path gave."""
    skip_unavailable(path, case, device)
    if path == "cpp-function" and case.factors.startswith("sample"):
        pytest.skip("batched before the Function is reached")
    wanted = case.present() if requires_grad is None else requires_grad
    given = lora_inputs(case, device)
    dy = torch.randn(*case.lead, case.out, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    mask = mask_of_next_call(case, device)

    inputs = leaves(given, wanted)
    got = results(call(path, inputs, case), inputs, dy)
    plain = leaves(given, wanted)
    eager = results(expected(plain, case, mask), plain, dy)
    wide = leaves(given, wanted, torch.float64)
    exact = results(expected(wide, case, mask), wide, dy.double())
    compare(got, eager, exact, inputs, case, ulps)
    return got


def compare(got, eager, exact, inputs, case, ulps):
    __tracebackhide__ = True
    assert got["y"].dtype == case.dtype
    for name, value in got.items():
        if exact[name] is None and value is not None and inputs[name].requires_grad:
            # The composite has no path from x here, a zero is as true as no gradient.
            assert case.weight == "none" and not value.any()
            continue
        if exact[name] is None:
            assert value is None, f"{name} got a gradient that nothing asked for"
            continue
        assert value is not None, f"{name} got no gradient"
        if name != "y":
            assert value.dtype == inputs[name].dtype
        assert_close(value, eager[name], exact[name], name, case.dtype, ulps)


def case_id(case: LoraCase) -> str:
    """What of the case differs from the default."""
    plain = LoraCase()
    changed = [
        f"{field}={getattr(case, field)}"
        for field in LoraCase.__dataclass_fields__
        if getattr(case, field) != getattr(plain, field)
    ]
    return " ".join(changed).replace("torch.", "") or "default"
