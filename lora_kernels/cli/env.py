"""``lora-kernels env``: versions, backends, and why each is on or off."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def report() -> dict[str, Any]:
    """What this installation is made of, and what it can run."""
    import torch

    from .. import __version__, _backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "lora_kernels": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "active backend": _backend.active_backend(),
        "cpu products": _cpu_products(),
        "auto picks": {kind: _auto(kind) for kind in dict.fromkeys((device, "cpu"))},
        "backends": {name: _state(name, device) for name in _backend.BACKENDS if name != "auto"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_products() -> str:
    from .. import _extension, _products, _settings

    if reason := _extension.load():
        return f"vendor: {reason}"
    chosen = _settings.read().cpu_products
    return f"auto, which is {_products.automatic()} here" if chosen == "auto" else chosen


def _auto(device: str) -> str:
    from .. import _backend

    return _backend.automatic(device)


def _state(name: str, device: str) -> str:
    import torch

    from .. import _backend

    kind = "cpu" if name == "cpp" else device
    dtype = torch.bfloat16 if name == "cuda" else torch.float32
    reason = _backend.unavailable(name, kind, dtype, 8)
    return f"on, for {kind} tensors" if reason is None else f"off: {reason}"


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    facts = report()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, text in value.items():
                print(f"  {name:<12} {text}")
        else:
            print(f"{key:<16} {value}")
    return 0
