"""lora-kernels: fused kernels for low-rank adaptation (LoRA) in PyTorch."""

from __future__ import annotations

from ._backend import BackendError, active_backend, use_backend
from ._version import __version__
from .ops.lora_linear import lora_linear


__all__ = ["BackendError", "__version__", "active_backend", "lora_linear", "use_backend"]
