"""Which layers of PEFT's tuners :func:`.peft.accelerate` takes over, as a page: docs/peft.md."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .peft import TAKEOVERS
from .tuners.left import LEFT, QUANTIZED

# Around the table in the README.
BEGIN = "<!-- peft: made by `lora-kernels peft --write` -->\n"
END = "<!-- end of peft -->"
_HEAD = """# PEFT's tuners

Made by `lora-kernels peft --write` of what `accelerate` knows, for PEFT {version}.
`accelerate(model)` gives the fused forward to layers of the classes in the second column, over
`nn.Linear` (and Transformers' `Conv1D` where PEFT has it) or the layer that the class names; its
report names each layer that stays PEFT's, with the reason. LoRA's `Linear` over bitsandbytes' NF4
and int8 is fused too, where bitsandbytes is installed; the quantised layers of other tuners are
not. Of a mixed model (`PeftMixedModel`) a layer that wraps another tuner's layer stays PEFT's.

| tuner | fused | stays PEFT's |
|---|---|---|
"""
_NO_LAYERS = "it adds prompts or blocks to the model, and no layer of its own in the place of a linear"


def tuners() -> list[str]:
    """The packages below ``peft.tuners`` that are tuners, by name."""
    return sorted({kind.__module__.split(".")[2] for kind in PEFT_TYPE_TO_TUNER_MAPPING.values()})


def layers_of(tuner: str) -> list[type[nn.Module]]:
    """PEFT's classes of layers of one tuner, but for those over bases of libraries that quantise."""
    found = [kind for module in _modules(tuner) for kind in vars(module).values() if _is_layer(kind, module)]
    return sorted(found, key=lambda kind: (kind not in TAKEOVERS, kind.__name__))


def _modules(tuner: str) -> Iterator[Any]:
    package = importlib.import_module(f"peft.tuners.{tuner}")
    for one in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not one.ispkg and one.name.split(".")[-1] not in QUANTIZED:
            yield importlib.import_module(one.name)


def _is_layer(kind: Any, module: Any) -> bool:
    """Whether it is one that models get: no base class of others."""
    if not inspect.isclass(kind) or kind.__module__ != module.__name__:
        return False
    if not issubclass(kind, nn.Module) or not issubclass(kind, BaseTunerLayer):
        return False
    return not any(kind in other.__mro__[1:] for other in vars(module).values() if inspect.isclass(other))


def page() -> str:
    """docs/peft.md."""
    rows = [f"| `{tuner}` | {' | '.join(_cells(tuner))} |\n" for tuner in tuners()]
    return _HEAD.format(version=peft.__version__) + "".join(rows)


def table() -> str:
    """The README's: the tuners with a fused layer, and those with none."""
    fused = [tuner for tuner in tuners() if any(kind in TAKEOVERS for kind in layers_of(tuner))]
    left = [tuner for tuner in tuners() if tuner not in fused and layers_of(tuner)]
    rows = (("fused by `accelerate`", fused), ("left to PEFT", left))
    body = "".join(f"| {what} | {' '.join(f'`{one}`' for one in names)} |\n" for what, names in rows)
    return f"| PEFT's tuners | [layers and reasons](docs/peft.md) |\n|---|---|\n{body}"


def _cells(tuner: str) -> tuple[str, str]:
    kinds = layers_of(tuner)
    if not kinds:
        return "-", _LAYERLESS.get(tuner, _NO_LAYERS)
    fused, left = (
        [f"`{kind.__name__}`" for kind in kinds if (kind in TAKEOVERS) is taken] for taken in (True, False)
    )
    why = f"{', '.join(left)}: {LEFT.get(tuner, 'no fused form')}" if left else ""
    return ", ".join(fused) or "-", why


_LAYERLESS = {
    "xlora": "its layers are LoRA's with a forward that it replaced",
    "shadow": "it runs a small model beside the other",
}
