"""Which backend runs, who decides, and what is said when it cannot."""

from __future__ import annotations

import threading

import pytest
import torch

from lora_kernels import BackendError, _backend, _extension, active_backend, lora_linear, use_backend
from lora_kernels.testing import LoraCase, leaves, lora_inputs


def needs_extension():
    if reason := _extension.load():
        pytest.skip(f"cpp: {reason}")


@pytest.fixture
def ran(monkeypatch):
    """The (backend, op) pairs that were computed."""
    seen, original = [], _backend.implementation

    def spy(backend, op):
        seen.append((backend, op))
        return original(backend, op)

    monkeypatch.setattr(_backend, "implementation", spy)
    return seen


def forward(requires_grad=("x", "lora_a", "lora_b"), **fields):
    inputs = leaves(lora_inputs(LoraCase(**fields)), requires_grad)
    return lora_linear(*(inputs[n] for n in ("x", "weight", "lora_a", "lora_b")))


def test_blocks_nest_and_restore():
    before = active_backend()
    with use_backend("reference"):
        with use_backend("cpp"):
            assert active_backend() == "cpp"
        assert active_backend() == "reference"
    assert active_backend() == before


def test_an_error_in_the_block_restores():
    before = active_backend()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert active_backend() == before


@pytest.mark.parametrize("name", ("gpu", "", "Reference", None, 3))
def test_unknown_name(name):
    before = active_backend()
    with pytest.raises(
        ValueError, match=r"^backend: expected one of auto, reference, triton, cpp, cuda, got "
    ):
        use_backend(name).__enter__()
    assert active_backend() == before


@pytest.mark.parametrize("name", ("auto", "reference", "triton", "cpp", "cuda"))
def test_environment_variable(name, after_torch):
    done = after_torch("import lora_kernels; print(lora_kernels.active_backend())", LORA_KERNELS_BACKEND=name)
    assert done.stdout.strip() == name, done.stderr


def test_wrong_environment_variable(after_torch):
    done = after_torch("import lora_kernels", LORA_KERNELS_BACKEND="fastest")
    assert done.returncode != 0
    assert "backend: expected one of auto, reference, triton, cpp, cuda, got 'fastest'" in done.stderr


FORCED = """
import torch, lora_kernels as lk
try:
    with lk.use_backend({name!r}):
        lk.lora_linear(torch.ones(2, 4), None, torch.ones(1, 4), torch.ones(3, 1))
except lk.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "environment", "why"),
    (
        ("cpp", {"LORA_KERNELS_SKIP_EXTENSION": "1"}, "LORA_KERNELS_SKIP_EXTENSION is set"),
        ("triton", {}, "the tensors are on cpu and TRITON_INTERPRET is not set"),
        ("cuda", {}, "it runs on CUDA cards, and the tensors are on cpu"),
    ),
)
def test_forced_backend_says_why_it_cannot_run(name, environment, why, after_torch):
    done = after_torch(FORCED.format(name=name), **environment)
    assert f"backend {name!r} cannot run: {why}" in done.stdout, done.stderr


def test_triton_missing_is_the_reason(after_torch):
    blocked = "import sys; sys.modules['triton'] = None\n" + FORCED.format(name="triton")
    done = after_torch(blocked, TRITON_INTERPRET="1")
    assert "the triton package is not installed" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("fields", "why"),
    (({"dtype": torch.float64}, "not torch.float64"), ({"rank": 513}, "rank 1 to 512, not 513")),
    ids=("fp64", "rank"),
)
def test_forced_triton_refuses_what_its_kernels_do_not_take(fields, why):
    with use_backend("triton"), pytest.raises(BackendError, match=why):
        forward(**fields)


def test_forced_cpp_refuses_another_device():
    with use_backend("cpp"), pytest.raises(BackendError, match="the tensors are on meta"):
        lora_linear(*(torch.ones(s, device="meta") for s in ((2, 4), (3, 4), (1, 4), (3, 1))))


def test_auto_works_where_the_reference_works():
    for fields in ({"dtype": torch.float64}, {"rank": 600}, {"lead": (0,)}, {"lead": ()}):
        assert torch.isfinite(forward(**fields)).all()


def test_auto_on_another_device():
    y = lora_linear(*(torch.ones(s, device="meta") for s in ((2, 4), (3, 4), (1, 4), (3, 1))))
    assert y.shape == (2, 3)


def test_auto_without_the_extension(after_torch):
    code = "import torch, lora_kernels as lk, lora_kernels._backend as b\n"
    code += "args = map(torch.ones, ((2, 4), (3, 4), (1, 4), (3, 1)))\n"
    code += "print(b.resolve('cpu', torch.float32, 4), lk.lora_linear(*args))"
    done = after_torch(code, LORA_KERNELS_SKIP_EXTENSION="1")
    assert done.stdout.startswith("reference tensor"), done.stderr


def test_auto_picks_by_device():
    needs_extension()
    assert _backend.resolve("cpu", torch.float32, 8) == "cpp"
    assert _backend.resolve("meta", torch.float32, 8) == "reference"


def test_the_backward_pass_follows_its_forward(ran):
    if reason := _backend.unavailable("triton", "cpu", torch.float32, 4):
        pytest.skip(f"triton: {reason}")
    for first, second in (("reference", "triton"), ("triton", "reference")):
        ran.clear()
        with use_backend(first):
            y = forward()
        with use_backend(second):
            y.sum().backward()
        assert ran == [(first, "lora_linear"), (first, "lora_linear_backward")]


def test_the_choice_holds_in_other_threads(ran):
    with use_backend("reference"):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert ran == [("reference", "lora_linear")]


def test_eager_cpp_is_differentiated_in_cpp(ran):
    needs_extension()
    with use_backend("cpp"):
        y = forward()
    y.sum().backward()
    assert "LoRALinearFunction" not in type(y.grad_fn).__name__ and not ran
