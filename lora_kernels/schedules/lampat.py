"""LAMPAT: adapters that learn under the worst small change of the embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..optim._common import check_count, check_number

MODES = ("pgd", "newton")


def adversarial_step(
    forward: Callable[[Tensor], Tensor],
    embeddings: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    steps: int = 2,
    lr: float = 2e-5,
    radius: float = 2e-5,
    smooth: float = 1.0,
    start: float = 1.0,
    mode: str = "pgd",
    seed: int | None = None,
) -> float:
    """Σ_k ∇ [CE(f(e+δ_k)) + μ · MSE(f(e+δ_k), f(e))] / K, δ_{k+1} = Π(δ_k + η g/‖g‖), g = ∂MSE/∂δ

    LAMPAT (Le et al., 2024, arXiv 2401.04348). Accumulates the gradients of what trains, which an optimiser
    then steps along; f(e) has none. δ starts normal with the size ``start / √(len · dim)``, zero where
    ``mask`` is; g/‖g‖ and the ball Π of ``radius`` are for each sequence. With ``mode="newton"``, as the
    paper's last epochs, the step is η Mᵀ g/‖g‖ with M = Hᵀ (H Hᵀ)⁻¹, H = ∂(Σ g)/∂δ, a double backward
    pass; a δ beyond the radius is then multiplied by diff · H · diff as the paper's code has it.

    Args:
        forward: f: embeddings to logits, such as ``lambda e: model(inputs_embeds=e).logits``.
        embeddings: e ``[batch, length, dim]``.
        loss: CE, of the logits.
        mask: ``[batch, length]``, zero where a token is padding.
        steps: K.
        lr: η.
        radius: of the ball.
        smooth: μ.
        start: size of the first δ.
        mode: ``"pgd"`` or ``"newton"``.
        seed: of δ's start; torch's generator by default.

    Returns:
        The mean of the K losses.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, no such mode, or embeddings of no three dimensions.

    Examples:
        >>> model, embeddings = nn.Linear(4, 2), torch.randn(2, 3, 4)
        >>> size = adversarial_step(model, embeddings, lambda logits: logits.square().mean())
    """
    check_count("steps", steps)
    for name, number in (("lr", lr), ("radius", radius), ("smooth", smooth), ("start", start)):
        check_number(name, number)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings: expected 3 dimensions, got {embeddings.dim()}")
    with torch.no_grad():
        clean = forward(embeddings)
    delta, total = _start(embeddings, mask, start, seed), 0.0
    for k in range(steps):
        delta.requires_grad_(True)
        logits = forward(embeddings + delta)
        gap = (logits - clean).square().mean()
        value = (loss(logits) + smooth * gap) / steps
        total += float(value.detach())
        last = k == steps - 1
        gradient = None if last else _gradient(gap, delta, mode)
        value.backward()
        if gradient is not None:
            delta = _moved(delta.detach(), *gradient, lr, radius)
    return total


def _start(embeddings: Tensor, mask: Tensor | None, size: float, seed: int | None) -> Tensor:
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    delta = torch.randn(embeddings.shape, generator=rng).to(embeddings)
    length = delta.new_full((len(delta),), delta.shape[1])
    if mask is not None:
        delta = delta * mask[..., None].to(delta)
        length = mask.sum(1).clamp(min=1).to(delta)
    return delta * (size / (length * delta.shape[2]).sqrt())[:, None, None]


def _gradient(gap: Tensor, delta: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """g, and H where it is asked for; the graph stays for the backward pass."""
    newton = mode == "newton"
    (gradient,) = torch.autograd.grad(gap, delta, create_graph=newton, retain_graph=True)
    curvature = torch.autograd.grad(gradient.sum(), delta, retain_graph=True)[0] if newton else None
    return gradient.detach(), curvature


def _moved(delta: Tensor, gradient: Tensor, curvature: Tensor | None, lr: float, radius: float) -> Tensor:
    direction = gradient / gradient.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    if curvature is None:
        delta = delta + lr * direction
        return delta * (radius / delta.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    inverse = torch.linalg.pinv(curvature @ curvature.mT)
    delta = delta + lr * (curvature.mT @ inverse).mT * direction
    norm = delta.norm(dim=(1, 2), keepdim=True)
    diff = torch.where(norm > radius, radius / norm.clamp(min=1e-30), 1.0)
    return torch.where(norm > radius, delta * (diff * curvature * diff), delta)
