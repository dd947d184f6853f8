"""ResLoRA: residual paths from one layer's branch to the next of its role.

Over 60 lines: it is three forms, two of which merge by estimates.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import register
from ..call import Call
from ..lora import LoRA
from ..site import Site, Start
from ..update import LowRank

_CHAINS = itertools.count()


@register("reslora")
class ResLoRA(LoRA):
    """bs: Δy_l = s Σ_i B_{l-i} A_{l-i} x_l; is: s B_l A_l (x_l + x_{l-1}); ms: s B_l Σ_i A_{l-i} x_{l-i}

    for i = 0 … n and s = α/r. ResLoRA (Shi et al., 2024, arXiv 2402.18039). l-1 is the layer before whose
    name ends alike, where sizes and rank are the same. ``method_options``: ``mode`` (``"bs"``); ``pre_num``
    n of bs and ms (-1: all); ``first``, whether is's first layer adds its own x (``"double"``, as the
    authors' program does) or nothing (``"single"``); ``merge``, by what is (``"input"``, ``"weight"``) and ms
    (``"input"``, ``"scalar"``) merge: only nearly, after :func:`lora_kernels.stats.estimate_reslora_merge`.
    bs merges exactly. is and ms pass values on within a forward pass of the model that ``apply_lora`` got.
    """

    options = frozenset({"mode", "pre_num", "first", "merge"})
    reads_x = True
    peft = False
    splits = {}  # noqa: RUF012

    def build(self, site: Site) -> Start:
        """LoRA's A and B, and those of the layers before that the mode reads."""
        self.mode = site.option("mode", "bs", ("is", "bs", "ms"))
        self.merge_by = site.option("merge", "input", ("input", "scalar" if self.mode == "ms" else "weight"))
        self.doubles = site.option("first", "double", ("double", "single")) == "double"
        self.plain, self.passes_on = self.mode == "bs", self.mode != "bs"
        self.__dict__["reads_x"] = self.passes_on
        most = 1 if self.mode == "is" else site.whole_option("pre_num", -1, -1)
        near = site.previous if self._continues(site.previous) else None
        self.chain = next(_CHAINS) if near is None else near.chain
        before = () if near is None else (near.key, *near.before)
        self.before = before if most < 0 else before[:most]
        tensors = dict(super().build(site).tensors)
        for name in {"bs": ("lora_A", "lora_B"), "ms": ("lora_A",)}.get(self.mode, ()):
            for i in range(len(self.before)):
                tensors[f"{name}_{i + 1}"] = getattr(near, f"{name}_{i}" if i else name)
        if self.mode != "bs":
            self.register_buffer("kappa", site.empty(max(1, len(self.before))).fill_(torch.nan))
        return Start(tensors)

    def _continues(self, near: object) -> bool:
        sizes = (self.in_features, self.out_features, self.r)
        return isinstance(near, ResLoRA) and (near.in_features, near.out_features, near.r) == sizes

    @property
    def key(self) -> str:
        """Where this layer's part of a call lies."""
        return f"{self.site}#{self.chain}"

    def _all(self, name: str) -> list[Tensor]:
        return [getattr(self, name), *(getattr(self, f"{name}_{i + 1}") for i in range(len(self.before)))]

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """The ranks of all side by side (bs), the sum of two inputs (is), or that of all h (ms)."""
        if self.mode == "bs":
            return LowRank(torch.cat(self._all("lora_A")), torch.cat(self._all("lora_B"), 1), self.scaling)
        if self.mode == "is":
            call[self.key] = x
            other = call[self.before[0]] if self.before else x
            summed = x + other if self.before or self.doubles else x
            return LowRank(self.lora_A, self.lora_B, self.scaling, x_lora=summed)
        h = F.linear(self.drop(x), self.lora_A.to(x.dtype))
        call[self.key] = h
        return LowRank(None, self.lora_B, self.scaling, x_lora=sum((call[key] for key in self.before), h))

    def merged(self, weight: Tensor, base: Tensor) -> Tensor:
        """W + s Σ B_{l-i} A_{l-i} (bs), W + (1 + κ) s B A (is), W + s B (A + Σ κ_i A_{l-i}) (ms, by input)

        Raises:
            RuntimeError: is and ms, where nothing is known of κ yet.
        """
        if self.mode == "bs":
            return super().merged(weight, base)
        if self.kappa.isnan().any():
            raise RuntimeError(
                f"cannot merge: reslora's {self.mode!r} needs estimate_reslora_merge(model, batches) before"
            )
        kappa, total = self.kappa.to(weight.dtype), self.lora_A.to(weight.dtype)
        if self.mode == "ms" and self.merge_by == "input":
            others = self._all("lora_A")[1:]
            for k, other in zip(kappa[: len(others)], others, strict=True):
                total = total + k * other.to(weight.dtype)
        else:
            total = (1 + kappa.sum()) * total
        return weight + self.scaling * (self.lora_B.to(weight.dtype) @ total)
