from __future__ import annotations

import pytest
import torch

from lora_kernels import _backend
from lora_kernels.planner import use_strategy


@pytest.fixture(autouse=True)
def _poison(poisoned):
    """Every op test runs on poisoned memory: a kernel that leaves an element unwritten shows."""


@pytest.fixture(autouse=True)
def _runnable(request):
    """Skips, with the reason, what is parametrised over a backend that cannot run on the test's device."""
    params = getattr(request.node, "callspec", None)
    backend = params and (params.params.get("backend") or params.params.get("path"))
    if not backend:
        return
    kind = request.getfixturevalue("device").type if "device" in request.fixturenames else "cpu"
    backend = backend.removesuffix("-function")
    if reason := _backend.unavailable(backend, kind, torch.float32, 1):
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def strategy(request):
    """The Triton backend runs with this strategy during the test."""
    with use_strategy(request.param):
        yield request.param
