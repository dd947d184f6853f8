"""The autograd of ``multi_lora_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._lora_function import output_like
from .adapter_stack import AdapterStack
from .batch_plan import BatchPlan


def differentiable(
    x: Tensor,
    weight: Tensor | None,
    adapters: AdapterStack,
    weights: Tensor | None,
    bias: Tensor | None,
    ps: Tensor | None,
    plan: BatchPlan,
) -> Tensor:
    """x Wᵀ + b and the delta, with gradients; ``ps`` is each slot's dropout."""
    coef = _coefficients(adapters, weights, plan)
    return _MultiLoRALinear.apply(
        *(x, weight, bias, adapters.a_pages, adapters.b_pages, coef, adapters.pages, adapters.spans),
        *(plan, ps, adapters.max_rank),
    )


def _coefficients(adapters: AdapterStack, weights: Tensor | None, plan: BatchPlan) -> Tensor:
    """s times w of each slot."""
    # One more, for rows without an adapter.
    scalings = torch.cat([adapters.scalings, adapters.scalings.new_zeros(1)])
    coef = scalings[plan.ids]
    return coef if weights is None else coef * weights.reshape(-1).to(coef.dtype)


class _MultiLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a_pages: Tensor,
        b_pages: Tensor,
        coef: Tensor,
        pages: Tensor,
        spans: Tensor,
        plan: BatchPlan,
        ps: Tensor | None,
        max_rank: int,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = keep_scale = None
        if ps is not None:
            mask = _dispatch.call("row_dropout_mask", _dispatch.draw_seed(x), ps, x.shape[-1])
            keep_scale = 1.0 / (1.0 - ps)
        layout = (a_pages, b_pages, pages, spans, coef, plan.order, plan.offsets, plan.tiles)
        needs_x, needs_weight, _, needs_a, needs_b, needs_coef = ctx.needs_input_grad[:6]
        args = (rows, *layout, mask, keep_scale, max_rank, needs_b or needs_coef)
        ctx.backend = _dispatch.chosen("multi_lora_linear", *args)
        delta, h = _dispatch.call("multi_lora_linear", *args, backend=ctx.backend)
        ctx.max_rank = max_rank
        ctx.save_for_backward(
            x if needs_weight or needs_a else None,
            weight if needs_x else None,
            h if needs_b or needs_coef else None,
            *(mask, keep_scale, *layout),
        )
        y = delta if weight is None else delta.addmm_(rows, weight.T)
        return output_like(y if bias is None else y.add_(bias), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("multi_lora_linear: a double backward is not supported")
        x, weight, h, mask, keep_scale, *layout = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_coef = ctx.needs_input_grad[:6]
        dy_rows = dy.reshape(-1, dy.shape[-1])
        x_rows = None if x is None else x.reshape(-1, x.shape[-1])
        needs = [needs_x, needs_a, needs_b, needs_coef]
        given = iter(
            _dispatch.call(
                "multi_lora_linear_backward",
                *(dy_rows, x_rows if needs_a else None, *layout, h, mask, keep_scale, ctx.max_rank, needs),
                backend=ctx.backend,
            )
        )
        dx, da, db, dcoef = (next(given) if needed else None for needed in needs)
        if dx is not None and weight is not None:
            dx.addmm_(dy_rows, weight)
        return (
            None if dx is None else dx.view(*dy.shape[:-1], dx.shape[-1]),
            dy_rows.T @ x_rows if needs_weight else None,
            dy_rows.sum(0) if needs_bias else None,
            *(da, db, dcoef),
            *(None,) * 5,
        )
