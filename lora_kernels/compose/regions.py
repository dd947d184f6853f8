"""LoRA-Composer: each concept's adapter acts in the box of the image that is its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.lowered import low_rank_of
from ..ops.adapter_stack import stack_adapters
from ..ops.multi_lora_linear import multi_lora_linear

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside


class RegionRows(NamedTuple):
    """One row for each pixel and each region that covers it; a pixel outside of all has one of region -1."""

    # The pixel of each row, its region, and one over how many regions cover the pixel.
    pixel: Tensor
    region: Tensor
    weight: Tensor


def region_masks(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """``[boxes, height · width]``, true inside.

    Raises:
        ValueError: a box is empty or not within the image.

    Examples:
        >>> region_masks([(0, 0, 1, 2)], height=2, width=2)
        tensor([[ True,  True, False, False]])
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for i, (top, left, bottom, right) in enumerate(boxes):
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"boxes[{i}]: expected one within {height} x {width}, got {tuple(boxes[i])}")
        masks[i, top:bottom, left:right] = True
    return masks.flatten(1)


def region_row_index(boxes: Sequence[Box], height: int, width: int) -> RegionRows:
    """The rows of an image that is composed of regions, pixel by pixel.

    Examples:
        >>> rows = region_row_index([(0, 0, 2, 2), (2, 2, 4, 4)], height=4, width=4)
    """
    masks = region_masks(boxes, height, width)
    cover = masks.sum(0)
    bare = (cover == 0)[None]
    region, pixel = torch.cat([bare, masks]).nonzero().unbind(1)
    return RegionRows(pixel, region - 1, 1.0 / cover.clamp(min=1)[pixel])


def region_self_attn_mask(boxes: Sequence[Box], height: int, width: int, penalty: float = -1e6) -> Tensor:
    """``[pixels, pixels]`` to add to scores: no query in a box sees keys that lie in other boxes alone.

    Examples:
        >>> region_self_attn_mask([(0, 0, 2, 2), (2, 2, 4, 4)], height=4, width=4).shape
        torch.Size([16, 16])
    """
    masks = region_masks(boxes, height, width).float()
    together = (masks.T @ masks) > 0
    inside = masks.sum(0) > 0
    return penalty * (inside[:, None] & inside & ~together).float()


