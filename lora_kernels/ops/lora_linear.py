"""The fused LoRA linear: the public function, and which way a call goes."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import LoraInputs
from ..quant.weight import QuantizedWeight
from . import _dispatch
from ._inputs import autocasts, cast, check, compute_dtype
from ._lora_function import LoRALinearFunction, transformable
from .dropout import dropped


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight | None,
    lora_a: Tensor | None,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    gate: Tensor | None = None,
    x_lora: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """y = x Wᵀ + b + s · ((drop(x_lora) Aᵀ) ⊙ g) Bᵀ

    LoRA (Hu et al., 2021, arXiv 2106.09685) with an optional gate on the rank (SoRA, AdaLoRA, routers).

    Shapes: x ``[..., K]``, weight ``[N, K]`` (dense, or of :func:`lora_kernels.quantize`: QLoRA, arXiv
    2305.14314) or ``None`` (the branch alone), lora_a ``[r, K]``,
    lora_b ``[N, r]``, bias ``[N]``, gate ``[r]``, ``[..., r]`` or ``[..., 1]``, x_lora ``[..., K]`` of its
    own width, which is lora_a's; y is ``[..., N]``. Without lora_a x_lora is h ``[..., r]``. Factors for
    each sample along x's first dimension are lora_a ``[S, r, K]`` with lora_b ``[N, r]`` or ``[S, N, r]``.

    Dtypes: x, weight, bias and x_lora share one floating dtype, which is y's; lora_a, lora_b and gate
    may be of another (fp32 adapters on a half-precision base), they are cast and x never is. Under
    autocast everything is cast to autocast's dtype. Gradients come in the dtype of their tensor.

    Args:
        x: the input. Any strides, any number of rows, none included.
        weight: the base weight, frozen or trainable; a quantised one is frozen, and of any dtype.
        lora_a: the down-projection A; a strided view is not copied. ``None``: x_lora is drop(x) Aᵀ.
        lora_b: the up-projection B; a strided view is not copied.
        scaling: s, a number or a tensor of one element (which may require grad).
        bias: b.
        dropout_p: probability in [0, 1) that an element of the branch's input is dropped. The mask
            is drawn from torch's generator of x's device.
        gate: g, the same for all rows or one per row; ``[..., 1]`` is a scale for each row.
        x_lora: the branch's input where it differs from x; with no weight x is not read.
        training: ``False`` switches dropout off.

    Raises:
        TypeError: an argument is not a tensor, or of the wrong dtype.
        ValueError: a shape, a device or ``dropout_p`` does not fit; the message names it.
        BackendError: a backend forced by ``use_backend`` cannot run for these tensors.

    Examples:
        >>> x, weight, a, b = (torch.randn(*shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
        >>> y = lora_linear(x, weight, a.requires_grad_(), b.requires_grad_(), scaling=2.0, dropout_p=0.1)
        >>> y.sum().backward()
    """
    if x_lora is None and training:
        y = _dispatch.direct(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p)
        if y is not None:
            return y
    check(LoraInputs(x, weight, lora_a, lora_b, bias, gate, x_lora, None, 1.0, dropout_p), forms=True)
    if isinstance(scaling, Tensor):
        gate, scaling = scaling_as_gate(scaling, gate, lora_b), 1.0
    elif not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling: expected a number or a Tensor, got {type(scaling).__name__}")
    p = dropout_p if training else 0.0
    return fused(LoraInputs(x, weight, lora_a, lora_b, bias, gate, x_lora, None, scaling, p))


def fused(inputs: LoraInputs) -> Tensor:
    """:func:`lora_linear` for arguments already known to fit: what modules call at every step."""
    x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p = inputs
    if x_lora is None and seed is None:
        y = _dispatch.direct(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p)
        if y is not None:
            return y
    if _dispatch.sharded(x, lora_b):
        if isinstance(weight, QuantizedWeight):
            raise TypeError("weight: expected a DTensor beside the others, got a QuantizedWeight")
        from . import dtensor  # not at the top: torch.distributed.tensor takes long to import

        return dtensor.on_shards(fused, inputs)
    if autocasts(x):
        # Outside the Function, so that autograd casts the gradients back.
        dtype = compute_dtype(x)
        x, weight, bias, x_lora = (cast(t, dtype) for t in (x, weight, bias, x_lora))
        inputs = LoraInputs(x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, dropout_p)
    if gate is not None or x_lora is not None or lora_a is None or lora_a.dim() != 2 or lora_b.dim() != 2:
        if lora_b.dim() != 2 or (lora_a is not None and lora_a.dim() != 2):
            return _by_sample(inputs)
        inputs = _formed(inputs)
        x, _, lora_a, _, _, gate, x_lora, *_ = inputs
    if isinstance(weight, QuantizedWeight):
        from .quantized_lora_linear import fused_quantized

        return fused_quantized(inputs)
    if seed is None:
        if _dispatch.transformed():
            return transformable(inputs)
        if _dispatch.eager_cpp(x, lora_a.shape[0]):
            return torch.ops.lora_kernels.cpp_lora_linear_autograd.default(
                x, weight, lora_a, lora_b, bias, gate, x_lora, scaling, dropout_p
            )
    return LoRALinearFunction.apply(*inputs)


def _formed(inputs: LoraInputs) -> LoraInputs:
    """The same with a gate for each rank, with an A, and with x_lora only beside another x."""
    x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, p = inputs
    rank = lora_b.shape[1]
    if gate is not None and gate.shape[-1] != rank:
        gate = gate.expand(*x.shape[:-1], rank)
    if lora_a is None:  # h Iᵀ is h, exactly, and costs r columns
        lora_a = torch.eye(rank, dtype=lora_b.dtype, device=lora_b.device)
    if weight is None and x_lora is not None:
        x, x_lora = x_lora, None
    return LoraInputs(x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, p)


def _by_sample(inputs: LoraInputs) -> Tensor:
    """The products of factors for each sample are batched; the rest is as of any other call."""
    x, weight, lora_a, lora_b, bias, gate, x_lora, seed, scaling, p = inputs
    h = branch = x if x_lora is None else x_lora
    if p > 0.0:
        h = dropped(branch, p, seed)
    h = h if lora_a is None else _batched(h, lora_a)
    if lora_b.dim() == 2:
        return fused(LoraInputs(x, weight, None, lora_b, bias, gate, h, None, scaling))
    y = _batched(h if gate is None else h * gate.to(h.dtype), lora_b) * scaling
    if isinstance(weight, QuantizedWeight):
        from .quantized_linear import quantized_linear

        return quantized_linear(x, weight, bias) + y
    if weight is not None:
        return torch.nn.functional.linear(x, weight, bias) + y
    return y if bias is None else y + bias


def _batched(x: Tensor, factors: Tensor) -> Tensor:
    """x Fᵀ with one F for each sample along the first dimension, or for all."""
    factors = factors.to(x.dtype)
    if factors.dim() == 2:
        return torch.nn.functional.linear(x, factors)
    samples = x.reshape(x.shape[0], -1 if x.numel() else 0, x.shape[-1])
    return torch.bmm(samples, factors.transpose(1, 2)).view(*x.shape[:-1], factors.shape[1])


def scaling_as_gate(scaling: Tensor, gate: Tensor | None, lora_b: Tensor) -> Tensor:
    """s as part of g, so that autograd carries its gradient from g's."""
    if not scaling.is_floating_point():
        raise TypeError(f"scaling: expected a floating dtype, got {scaling.dtype}")
    if scaling.device != lora_b.device:
        raise ValueError(f"scaling: expected device {lora_b.device} (x's), got {scaling.device}")
    if scaling.numel() != 1:
        raise ValueError(f"scaling: expected one element, got shape {tuple(scaling.shape)}")
    flat = scaling.reshape(1)
    return flat.expand(lora_b.shape[-1]) if gate is None else gate * flat
