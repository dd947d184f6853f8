"""What the optimisers share: their pairs, their checks, and one AdamW step over lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.pairs import Pair, lora_pairs

# Where torch has an AdamW that reads and writes each tensor once.
_FUSED_DEVICES = ("cpu", "cuda")
_WITH_FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def pairs_of(model: nn.Module) -> list[Pair]:
    """The pairs of ``model``.

    Raises:
        TypeError: not a module.
        ValueError: there are none.
    """
    pairs = list(lora_pairs(model))
    if not pairs:
        want = "a model with LoRA layers (of apply_lora or PEFT)"
        raise ValueError(f"model: expected {want}, got {type(model).__name__} with none")
    return pairs


def trainable(model: nn.Module, without: Iterable[Tensor] = ()) -> list[nn.Parameter]:
    """The parameters that train, but for those given."""
    left_out = {id(parameter) for parameter in without}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> None:
    """Raises where ``value`` is no number, or not in [low, high) (with ``above`` in (low, high))."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (low < value < high or (value == low and not above)):
        left = f"{low:g} <" if above else f"{low:g} <="
        right = "" if high == math.inf else f" < {high:g}"
        raise ValueError(f"{name}: expected {left} {name}{right}, got {value}")


def check_count(name: str, value: Any) -> None:
    """Raises where ``value`` is no int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_keys(name: str, want: Collection[str], given: Any) -> None:
    """Raises where ``given`` is no mapping of exactly these keys."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(given).__name__}")
    for key in want:
        if key not in given:
            raise ValueError(f"{name}: expected {key!r}, got {', '.join(map(repr, given)) or 'nothing'}")
    for key in given:
        if key not in want:
            raise ValueError(f"{name}: expected {', '.join(map(repr, want)) or 'nothing'}, got {key!r}")


def check_adamw(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Raises where AdamW's numbers are out of range."""
    check_number("lr", lr)
    check_number("eps", eps)
    check_number("weight_decay", weight_decay)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, 0.0, 1.0)


def check_optimizer_class(cls: Any) -> None:
    """Raises where ``cls`` is no class of optimisers."""
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"optimizer_cls: expected a subclass of torch.optim.Optimizer, got {cls!r}")


def build(cls: type[Optimizer], groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    """``cls`` over the groups, in torch's fused form where it has one and none was asked for."""
    tensors = [p for group in groups for p in group["params"]]
    fits = all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for p in tensors)
    if (
        cls in _WITH_FUSED
        and fits
        and not {"fused", "foreach", "differentiable", "capturable"} & set(options)
    ):
        options = {**options, "fused": True}
    return cls(groups, **options)  # type: ignore[call-arg]


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step gives, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def alike(tensors: Sequence[Tensor], *keys: Sequence[Any]) -> Iterator[list[int]]:
    """The places of the tensors that share a device, a dtype and each of the further keys."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype, *(key[i] for key in keys)), []).append(i)
    yield from places.values()


@torch.no_grad()
def grams(factors: Sequence[Tensor]) -> Tensor:
    """F Fᵀ of each F [r, n], all of one shape of result, stacked and in float64.

    The products are summed in at least float32; what is r × r is then small enough to be exact with.
    """
    first = factors[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    found = first.new_empty(len(factors), first.shape[0], first.shape[0], dtype=wide)
    for factor, gram in zip(factors, found.unbind(), strict=True):
        torch.mm(factor.to(wide), factor.T.to(wide), out=gram)
    return found.double()


def adamw_(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> None:
    """m ← β₁ m + (1-β₁) g, v ← β₂ v + (1-β₂) g², p ← p - η √c₂/c₁ · m / (√v + ε), cᵢ = 1 - βᵢᵗ

    and p ← p - η λ p after it: AdamW as Transformers once wrote it, whose ε stands beside √v and not beside
    √(v/c₂). ``correct_bias=False`` in the group sets c₁ = c₂ = 1. Each state has ``step``, ``exp_avg`` and
    ``exp_avg_sq``, made here where they are missing.
    """
    for parameter, state in zip(params, states, strict=True):
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
    for places in alike(params, [state["step"] for state in states]):
        some = [states[i] for i in places]
        moments = [state["exp_avg"] for state in some], [state["exp_avg_sq"] for state in some]
        chosen = [params[i] for i in places], [grads[i] for i in places]
        _adamw_of_one_step(*chosen, *moments, some[0]["step"], group)


def _adamw_of_one_step(
    params: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    step: int,
    group: dict[str, Any],
) -> None:
    lr, (beta1, beta2), eps, decay = (float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if group.get("correct_bias", True) else (1.0, 1.0)
    if params[0].device.type in _FUSED_DEVICES and group.get("correct_bias", True):
        # Its ε stands beside √(v/c₂).
        count = torch.full((), float(step), device=params[0].device)
        options: dict[str, Any] = {"amsgrad": False, "maximize": False, "weight_decay": 0.0}
        options.update(lr=lr, beta1=beta1, beta2=beta2, eps=eps / math.sqrt(c2))
        torch._fused_adamw_(params, grads, averages, squares, [], [count] * len(params), **options)
    else:
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, eps)
        torch._foreach_addcdiv_(params, averages, roots, -lr * math.sqrt(c2) / c1)
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