class RegionLoRA(nn.Module):
    """y_p = mean over the regions e of pixel p of W_out,e softmax(q_p k_eᵀ/√d) v_e,  q = W_q h

    LoRA-Composer (2024, arXiv 2403.11627), its cross-attention: k_e and v_e are of the prompt of region e
    under the region's adapter, and so is the output; outside of all boxes the base attends to the prompt of
    the background. All adapters go through each projection in one call.

    Args:
        to_q: as in an attention of diffusers; and so are ``to_k``, ``to_v`` and ``to_out``.
        to_k: a layer with adapters, or without.
        to_v: likewise.
        to_out: likewise.
        adapters: the adapter of each region.
        heads: how many.

    Raises:
        ValueError: an adapter that none of the layers has.
    """

    def __init__(
        self,
        to_q: nn.Module,
        to_k: nn.Module,
        to_v: nn.Module,
        to_out: nn.Module,
        adapters: Sequence[str],
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = to_q, to_k, to_v, to_out
        self.names, self.heads = tuple(adapters), heads
        known = {name for layer in (to_k, to_v, to_out) for name in getattr(layer, "adapters", ())}
        for name in self.names:
            if name not in known:
                raise ValueError(f"adapters: expected ones of {', '.join(sorted(known))}, got {name!r}")

    def forward(self, h: Tensor, prompts: Tensor, boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
        """``[pixels, d]``.

        Args:
            h: ``[pixels, d]``, row by row.
            prompts: ``[1 + regions, tokens, d_text]``, the background's first.
            boxes: one a region.
            size: height and width of the image.

        Raises:
            ValueError: prompts or pixels that are not as many, or a box outside of the image.
        """
        if len(boxes) != len(self.names) or len(prompts) != 1 + len(boxes) or len(h) != size[0] * size[1]:
            raise ValueError(
                f"prompts: expected {1 + len(self.names)} for {len(self.names)} boxes and {size[0] * size[1]}"
                f" pixels, got {len(prompts)}, {len(boxes)} and {len(h)}"
            )
        rows = RegionRows(*(t.to(h.device) for t in region_row_index(boxes, *size)))
        regions = torch.arange(-1, len(boxes), device=h.device)
        keys, values = (self._projected(layer, prompts, regions) for layer in (self.to_k, self.to_v))
        base = torch.full((len(h),), -1, device=h.device)
        queries = self._projected(self.to_q, h, base)[rows.pixel]
        seen = torch.cat(
            [
                self._attend(queries[rows.region == region], keys[region + 1], values[region + 1])
                for region in regions.tolist()
            ]
        )  # the rows are in the order of their regions
        out = self._projected(self.to_out, seen, rows.region)
        return out.new_zeros(len(h), out.shape[1]).index_add(
            0, rows.pixel, rows.weight.to(out)[:, None] * out
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)

    def _projected(self, layer: Any, x: Tensor, regions: Tensor) -> Tensor:
        """A linear under each row's adapter, in one call; a region whose adapter it has not is its base's."""
        there = [i for i, name in enumerate(self.names) if name in getattr(layer, "adapters", ())]
        weight = getattr(layer, "base_weight", layer.weight)
        if not there:
            return F.linear(x, weight, layer.bias)
        lora_as, lora_bs, scales = zip(
            *(low_rank_of(layer.adapters[self.names[i]]) for i in there), strict=True
        )
        numbers = torch.full((len(self.names) + 1,), -1, device=x.device)
        numbers[torch.tensor(there, device=x.device)] = torch.arange(len(there), device=x.device)
        return multi_lora_linear(
            x, weight, stack_adapters(lora_as, lora_bs, scales), numbers[regions], bias=layer.bias
        )


def composer_loss(
    cross: Tensor,
    self_attention: Tensor,
    boxes: Sequence[Box],
    weights: tuple[float, float, float] = (8, 2, 10),
) -> Tensor:
    """8 Σ_e max(0, 1 − top(c_e g_e)) + 2 Σ_e ‖proj(c_e) − proj(R_e)‖₁ + 10 Σ_e top(s from R_e to outside)

    LoRA-Composer's loss on latents (2024, arXiv 2403.11627). c_e is the concept token's attention, smoothed
    by a Gaussian of 3 × 3 and σ = 0.5, g_e a Gaussian window (σ = 1 on [-1, 1]) in the box, top the mean of
    the largest fifth, proj the maxima of rows and of columns. From a description; what it leaves open (the
    largest fifth of the self-attention too) was chosen here.

    Args:
        cross: ``[regions, height, width]``, c_e before smoothing.
        self_attention: ``[pixels, pixels]``, queries first.
        boxes: one a region.
        weights: of the three terms.

    Examples:
        >>> cross, within = torch.rand(1, 8, 8), torch.rand(64, 64)
        >>> loss = composer_loss(cross, within, boxes=[(0, 0, 4, 4)])
    """
    height, width = cross.shape[-2:]
    masks = region_masks(boxes, height, width).to(cross.device)
    taps = torch.exp(-torch.arange(-1.0, 2.0).square() / (2 * 0.5**2)).to(cross)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    smooth = F.conv2d(F.pad(cross[:, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0]
    total = cross.new_zeros(())
    for one, (top, left, bottom, right), mask in zip(smooth, boxes, masks, strict=True):
        window = torch.outer(_bell(bottom - top), _bell(right - left)).to(cross)
        fill = _top((one[top:bottom, left:right] * window).flatten())
        box = mask.view(height, width).to(cross)
        sides = sum(((one * box).amax(dim) - box.amax(dim)).abs().sum() for dim in (0, 1))
        outside = _top(self_attention[mask][:, ~mask].flatten())
        parts = torch.stack([(1 - fill).clamp(min=0), torch.as_tensor(sides), outside])
        total = total + (parts * torch.tensor(weights).to(parts)).sum()
    return total


def _bell(size: int) -> Tensor:
    return torch.exp(-torch.linspace(-1, 1, size).square() / 2) if size > 1 else torch.ones(1)


def _top(values: Tensor, share: float = 0.2) -> Tensor:
    """The mean of the largest; 0 of nothing."""
    if not values.numel():
        return values.sum()
    return values.topk(max(1, int(share * values.numel()))).values.mean()
