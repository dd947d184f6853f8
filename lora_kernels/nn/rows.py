"""Which rows of a layer's input are which sample's: said by the caller, shown by a trial run, or refused.

The first dimension of a layer's input need not be the samples: encoders have [T, B, H], some models flatten
tokens or sort them by expert, some linears read positions. A size that happens to fit proves nothing, since T
may equal B. What proves it: run the model once more, with more samples, and see what has grown.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Lead = tuple[int, ...]  # the shape of what a layer reads, without the features


class Samples(NamedTuple):
    """What the caller said about a batch.

    ``names``: one a sample; ``repeats``: how many rows next to each other may be one sample's, besides one;
    ``batch_dim``: where every layer has the samples, ``None`` for what is shown.
    """

    names: tuple[str, ...]
    repeats: frozenset[int] = frozenset((1,))
    batch_dim: int | None = None

    @classmethod
    def said(
        cls, names: Sequence[str], repeats: Collection[int] = (), batch_dim: int | None = None
    ) -> Samples:
        """Checked.

        Raises:
            TypeError: ``batch_dim`` or one of ``repeats`` is no int.
            ValueError: either is out of range.
        """
        for what, least, values in (("repeats", 1, repeats), ("batch_dim", 0, [batch_dim])):
            for value in values:
                if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                    raise TypeError(f"{what}: expected int, got {type(value).__name__}")
                if value is not None and value < least:
                    raise ValueError(f"{what}: expected at least {least}, got {value}")
        return cls(tuple(names), frozenset((1, *repeats)), batch_dim)

    @property
    def alike(self) -> bool:
        """Whether all samples use the same."""
        return len(set(self.names)) < 2

    def each(self, size: int) -> int:
        """How many of ``size`` rows are one sample's, 0 where they cannot be the samples'."""
        each = size // max(1, len(self.names))
        return each if each in self.repeats and size == each * len(self.names) else 0

    def dimension(self, lead: Lead, shown: frozenset[int] | None, at: str) -> tuple[int, int]:
        """Where the samples are in an input, and how many places there are one's.

        Args:
            lead: the input's shape without the features.
            shown: the dimensions that :func:`trial` found to be the samples; ``None``: not known.
            at: the layer's name.

        Raises:
            ValueError: they are nowhere, or nothing tells which of several dimensions they are.
        """
        first = self.each(lead[0]) if lead else 0
        if self.batch_dim is not None:
            places = [self.batch_dim]
        elif first > 1 and not shown:  # tokens of samples one after the other, as the caller said
            places = [0]
        elif shown is not None:
            places = sorted(shown)
        else:
            places = [0, 1] if first and not self.alike else [0]
        found = [(dim, self.each(lead[dim])) for dim in places if dim < len(lead) and self.each(lead[dim])]
        if len(found) == 1 or (found and self.alike):
            return found[0]
        if not found:
            raise ValueError(
                f"adapter_names: expected one for each of {lead[0] if lead else 1} samples, got"
                f" {len(self.names)} (at {at!r}; where the samples are another dimension there, or its first"
                " holds several rows of each sample side by side, say so by batch_dim= or repeats=)"
            )
        raise ValueError(
            f"adapter_names: the input {[*lead, '…']} of {at!r} has {len(self.names)} samples along dimension"
            f" {' or '.join(str(dim) for dim, _ in found)}, and nothing tells which; say so by batch_dim="
        )


def row_ids(ids: Tensor, lead: Lead, dim: int) -> Tensor:
    """What each row of an input has, ids or more, from what each place along ``dim`` has."""
    own = ids.shape[1:]
    return ids.view(-1, *[1] * (len(lead) - dim - 1), *own).expand(*lead, *own)


class Trial:
    """What the layers read in one more run, whose sample ``i`` is that of the batch at ``order[i]``.

    ``order`` counts up first and has each of its samples a second time, in another order: what is not the
    samples has not grown as they have, or does not repeat as they do.
    """

    def __init__(self, order: list[int]) -> None:
        self.order = order
        self.shown: dict[str, frozenset[int]] = {}

    def see(self, at: str, x: Tensor, lead: Lead) -> None:
        """Notes an input; a layer that once read none of the samples never has them for certain."""
        grown = frozenset(dim for dim in range(len(lead)) if self._has_samples(x, dim))
        before = self.shown.get(at)
        self.shown[at] = grown if before is None else (before and grown and before | grown)

    def _has_samples(self, x: Tensor, dim: int) -> bool:
        if x.shape[dim] != len(self.order):
            return False
        again = x.index_select(dim, torch.tensor(self.order, device=x.device))
        if not x.is_floating_point():
            return torch.equal(again, x)
        size = x.abs().float()  # loosely: another batch may be rounded otherwise
        near = (again.float() - x.float()).abs() <= 0.1 * (size + size.median())
        return not x.numel() or float(near.float().mean()) > 0.9


Watch = Callable[[Trial], contextlib.AbstractContextManager[Any]]


def trial(
    call: Callable[..., Any],
    model: nn.Module,
    inputs: tuple[Sequence[Any], dict[str, Any]],
    samples: Samples,
    watch: Watch,
) -> dict[str, frozenset[int]]:
    """Name of each layer -> the dimensions of its input that are the samples, as one more run shows.

    It is of a few samples, each given twice, without gradients and in evaluation mode; generators, buffers
    and modes are then what they were. Nothing is shown where it cannot: the inputs have no samples in front,
    or are square and not those of a Transformers model, whose samples are always first.

    Args:
        call: what is about to run.
        model: the modules that it uses.
        inputs: its positional arguments, and those by name.
        samples: what is said of them.
        watch: inside its block the layers are their base, and tell the trial what they read.
    """
    args, kwargs = inputs
    every = [*_tensors([*args, *kwargs.values()])]
    rows = _rows_of(call, every, samples)
    if rows is None:
        return {}
    once = list(range(min(rows, 3)))
    order = [*once, *reversed(once)]
    while any(len(order) in tensor.shape for tensor in every):
        order.append(0)
    seen = Trial(order)
    for least in (1, 2):  # a vector as long as there are samples may be one of positions
        seen = Trial(order)
        pick = partial(_picked, rows=rows, order=order, least=least)
        with contextlib.suppress(Exception), torch.no_grad(), _as_it_was(model), watch(seen):
            call(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()})
            break
    return seen.shown


def _rows_of(call: Any, every: list[Tensor], samples: Samples) -> int | None:
    """The samples of a call, times how often each comes; ``None`` where its inputs leave that open."""
    first = next((t for t in every if t.dim() and samples.each(t.shape[0])), None)
    if first is None:
        return None
    transformers = hasattr(call, "config") and hasattr(call, "main_input_name")
    contract = transformers or not isinstance(call, nn.Module)
    square = any(t.dim() > 1 and t.shape[0] == t.shape[1] == first.shape[0] for t in every)
    return None if square and not contract else first.shape[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, MutableMapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _picked(value: Any, rows: int, order: list[int], least: int) -> Any:
    """An argument with the samples of ``order``; what is no tensor as a copy."""
    if isinstance(value, Tensor):
        if value.dim() < least or value.shape[0] != rows:
            return value
        return value.index_select(0, torch.tensor(order, device=value.device))
    if isinstance(value, MutableMapping):
        other = copy.copy(value)
        for name, one in value.items():
            other[name] = _picked(one, rows, order, least)
        return other
    if isinstance(value, (list, tuple)):
        made = [_picked(one, rows, order, least) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return copy.deepcopy(value)


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the ``with`` block; after it modes, generators and buffers as before."""
    cards = {p.device for p in model.parameters() if p.device.type == "cuda"}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(sorted(card.index for card in cards)):
        try:
            for module, _ in modes:
                module.training = False  # not by eval(), which classes may have taken for other things
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
