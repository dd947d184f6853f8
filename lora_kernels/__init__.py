"""lora-kernels: fused kernels for low-rank adaptation (LoRA) in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._backend import BackendError, active_backend, use_backend
from ._version import __version__
from .ops.dora_linear import dora_linear
from .ops.lora_linear import lora_linear

if TYPE_CHECKING:
    from .adapters import LoRAConfig
    from .integrations.checkpoint import load_adapter, save_adapter
    from .integrations.peft import accelerate, decelerate
    from .nn import LoRALinear, apply_lora
    from .ops.multi_lora_linear import AdapterStack, multi_lora_linear, plan_batch, stack_adapters

# Imported on first use, so that `import lora_kernels` needs torch alone.
_LAZY = {
    "AdapterStack": "ops.multi_lora_linear",
    "LoRAConfig": "adapters",
    "LoRALinear": "nn",
    "accelerate": "integrations.peft",
    "apply_lora": "nn",
    "decelerate": "integrations.peft",
    "load_adapter": "integrations.checkpoint",
    "multi_lora_linear": "ops.multi_lora_linear",
    "plan_batch": "ops.multi_lora_linear",
    "save_adapter": "integrations.checkpoint",
    "stack_adapters": "ops.multi_lora_linear",
}

__all__ = [
    "AdapterStack",
    "BackendError",
    "LoRAConfig",
    "LoRALinear",
    "__version__",
    "accelerate",
    "active_backend",
    "apply_lora",
    "decelerate",
    "dora_linear",
    "load_adapter",
    "lora_linear",
    "multi_lora_linear",
    "plan_batch",
    "save_adapter",
    "stack_adapters",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
