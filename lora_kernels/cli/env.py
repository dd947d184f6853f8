"""``lora-kernels env``: versions, backends, and why each is on or off."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Mapping
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
        "auto picks": {kind: _auto(kind) for kind in dict.fromkeys((device, "cpu"))},
        "cpu ways": _cpu_ways(),
        "backends": {name: _state(name, device) for name in _backend.BACKENDS if name != "auto"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_ways() -> dict[str, str]:
    """Which way each op goes on the CPU, by class of shape (rows/weight/rank), and why."""
    from .. import _cpu_ways, _extension

    if reason := _extension.load():
        return {"all": f"PyTorch: {reason}"}
    return {op: "; ".join(_told(classes)) for op, classes in _cpu_ways.now().items()}


def _told(classes: Mapping[str, Any]) -> list[str]:
    """A line for each way and reason, the one of most classes without their names."""
    by_choice: dict[Any, list[str]] = {}
    for name, choice in classes.items():
        by_choice.setdefault(choice, []).append(name)
    (usual, _), *others = sorted(by_choice.items(), key=lambda pair: -len(pair[1]))
    lines = [f"{usual.way} ({usual.why})"]
    return lines + [f"{way} for {' '.join(names)} ({why})" for (way, why), names in others]


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
            width = max(12, *map(len, value))
            for name, text in value.items():
                print(f"  {name:<{width}} {text}")
        else:
            print(f"{key:<16} {value}")
    return 0
