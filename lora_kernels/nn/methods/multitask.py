"""One linear with a branch for each task, beside one for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._arguments import LoraInputs
from ...adapters import LoRAConfig
from ...ops.lora_linear import scaling_as_gate
from ...ops.lora_linear_group import fused_group
from ..adapter_layer import _HALF, shared_state

MODES = ("matrix", "matrixv2", "addition")
SHARED = "shared"


class MultiTaskLinear(nn.Linear):
    """y = x Wᵀ + b + s₀ · B₀ A₀ d and for each task t  y_t = x Wᵀ + b + s_t · B_t A_t d_t,  d = drop(x)

    MTLoRA (Agiza et al., 2024, arXiv 2403.20320). d_t is d, or what the layer before gave for the task; the
    frozen part is always that of x. ``mode``: ``"matrix"`` as above; ``"matrixv2"``: y_t has the shared
    branch too; ``"addition"``: there is none, and y = x Wᵀ + b + LayerNorm(Σ_t y_t), which does not start at
    the base.

    An ``nn.Linear`` (same ``weight`` and ``bias``, frozen); ``lora_A[name]`` is ``[r, in_features]`` and
    ``lora_B[name]`` ``[out_features, r]``, float32 on a half-precision base, with the tasks' names and
    ``"shared"``. x ``[..., in_features]`` is multiplied by W once, and all branches that read d are one
    :func:`lora_kernels.lora_linear_group`, with one mask.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        tasks: their names.
        r: rank of the shared branch.
        r_task: rank of each task's, or one for each by name.
        scale: s of all branches; the paper's are 4 and no α/r.
        lora_dropout: probability in [0, 1).
        mode: as above.
        train_scales: whether each s trains.
        bias: whether there is a b.
        device: of all parameters.
        dtype: of W and b.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, no tasks, or a name that is taken.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tasks: Sequence[str],
        r: int = 8,
        r_task: int | Mapping[str, int] = 4,
        scale: float = 4.0,
        lora_dropout: float = 0.05,
        mode: str = "matrix",
        train_scales: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start(tasks, r, r_task, scale, lora_dropout, mode, train_scales)

    @classmethod
    def from_linear(cls, linear: nn.Linear, tasks: Sequence[str], **options: Any) -> MultiTaskLinear:
        """One on the very parameters of ``linear``, which become frozen; the options are the class's.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or an option is unknown.
            ValueError: an option is out of range.
        """
        defaults = {"r": 8, "r_task": 4, "scale": 4.0, "lora_dropout": 0.05, "mode": "matrix"}
        known = {**defaults, "train_scales": False}
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise TypeError(f"options: expected {', '.join(known)}, got {', '.join(unknown)}")
        layer = cls.__new__(cls)
        layer.__dict__.update(shared_state(linear, nn.Linear))
        layer._start(tasks, **{**known, **options})
        return layer

    def _start(
        self,
        tasks: Sequence[str],
        r: int,
        r_task: int | Mapping[str, int],
        scale: float,
        lora_dropout: float,
        mode: str,
        train_scales: bool,
    ) -> None:
        names = _task_names(tasks)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        ranks = {name: r_task[name] if isinstance(r_task, Mapping) else r_task for name in names}
        if mode != "addition":
            ranks = {SHARED: r, **ranks}
        for rank in ranks.values():  # whose checks these are
            LoRAConfig(rank, lora_alpha=scale, lora_dropout=lora_dropout)
        self.tasks, self.mode, self.lora_dropout = names, mode, lora_dropout
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        dtype = torch.float32 if self.weight.dtype in _HALF else self.weight.dtype
        kind: dict[str, Any] = {"dtype": dtype, "device": self.weight.device}
        factors = ((rank, self.in_features) for rank in ranks.values())
        self.lora_A = nn.ParameterDict(
            {
                name: nn.init.kaiming_uniform_(torch.empty(*shape, **kind), a=math.sqrt(5))
                for name, shape in zip(ranks, factors, strict=True)
            }
        )
        self.lora_B = nn.ParameterDict(
            {name: torch.zeros(self.out_features, rank, **kind) for name, rank in ranks.items()}
        )
        self.scales: Any = dict.fromkeys(ranks, float(scale))
        if train_scales:
            self.scales = nn.ParameterDict({name: torch.full((1,), float(scale), **kind) for name in ranks})
        self.norm = nn.LayerNorm(self.out_features, **kind) if mode == "addition" else None

    def forward(  # type: ignore[override]
        self, x: Tensor, x_tasks: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the y_t by name; ``x_tasks`` has the d_t of some or all tasks, which are not dropped.

        Raises:
            ValueError: ``x_tasks`` names no task.
        """
        x_tasks = x_tasks or {}
        for name in x_tasks:
            if name not in self.tasks:
                raise ValueError(f"x_tasks: expected {', '.join(self.tasks)}, got {name!r}")
        base = F.linear(x, self.weight, self.bias)
        dropped = F.dropout(x, self.lora_dropout, self.training)
        found = self._branches([name for name in self.lora_A if name not in x_tasks], dropped)
        for name, one in x_tasks.items():
            found |= self._branches([name], one)
        shared = found.pop(SHARED, None)
        ys = {name: base + found[name] for name in self.tasks}
        if shared is None:
            assert self.norm is not None
            total = torch.stack(list(ys.values())).sum(0)
            return base + self.norm(total.to(self.norm.weight.dtype)).to(base.dtype), ys
        y = base + shared
        return y, {name: y + found[name] for name in self.tasks} if self.mode == "matrixv2" else ys

    def _branches(self, names: list[str], x: Tensor) -> dict[str, Tensor]:
        """s B A x of each."""
        ys = fused_group([self._member(name, x) for name in names]) if names else ()
        return dict(zip(names, ys, strict=True))

    def _member(self, name: str, x: Tensor) -> LoraInputs:
        scaling, gate, lora_b = self.scales[name], None, self.lora_B[name]
        if isinstance(scaling, Tensor):
            gate, scaling = scaling_as_gate(scaling, None, lora_b), 1.0
        return LoraInputs(x, None, self.lora_A[name], lora_b, None, gate, None, None, scaling, 0.0)

    def extra_repr(self) -> str:
        """The linear's, and what the branches are."""
        ranks = {name: len(factor) for name, factor in self.lora_A.items()}
        return f"{super().extra_repr()}, mode={self.mode}, r={ranks}, lora_dropout={self.lora_dropout}"


def _task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str) or not all(isinstance(name, str) for name in tasks):
        raise TypeError(f"tasks: expected a list of names, got {tasks!r}")
    names = tuple(tasks)
    bad = [name for name in names if name == SHARED or "." in name or not name]
    if not names or bad or len(set(names)) != len(names):
        raise ValueError(
            f"tasks: expected different names without dots, none of them {SHARED!r}, got {names}"
        )
    return names
