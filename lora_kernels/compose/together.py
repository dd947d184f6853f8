"""One batch through one model under several adapters at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..nn import mixed_adapters
from ..nn.mixed import BASE


def forward_each(
    model: nn.Module,
    adapters: Sequence[str | None],
    *args: Any,
    repeats: Collection[int] = (),
    batch_dim: int | None = None,
    **kwargs: Any,
) -> list[Any]:
    """[model(x; adapter) for each adapter], in one pass over all of them

    The samples are given once and go through the base weights together, each adapter with its own copy of
    them; ``None`` is the base alone. The gradient of each adapter is that of its own pass. Copied are the
    tensors among the arguments whose first dimension is that of the first tensor, the samples; what has it
    in the output is given back in parts.

    Args:
        model: one of :func:`apply_lora` or :func:`train_adapters`.
        adapters: names, each once; ``None`` for none.
        args: of the model.
        repeats: as :func:`mixed_adapters`.
        batch_dim: as :func:`mixed_adapters`.
        kwargs: of the model.

    Returns:
        The model's output for each adapter, in their order.

    Raises:
        ValueError: no adapter, one twice, no tensor among the arguments, or as :func:`mixed_adapters`.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> tuned, base = forward_each(model, ["default", None], torch.randn(3, 4))
    """
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters: expected names or None, each once, got {adapters!r}")
    count = _samples([*args, *kwargs.values()])
    if count is None:
        raise ValueError("args: expected a tensor of samples among the arguments, got none")
    times = len(adapters)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(times, *[1] * (tensor.dim() - 1)) if _has(tensor, count) else tensor

    names = [BASE if name is None else name for name in adapters for _ in range(count)]
    with mixed_adapters(model, names, repeats, batch_dim):
        output = model(*_mapped(args, repeated), **_mapped(kwargs, repeated))

    def part(i: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[i * count : (i + 1) * count] if _has(tensor, times * count) else tensor

    return [_mapped(output, part(i)) for i in range(times)]


def _samples(values: Sequence[Any]) -> int | None:
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()), None)


def _has(tensor: Tensor, count: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == count


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value``, a tensor or containers of them, with ``function`` of each."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):  # a model's output is one, whose class wants all fields at once
        return type(value)(**{key: _mapped(one, function) for key, one in value.items()})
    if isinstance(value, (list, tuple)):
        made = [_mapped(one, function) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value
