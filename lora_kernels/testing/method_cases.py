"""How the tests and the benchmarks build each registered structure, where its defaults do not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The sizes that the options of a case are made for.
IN, OUT, RANK = 12, 10, 4


@dataclass(frozen=True)
class MethodCase:
    """Options of the config, and the side inputs that a call of the layer on x needs.

    ``wide``: the options for a layer of so many inputs and outputs, where those of the small one do not do.
    """

    options: dict[str, Any] = field(default_factory=dict)
    side: Callable[[Tensor], dict[str, Any]] = lambda x: {}
    wide: Callable[[int], dict[str, Any]] | None = None

    def sized(self, width: int) -> dict[str, Any]:
        """The options for a layer of ``width`` inputs and outputs."""
        return self.options if self.wide is None else self.wide(width)


def _vlora(x: Tensor) -> dict[str, Any]:
    """An A for each row of x and each layer of the tests' models, the same each time."""
    rank, generator = RANK if x.shape[-1] < 64 else 16, torch.Generator().manual_seed(0)
    widths = {"": x.shape[-1], "q_proj": x.shape[-1], "k_proj": x.shape[-1], "back": OUT}
    shapes = {name: (x.shape[0], rank, width) for name, width in widths.items()}
    return {"vlora_A": {name: torch.randn(s, generator=generator).to(x) for name, s in shapes.items()}}


def _experts(**options: Any) -> dict[str, Any]:
    return {"method_options": {"experts": 3, **options}}


def _expert_weights(x: Tensor) -> dict[str, Any]:
    """Weights of three experts for each sample of x, the same each time."""
    weights = torch.rand(x.shape[0], 3, generator=torch.Generator().manual_seed(0))
    return {"expert_weights": weights.to(x)}


# A method that needs none has no line here.
CASES: dict[str, MethodCase] = {
    "fourierft": MethodCase({"method_options": {"n_frequency": 40, "scaling": 5.0}}, wide=lambda width: {}),
    "loha": MethodCase({"r": 1}, wide=lambda width: {}),
    "compacter": MethodCase({"method_options": {"n": 2}}, wide=lambda width: {}),
    "smt": MethodCase(
        {"method_options": {"block": 2, "blocks": [(0, 3), (2, 3), (4, 0)]}},
        wide=lambda width: {"method_options": {"block": width // 4, "blocks": [(0, 1)]}},
    ),
    "neft": MethodCase(
        {"method_options": {"rows": [7, 2]}},
        wide=lambda width: {"method_options": {"rows": [*range(0, width, 20)]}},
    ),
    "lofit": MethodCase({"method_options": {"heads": 2}}),
    "vlora": MethodCase(side=_vlora),
    "merged_linear": MethodCase(
        {"method_options": {"enable_lora": [True, False]}},
        wide=lambda width: {"method_options": {"enable_lora": [True, False, True, False]}},
    ),
    "qalora": MethodCase({"method_options": {"group_size": 2}}, wide=lambda width: {}),
    "ir_qlora": MethodCase({"r": 2}, wide=lambda width: {}),
    "vblora": MethodCase({"method_options": {"num_vectors": 6, "vector_length": 2}}, wide=lambda width: {}),
    "rst_lora": MethodCase(side=lambda x: {"token_scale": 1 + x.detach()[..., 0].abs()}),
    "mixlora": MethodCase(_experts()),
    "loramoe": MethodCase(_experts()),
    "sira": MethodCase(_experts(top_k=2, expert_dropout=0.0)),
    "moa": MethodCase(_experts()),
    "saml": MethodCase(_experts(), side=_expert_weights),
    "xlora": MethodCase(_experts(), side=_expert_weights),
    "arrow": MethodCase(_experts(top_k=2)),
    "ramole": MethodCase(_experts(router_rank=2)),
    "lorpman": MethodCase(side=lambda x: {"preference": torch.tensor([0.3, 0.7])}),
    "ta_lora": MethodCase(side=lambda x: {"task": torch.arange(len(x)) % 3}),
}


def case(method: str) -> MethodCase:
    """The case of a method."""
    return CASES.get(method, MethodCase())
