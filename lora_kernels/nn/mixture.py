"""A mixture of LoRA experts on one linear, with its router."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import LoRAConfig
from ..ops._inputs import autocasts
from ..ops.lora_linear import lora_linear
from ..ops.multi_lora_linear import AdapterStack, multi_lora_linear
from .adapter_layer import _HALF, shared_state


class LoRAMixtureLinear(nn.Linear):
    """y = x Wᵀ + b + s · Σ_j w_j (drop(x) A_jᵀ) B_jᵀ, w = softmax(x Rᵀ), j over the ``top_k`` largest w

    for each row of x by itself. With ``top_k`` below E, the number of experts, the weights of the chosen are
    divided by their sum and only the chosen experts are computed (MixLoRA, Li et al., 2024, arXiv
    2404.15159; SiRA, Zhu et al., 2023, arXiv 2311.09179). Else all of them are, as one adapter of rank E·r
    with w as a gate on its ranks (LoRAMoE, Dou et al., 2023, arXiv 2312.09979). Each chosen expert drops for
    itself; where all are computed, they share one mask.

    An ``nn.Linear`` (same ``weight`` and ``bias``, frozen). Expert j owns ``lora_A[j·r:(j + 1)·r]`` of
    ``[E·r, in_features]`` and ``lora_B[:, j·r:(j + 1)·r]`` of ``[out_features, E·r]``; ``router.weight`` is
    R ``[E, in_features]``. x is ``[..., in_features]`` of W's dtype. Experts and router are float32 on a
    half-precision base, where experts are cast in the call and the router computes in float32.

    After a forward pass in training, ``balance_loss`` is E · Σ_j f_j P_j, with f_j the share of choices that
    fell on expert j and P_j the mean of w_j before the choice: 1 where the load is even, and differentiable
    (Switch Transformer, Fedus et al., 2021, arXiv 2101.03961). Add a small multiple of each layer's to the
    loss. With all experts in use it is always 1. In evaluation it is ``None``.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        num_experts: E.
        top_k: how many experts a row uses; ``None`` for all.
        r: rank of each expert.
        lora_alpha: numerator of s.
        lora_dropout: probability in [0, 1) on the experts' input.
        use_rslora: s = alpha/√r in place of alpha/r.
        norm_topk_prob: whether the weights of the chosen are divided by their sum. With ``top_k=1`` they
            are then 1, and the router learns from ``balance_loss`` alone.
        bias: whether there is a b.
        device: of all parameters.
        dtype: of W and b.

    Raises:
        TypeError: an option of the wrong type, or x of another dtype than W outside autocast.
        ValueError: an option out of range, or x's last dimension is not ``in_features``.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router: nn.Linear
    balance_loss: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 4,
        top_k: int | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        norm_topk_prob: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = LoRAConfig(r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._start(config, num_experts, top_k, norm_topk_prob)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_experts: int = 4,
        top_k: int | None = None,
        *,
        norm_topk_prob: bool = True,
        **options: Any,
    ) -> LoRAMixtureLinear:
        """A mixture on the very parameters of ``linear``, which become frozen.

        Args:
            linear: an ``nn.Linear``. Its weight and bias are shared, not copied; hooks come along.
            num_experts: E.
            top_k: how many experts a row uses; ``None`` for all.
            norm_topk_prob: whether the weights of the chosen are divided by their sum.
            options: ``r``, ``lora_alpha``, ``lora_dropout`` and ``use_rslora``.

        Raises:
            TypeError: ``linear`` is not a plain ``nn.Linear``, or an option is unknown.
            ValueError: an option is out of range.
        """
        unknown = set(options) - {"r", "lora_alpha", "lora_dropout", "use_rslora"}
        if unknown:
            raise TypeError(
                f"options: expected r, lora_alpha, lora_dropout, use_rslora, got {sorted(unknown)}"
            )
        config = LoRAConfig(**options)
        layer = cls.__new__(cls)
        layer.__dict__.update(shared_state(linear, nn.Linear))
        layer._start(config, num_experts, top_k, norm_topk_prob)
        return layer

    def _start(self, config: LoRAConfig, experts: int, top_k: int | None, norm_topk_prob: bool) -> None:
        top_k = experts if top_k is None else top_k
        for name, value in (("num_experts", experts), ("top_k", top_k)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if experts < 1 or not 1 <= top_k <= experts:
            bad, want = ("num_experts", "at least 1") if experts < 1 else ("top_k", f"1 to {experts}")
            raise ValueError(f"{bad}: expected {want}, got {experts if experts < 1 else top_k}")
        self.num_experts, self.top_k, self.norm_topk_prob = experts, top_k, norm_topk_prob
        self.r, self.lora_dropout = config.r, config.lora_dropout
        self.scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        self.balance_loss = None
        weight = self.weight
        for parameter in (weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        kind: dict[str, Any] = {
            "dtype": torch.float32 if weight.dtype in _HALF else weight.dtype,
            "device": weight.device,
        }
        self.lora_A = nn.Parameter(torch.empty(experts * config.r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, experts * config.r, **kind))
        self.router = nn.Linear(self.in_features, experts, bias=False, **kind)
        self.reset_experts()

    def reset_experts(self) -> None:
        """Draws every A and the router anew, Kaiming-uniform, and zeroes every B."""
        for tensor in (self.lora_A, self.router.weight):
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected last dimension {self.in_features} (in_features), got shape {tuple(x.shape)}"
            )
        probs = self._probs(x)
        if self.top_k == self.num_experts:
            self.balance_loss = probs.new_ones(()) if self.training else None
            gate = probs.repeat_interleave(self.r, -1)
            factors = (self.lora_A, self.lora_B, self.scaling)
            p = self.lora_dropout if self.training else 0.0
            return lora_linear(x, self.weight, *factors, self.bias, gate=gate, dropout_p=p)
        weights, ids = probs.topk(self.top_k, -1)
        self.balance_loss = _balance_loss(probs, ids) if self.training else None
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        ps = [self.lora_dropout] * self.num_experts if self.lora_dropout else None
        tensors = (x, self.weight, self._stack(), ids, weights, self.bias)
        return multi_lora_linear(*tensors, dropout_ps=ps, training=self.training)

    def _probs(self, x: Tensor) -> Tensor:
        """softmax(x Rᵀ) in the router's dtype, under autocast too."""
        weight = self.router.weight
        whole = torch.autocast(x.device.type, enabled=False) if autocasts(x) else contextlib.nullcontext()
        with whole:
            return F.linear(x.to(weight.dtype), weight).softmax(-1)

    def _stack(self) -> AdapterStack:
        """The experts as pages: expert j has r of them from j·r on."""
        pages = torch.arange(self.num_experts * self.r, dtype=torch.int32, device=self.lora_A.device)
        first = pages[:: self.r]
        whole = torch.promote_types(self.lora_A.dtype, torch.float32)
        scalings = torch.full((self.num_experts,), self.scaling, dtype=whole, device=pages.device)
        spans = torch.stack([first, torch.full_like(first, self.r)], 1)
        return AdapterStack(self.lora_A, self.lora_B.T.contiguous(), pages, spans, scalings, self.r)

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss of the last pass, whose graph can be neither copied nor pickled."""
        return {**self.__dict__, "balance_loss": None}

    def extra_repr(self) -> str:
        """What the mixture is."""
        return (
            f"{super().extra_repr()}, num_experts={self.num_experts}, top_k={self.top_k}, r={self.r},"
            f" scaling={self.scaling:g}, lora_dropout={self.lora_dropout}"
        )


def _balance_loss(probs: Tensor, ids: Tensor) -> Tensor:
    experts = probs.shape[-1]
    chosen = ids.reshape(-1, 1) == torch.arange(experts, device=ids.device)
    share = chosen.sum(0).to(probs.dtype) / max(1, len(chosen))
    rows = probs.reshape(-1, experts)
    return experts * (share * (rows.sum(0) / max(1, len(rows)))).sum()
