"""Which implementation of an op runs: ``auto``, ``reference``, ``triton``, ``cpp`` or ``cuda``.

Each backend has one function per op of ``_ops.py``. ``auto`` picks by device and dtype and never fails
where the reference would work; a backend that was asked for by name raises :class:`BackendError` when
it cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _extension, _ops, _settings

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "triton", "cpp", "cuda")
TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
CPP_DTYPES = TRITON_DTYPES | {torch.float64}
# A wider rank is a dense GEMM, for which the vendor's library is the right tool.
TRITON_MAX_RANK = 512
CUDA_DTYPES = frozenset({torch.float16, torch.bfloat16})
CUDA_MAX_RANK = 256


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why.

    Examples:
        >>> try:
        ...     with use_backend("cuda"):
        ...         lora_linear(torch.randn(1, 4), torch.randn(4, 4), torch.randn(1, 4), torch.randn(4, 1))
        ... except BackendError as error:
        ...     reason = str(error)
    """


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_active = _check_name(_settings.read().backend)


def active_backend() -> str:
    """The name in force: set by :func:`use_backend`, else by ``LORA_KERNELS_BACKEND``, else ``auto``.

    Examples:
        >>> with use_backend("reference"):
        ...     active_backend()
        'reference'
    """
    return _active


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops of this package with one backend inside the ``with`` block.

    The choice holds for the whole process, autograd's own threads included; a backward pass follows
    the backend of its forward pass.

    Args:
        name: ``auto``, ``reference``, ``triton``, ``cpp`` or ``cuda``.

    Raises:
        ValueError: the name is not a backend.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
        >>> with use_backend("reference"):
        ...     y = lora_linear(x, weight, a, b)
    """
    global _active
    before, _active = _active, _check_name(name)
    try:
        yield
    finally:
        _active = before


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors in Triton's interpreter."""
    return _settings.read().triton_interpret


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used at all, or ``None``. Does not import Triton."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None


def unavailable(name: str, device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """Why backend ``name`` cannot run for such tensors, or ``None`` when it can."""
    if name == "triton":
        return _triton_unavailable(device_type, dtype, rank)
    if name == "cpp":
        return _cpp_unavailable(device_type, dtype)
    if name == "cuda":
        return _cuda_unavailable(device_type, dtype, rank)
    return None


def _triton_unavailable(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    if dtype not in TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, not {dtype}"
    if not 1 <= rank <= TRITON_MAX_RANK:
        return f"its kernels take rank 1 to {TRITON_MAX_RANK}, not {rank}"
    if device_type != "cuda" and not interpreting():
        return f"the tensors are on {device_type} and TRITON_INTERPRET is not set"
    return triton_missing()


def _cpp_unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device_type}"
    if dtype not in CPP_DTYPES:
        return f"it takes float16, bfloat16, float32 and float64, not {dtype}"
    return _extension.load()


def _cuda_unavailable(device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    if device_type != "cuda":
        return f"it runs on CUDA cards, and the tensors are on {device_type}"
    if dtype not in CUDA_DTYPES:
        return f"its kernels take float16 and bfloat16, not {dtype}"
    if not 1 <= rank <= CUDA_MAX_RANK:
        return f"its kernels take rank 1 to {CUDA_MAX_RANK}, not {rank}"
    return _extension.load() or _extension.cuda_missing()


def resolve(device_type: str, dtype: torch.dtype, rank: int) -> str:
    """The backend that runs: the one asked for, or under ``auto`` the best one that can.

    Raises:
        BackendError: a backend was asked for by name and cannot run; the message says why.
    """
    return _resolve(_active, device_type, dtype, rank)


@functools.lru_cache(maxsize=4096)
def _resolve(name: str, device_type: str, dtype: torch.dtype, rank: int) -> str:
    if name == "auto":
        best = "triton" if device_type == "cuda" else "cpp"
        reason = unavailable(best, device_type, dtype, rank)
        chosen = "reference" if reason else best
        why = f", as {best} cannot run: {reason}" if reason else ""
        logger.info("auto is %s for %s of rank %d on %s%s", chosen, dtype, rank, device_type, why)
        return chosen
    reason = unavailable(name, device_type, dtype, rank)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run: {reason}")
    return name


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """The function of ``backend`` that computes ``op`` (a stem of ``_ops.py``).

    ``cuda`` has forward kernels, with the data of Triton's: a backward pass that follows one is Triton's.
    What ``csrc/`` leaves to PyTorch's own CPU kernels is the reference's, and so is what is composed of them
    on every device.
    """
    if op in _ops.COMPOSED or (backend == "cpp" and op in _ops.LEFT_TO_TORCH):
        backend = "reference"
    if backend == "cpp" or (backend == "cuda" and op in _ops.CUDA_OPS):
        return getattr(torch.ops.lora_kernels, f"{backend}_{op}").default
    package = {"reference": "reference", "triton": "kernels", "cuda": "kernels"}[backend]
    stem = _stem(op)
    return getattr(importlib.import_module(f"{__package__}.{package}.{stem}"), op)


def _stem(op: str) -> str:
    """The file that has the op, in each backend's package."""
    for family in ("dropout", "stacked_lora"):
        if family in op:
            return family
    return op.removesuffix("_backward").removesuffix("_add")


def automatic(device_type: str) -> str:
    """What ``auto`` picks on a device for float32 tensors and a common rank."""
    return _resolve("auto", device_type, torch.float32, 8)
