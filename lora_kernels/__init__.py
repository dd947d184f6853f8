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
    from .nn import LoRALinear, QuantizedLinear, apply_lora, quantize_base
    from .ops.adapter_stack import AdapterSlices, AdapterStack, slice_adapters, stack_adapters
    from .ops.batch_plan import BatchPlan, plan_batch
    from .ops.dequantize import dequantize
    from .ops.grouped_lora_linear import grouped_lora_linear
    from .ops.lora_linear_group import lora_linear_group
    from .ops.lora_mlp import LoRAProjection, lora_mlp
    from .ops.multi_lora_fusion import multi_lora_fusion
    from .ops.multi_lora_linear import add_multi_lora_, multi_lora_linear, multi_lora_linear_slices
    from .ops.quantized_linear import quantized_linear
    from .quant import QuantizedWeight, quantize
    from .stats import calibrate

# Imported on first use, so that `import lora_kernels` needs torch alone.
_LAZY = {
    "AdapterSlices": "ops.adapter_stack",
    "AdapterStack": "ops.adapter_stack",
    "BatchPlan": "ops.batch_plan",
    "LoRAConfig": "adapters",
    "LoRALinear": "nn",
    "QuantizedLinear": "nn",
    "QuantizedWeight": "quant",
    "LoRAProjection": "ops.lora_mlp",
    "accelerate": "integrations.peft",
    "add_multi_lora_": "ops.multi_lora_linear",
    "apply_lora": "nn",
    "calibrate": "stats",
    "decelerate": "integrations.peft",
    "dequantize": "ops.dequantize",
    "grouped_lora_linear": "ops.grouped_lora_linear",
    "load_adapter": "integrations.checkpoint",
    "lora_linear_group": "ops.lora_linear_group",
    "lora_mlp": "ops.lora_mlp",
    "multi_lora_fusion": "ops.multi_lora_fusion",
    "multi_lora_linear": "ops.multi_lora_linear",
    "multi_lora_linear_slices": "ops.multi_lora_linear",
    "plan_batch": "ops.batch_plan",
    "quantize": "quant",
    "quantize_base": "nn",
    "quantized_linear": "ops.quantized_linear",
    "save_adapter": "integrations.checkpoint",
    "slice_adapters": "ops.adapter_stack",
    "stack_adapters": "ops.adapter_stack",
}

__all__ = [
    "AdapterSlices",
    "AdapterStack",
    "BackendError",
    "BatchPlan",
    "LoRAConfig",
    "LoRALinear",
    "LoRAProjection",
    "QuantizedLinear",
    "QuantizedWeight",
    "__version__",
    "accelerate",
    "active_backend",
    "add_multi_lora_",
    "apply_lora",
    "calibrate",
    "decelerate",
    "dequantize",
    "dora_linear",
    "grouped_lora_linear",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
    "multi_lora_fusion",
    "multi_lora_linear",
    "multi_lora_linear_slices",
    "plan_batch",
    "quantize",
    "quantize_base",
    "quantized_linear",
    "save_adapter",
    "slice_adapters",
    "stack_adapters",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
