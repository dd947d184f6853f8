"""Factors that are tensor trains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..site import Site

# LoRETTA's own shapes of the factors of r = 8, by the side of W.
_SHAPES = {768: (8, 8, 12, 8), 1024: (4, 8, 8, 8, 4), 4096: (16, 16, 8, 4, 4)}
_WIDEST = 8


def train_shape(site: Site, name: str, side: int, rank: int) -> tuple[int, ...]:
    """n_1..n_d, whose product is ``side · rank``: the option ``name``, LoRETTA's own, or small factors.

    Raises:
        ValueError: the option has another product.
    """
    default = _SHAPES.get(side, ()) if rank == 8 else ()
    shape = tuple(site.option(name, default or _small_factors(side * rank)))
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape) or math.prod(shape) != side * rank:
        raise ValueError(
            f"method_options: {name}: expected whole numbers of product {side} · {rank}, got {shape}"
        )
    return shape


def _small_factors(number: int) -> tuple[int, ...]:
    """The prime factors, put together while they stay within 8."""
    found, last, prime = [], 1, 2
    while number > 1:
        while number % prime:
            prime += 1
        number //= prime
        if last * prime > _WIDEST and last > 1:
            found.append(last)
            last = 1
        last *= prime
    return (*found, last)


def draw_train(site: Site, shape: tuple[int, ...], inner: int, std: float) -> list[Tensor]:
    """Cores G_k ``[R_{k-1}, n_k, R_k]``, the inner R ``inner``, whose product has entries of this deviation.

    N(0, 1) / √R_k · std^(1/d): a product is a sum over Π R_k paths.
    """
    ranks = (1, *[inner] * (len(shape) - 1), 1)
    each = std ** (1 / len(shape))
    sizes = zip(ranks[:-1], shape, ranks[1:], strict=True)
    return [site.normal(*size, std=each / math.sqrt(size[-1])) for size in sizes]


def contract(cores: list[Tensor]) -> Tensor:
    """G_1 × … × G_d, flat, the last index first to run."""
    whole = cores[0].flatten(0, 1)
    for core in cores[1:]:
        whole = torch.mm(whole, core.flatten(1)).view(-1, core.shape[-1])
    return whole.flatten()
