"""TA-LoRA: one update tensor for several tasks, in Tucker form.

Over 60 lines: a task for the batch and a task for each sample are two ways.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import Adapter, register
from ..call import Call
from ..site import Site, Start
from ..update import LowRank


@register("ta_lora")
class TALoRA(Adapter):
    """ΔW_k = (α/r) · B C_k A for task k, C_k = (Σ_v G[:, :, v] U[k, v])ᵀ

    TA-LoRA (Wang et al., 2024, arXiv 2403.10971), with the tensor of the same authors' later program, since
    of the paper itself only the abstract was at hand. A ``[r, in]``, B ``[out, r_out]``, U ``[tasks, v]`` of
    N(0, 1) and the core G ``[r, r_out, v]`` = 0 train; their scale is 0.5, ``lora_alpha = r / 2``.
    ``call["task"]`` is a number for the whole batch, or integers for the first dimensions of x.
    ``method_options``: ``tasks`` (3), ``rank_out`` (r), ``rank_tasks`` v (4).
    """

    options = frozenset({"tasks", "rank_out", "rank_tasks"})
    plain = False
    reads_x = True
    mergeable = False

    def build(self, site: Site) -> Start:
        """A, B, the tasks and the core."""
        tasks, v = site.whole_option("tasks", 3), site.whole_option("rank_tasks", 4)
        r_out = site.whole_option("rank_out", self.r)
        shape = self.r, r_out, v
        tensors = {
            "lora_A": site.normal(self.r, site.in_features),
            "lora_B": site.normal(site.out_features, r_out),
            "tasks": site.normal(tasks, v),
            "core": site.zeros(*shape) if self.init_lora_weights else site.normal(*shape),
        }
        return Start(tensors)

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """C_k folded into A for one task, or applied to h for a task each."""
        task: Any = call["task"]
        if not isinstance(task, Tensor):
            if not 0 <= task < len(self.tasks):
                raise ValueError(f"call: task: expected 0 to {len(self.tasks) - 1}, got {task}")
            return LowRank((self.core @ self.tasks[task]).T @ self.lora_A, self.lora_B, self.scaling)
        lead = task.shape
        if x.shape[: len(lead)] != lead or len(lead) >= x.dim():
            raise ValueError(
                f"call: task: expected one for each of the first dimensions of x {tuple(x.shape)},"
                f" got {tuple(lead)}"
            )
        h = F.linear(self.drop(x), self.lora_A.to(x.dtype))
        cores = torch.einsum("rsv,kv->krs", self.core, self.tasks).to(h.dtype)[task]
        tokens = math.prod(h.shape[len(lead) : -1])
        mixed = (h.reshape(*lead, tokens, self.r) @ cores).reshape(*h.shape[:-1], cores.shape[-1])
        return LowRank(None, self.lora_B, self.scaling, x_lora=mixed)

    def norms(self) -> list[Tensor]:
        """‖A Aᵀ - I‖, ‖Bᵀ B - I‖ and ‖G_vᵀ G_v - I‖ of each slice v."""
        grams = [self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B]
        grams += [one.T @ one for one in self.core.unbind(-1)]
        return [(gram - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]


def orthogonality(model: nn.Module) -> Tensor:
    """The mean of :meth:`TALoRA.norms` over all adapters of ``model``: the paper's regulariser, over λ.

    Raises:
        ValueError: there are none.
    """
    norms = [norm for one in model.modules() if isinstance(one, TALoRA) for norm in one.norms()]
    if not norms:
        raise ValueError("model: expected adapters of the method ta_lora, got none")
    return torch.stack(norms).mean()
