"""Every environment variable the package reads. Nothing else reads ``os.environ``."""

from __future__ import annotations

import os
from dataclasses import dataclass

_TRUE = {"1", "true", "yes", "on"}


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in _TRUE


@dataclass(frozen=True)
class Settings:
    """A snapshot of the environment; the comments are the documentation of each variable."""

    # LORA_KERNELS_BACKEND: auto | reference | triton | cpp | cuda; the backend outside `use_backend`.
    backend: str
    # LORA_KERNELS_SKIP_EXTENSION: 1 leaves the compiled extension unloaded, as if it were not built.
    skip_extension: bool
    # LORA_KERNELS_CPU_PRODUCTS: auto | panels | vendor | torch; which way ops go on the CPU (_cpu_ways.py).
    # auto: by shape, as `lora-kernels tune --cpu` measured or as this processor's defaults say.
    cpu_products: str
    # LORA_KERNELS_CPU_VERSION: auto | avx512 | avx2 | sse2 | neon; the instructions of the
    # extension's loops. auto: the widest that this processor has.
    cpu_version: str
    # TRITON_INTERPRET: 1 runs the Triton kernels on CPU tensors in Triton's own interpreter.
    triton_interpret: bool
    # LORA_KERNELS_PLANS: folder of the tables that `lora-kernels tune` writes and the planner reads;
    # by default lora_kernels/plans in XDG_CACHE_HOME, or in ~/.cache.
    plans: str


def _default_plans() -> str:
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.join("~", ".cache")
    return os.path.join(cache, "lora_kernels", "plans")


def read() -> Settings:
    """The settings as the environment stands now."""
    return Settings(
        backend=os.environ.get("LORA_KERNELS_BACKEND", "auto").strip() or "auto",
        skip_extension=_flag("LORA_KERNELS_SKIP_EXTENSION"),
        cpu_products=os.environ.get("LORA_KERNELS_CPU_PRODUCTS", "auto").strip() or "auto",
        cpu_version=os.environ.get("LORA_KERNELS_CPU_VERSION", "auto").strip() or "auto",
        triton_interpret=_flag("TRITON_INTERPRET"),
        plans=os.environ.get("LORA_KERNELS_PLANS", "").strip() or _default_plans(),
    )
