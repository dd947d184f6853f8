"""HiddenKey: dropout of whole keys and of hidden numbers, and two passes that must agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dropout import keep_scale
from ..optim._common import check_number


def dropkey_mask(batch: int, heads: int, keys: int, p: float, rng: torch.Generator | None = None) -> Tensor:
    """``[batch, heads, 1, keys]`` on the CPU: -∞ with probability p, else 0: a key is gone for every query

    DropKey by columns (Li et al., 2023, arXiv 2208.02646). Add it to the logits before the softmax.
    """
    dropped = torch.rand(batch, heads, 1, keys, generator=rng) < p
    return torch.zeros(batch, heads, 1, keys).masked_fill(dropped, -torch.inf)


def bidirectional_kl(p: Tensor, q: Tensor) -> Tensor:
    """½ (KL(P‖Q) + KL(Q‖P)) of the softmax of logits over their last dimension, a mean over the others."""
    value: Tensor = _BidirectionalKL.apply(p, q)
    return value


class _BidirectionalKL(torch.autograd.Function):
    """The gradient of ½ Σ (P - Q) (log P - log Q) is ½ (P (log P - log Q - KL(P‖Q)) + P - Q) in p's logits"""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        gap = log_p - log_q
        share_p, share_q = log_p.exp_(), log_q.exp_()
        change = share_p - share_q
        rows = max(p.numel() // max(p.shape[-1], 1), 1)
        value = 0.5 * torch.linalg.vecdot(change, gap).sum() / rows
        ctx.save_for_backward(share_p, share_q, gap)
        ctx.factor = 0.5 / rows
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        share_p, share_q, gap = ctx.saved_tensors
        change = share_p - share_q
        sides = []
        for share, sign, needed in zip((share_p, share_q), (1, -1), ctx.needs_input_grad, strict=True):
            divergence = sign * torch.linalg.vecdot(share, gap)[..., None]
            side = (sign * gap - divergence).mul_(share).add_(change, alpha=sign) if needed else None
            sides.append(None if side is None else side.mul_(ctx.factor * dy))
        return sides[0], sides[1]


class HiddenKey:
    """L = CE(P) + λ · ½ (KL(P‖Q) + KL(Q‖P)): P with DropKey and HiddenCut, Q without

    HiddenKey (Wang et al., 2024, arXiv 2403.00812). For the paper's details this is a reading: HiddenCut
    acts on what feed-forward blocks give, Q is a pass without either. Attention modules are those of
    Transformers, with ``hidden_states`` and ``attention_mask`` and heads in their config; where one is
    called with no mask and is causal, it gets a causal one. A query whose every key was dropped keeps them.
    Outside of :meth:`loss` the model is as it was.

    Args:
        attention: modules whose keys are dropped.
        hidden: modules whose output loses numbers.
        p_key: of a key, for each sample and head.
        p_hidden: of a number.
        kl: λ; 0 makes one pass (HiddenKey⁻).
        seed: of the keys.

    Raises:
        TypeError: of a wrong type.
        ValueError: a number is out of range, or there are no modules.
    """

    def __init__(
        self,
        attention: Iterable[nn.Module] = (),
        hidden: Iterable[nn.Module] = (),
        *,
        p_key: float = 0.1,
        p_hidden: float = 0.1,
        kl: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.attention, self.hidden = list(attention), list(hidden)
        for name, modules in (("attention", self.attention), ("hidden", self.hidden)):
            for module in modules:
                if not isinstance(module, nn.Module):
                    raise TypeError(f"{name}: expected modules, got {type(module).__name__}")
        if not self.attention and not self.hidden:
            raise ValueError("attention: expected modules to act on, here or in hidden, got none")
        check_number("p_key", p_key, 0.0, 1.0)
        check_number("p_hidden", p_hidden, 0.0, 1.0)
        check_number("kl", kl)
        self.p_key, self.p_hidden, self.kl = p_key, p_hidden, kl
        self.rng = torch.Generator().manual_seed(seed)

    def loss(self, forward: Callable[[], Any]) -> Tensor:
        """The loss of a batch; ``forward()`` gives the model's output with ``loss`` and ``logits``."""
        with self.dropping():
            dropped = forward()
        loss: Tensor = dropped.loss
        return loss + self.kl * bidirectional_kl(dropped.logits, forward().logits) if self.kl else loss

    @contextlib.contextmanager
    def dropping(self) -> Iterator[None]:
        """Inside the block modules in training mode drop."""
        handles = [one.register_forward_pre_hook(self._keys, with_kwargs=True) for one in self.attention]
        handles += [one.register_forward_hook(self._cut) for one in self.hidden]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y * keep_scale(y, self.p_hidden) if module.training and self.p_hidden else y

    def _keys(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training or not self.p_key:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        length, mask = x.shape[1], kwargs.get("attention_mask")
        bare = _additive(mask, length, bool(getattr(module, "is_causal", False)), x)
        heads = module.config.num_attention_heads
        both = bare + dropkey_mask(x.shape[0], heads, bare.shape[-1], self.p_key, self.rng).to(x)
        empty = both.amax(-1, keepdim=True) == -torch.inf
        return args, {**kwargs, "attention_mask": torch.where(empty, bare, both)}


def _additive(mask: Tensor | None, length: int, causal: bool, like: Tensor) -> Tensor:
    """A mask as numbers to add to logits: -∞ where there is nothing to see."""
    if mask is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=like.device)
        mask = (seen.tril() if causal else seen)[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf).to(like.dtype)
