"""A quantised linear whose groups of inputs have offsets, into which QA-LoRA merges exactly."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters import LoRAConfig, make
from ...adapters.layer_kinds.qalora import QALoRA
from ...ops.dequantize import dequantize
from ...quant.grouped import icq_quantize, int4_values, quantize_int4
from ..quantized import QuantizedLinear


class _Int4Product(torch.autograd.Function):
    """x (α ⊙ q)ᵀ, decoded in either pass; the codes alone are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return x @ _decoded(codes, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return dy @ _decoded(codes, scales, dy.dtype), None, None


def _decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    values = int4_values(codes).to(dtype)
    return (values.unflatten(1, (scales.shape[1], -1)) * scales.to(dtype)[..., None]).flatten(1)


class Int4Codes(nn.Module):
    """y = x (α ⊙ q)ᵀ over int4 codes of groups, in plain PyTorch: no kernel decodes them yet.

    Args:
        codes: uint8 ``[out, in/2]``, as of :func:`lora_kernels.quant.quantize_int4`.
        scales: α ``[out, in/group]``.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in]``."""
        return _Int4Product.apply(x, self.codes, self.scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """α ⊙ q."""
        return _decoded(self.codes, self.scales, dtype)


class OffsetLinear(nn.Module):
    """y = x Qᵀ + pool(x) Tᵀ + b, pool the sum over each group of inputs: W = Q + T, T one number a group

    QA-LoRA's int4 base with float zeros (:meth:`int4`, T = -α z) and IR-QLoRA's NF4 with calibrated offsets
    (:meth:`icq`, whose products run on the kernels of :class:`QuantizedLinear`). :meth:`adapt` adds QA-LoRA,
    whose ΔW is one number a group as well: :meth:`merge` adds it to T, and no code changes. The part ``core``
    of an icq one takes adapters of any method by ``apply_lora``.

    x is ``[..., in]`` of any floating dtype, which is y's.

    Args:
        core: what computes x Qᵀ: :class:`Int4Codes` or a :class:`QuantizedLinear` without bias.
        offsets: T ``[out, in/group]``.
        in_features: columns of W.
        bias: b.
    """

    offsets: Tensor
    adapter: QALoRA | None

    def __init__(
        self, core: nn.Module, offsets: Tensor, in_features: int, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.core, self.in_features, self.out_features = core, in_features, offsets.shape[0]
        self.group = in_features // offsets.shape[1]
        self.register_buffer("offsets", offsets)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.adapter = None

    @classmethod
    def int4(cls, linear: nn.Linear, group: int = 32) -> Self:
        """``linear`` in int4 groups; see :func:`lora_kernels.quant.quantize_int4`."""
        codes, scales, offsets = quantize_int4(linear.weight, group)
        return cls(Int4Codes(codes, scales), offsets, linear.in_features, linear.bias)

    @classmethod
    def icq(cls, linear: nn.Linear, block: int = 64, **options: Any) -> Self:
        """``linear`` in NF4 with offsets; see :func:`lora_kernels.quant.icq_quantize`."""
        weight, offsets = icq_quantize(linear.weight, block, **options)
        return cls(QuantizedLinear(weight), offsets, linear.in_features, linear.bias)

    @property
    def zeros(self) -> Tensor:
        """z = -T/α of int4 groups.

        Raises:
            ValueError: the codes are others.
        """
        if not isinstance(self.core, Int4Codes):
            raise ValueError(f"core: expected Int4Codes, got {type(self.core).__name__}")
        return -self.offsets / self.core.scales

    def adapt(self, config: LoRAConfig) -> Self:
        """Adds a QA-LoRA of the same groups, which alone trains.

        Raises:
            ValueError: another method, groups of another size, or there is one already.
        """
        if config.method != "qalora" or self.adapter is not None:
            raise ValueError(f"config: expected one qalora for this base, got {config.method}")
        adapter = make(self.in_features, self.out_features, config, device=self.offsets.device)
        if not isinstance(adapter, QALoRA) or adapter.group != self.group:
            raise ValueError(f"group_size: expected the base's {self.group}, got another")
        self.adapter = adapter
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y for x ``[..., in]``."""
        y = self.core(x) + F.linear(self._pool(x), self.offsets.to(x.dtype), _as(self.bias, x))
        adapter = self.adapter
        if adapter is None:
            return y
        h = F.linear(self._pool(adapter.drop(x)), adapter.lora_A.to(x.dtype))
        return y + adapter.scaling * F.linear(h, adapter.lora_B.to(x.dtype))

    def _pool(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.group)).sum(-1)

    @torch.no_grad()
    def merge(self) -> Self:
        """Adds the adapter to T and drops it; a no-op without one."""
        if self.adapter is not None:
            self.offsets = self.offsets + self.adapter.by_group().to(self.offsets.dtype)
            self.adapter = None
        return self

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W ``[out, in]``, without the adapter."""
        core: Any = self.core
        codes = core.dense(dtype) if isinstance(core, Int4Codes) else dequantize(core.weight, dtype)
        return codes + self.offsets.to(dtype).repeat_interleave(self.group, 1)


def _as(bias: Any, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
