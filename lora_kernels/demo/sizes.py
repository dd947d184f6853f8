"""How much of the main job fits into its time: sizes chosen from what its first steps took."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Draws of the training texts, each four fifths of what there is of them.
DRAWS, SHARE = 3, 0.8
# The label sets share texts: the part of all that is distinct.
_DISTINCT = 0.55
_LABEL_SETS = 3
# What every run does beside its steps: heads, checks, checkpoints, the plot; in seconds and in texts read.
_BESIDE_SECONDS, _BESIDE_TEXTS = 8.0, 300


@dataclass(frozen=True)
class Cost:
    """Seconds a text: of a training step with LoRA, and of reading it."""

    step: float
    forward: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run. ``seeds`` is how many of the draws LoRA is trained on; frozen features take all."""

    train: int
    epochs: int
    held_out: int
    seeds: int
    label_sets: int = _LABEL_SETS

    @property
    def pool(self) -> int:
        """The training texts that the draws are taken from."""
        return round(self.train / SHARE)

    def seconds(self, cost: Cost) -> float:
        """What the run takes, as far as its texts say."""
        trained = self.seeds * (self.train * self.epochs * cost.step + self.held_out * cost.forward)
        read = _DISTINCT * (self.pool + self.held_out) * cost.forward
        return self.label_sets * (trained + read) + _BESIDE_TEXTS * cost.forward + _BESIDE_SECONDS

    @property
    def compared(self) -> bool:
        """Whether it is large enough to ask that LoRA beats frozen features."""
        return self.label_sets == _LABEL_SETS and self.train >= _SMALLEST.train


WHOLE = Sizes(train=1024, epochs=2, held_out=600, seeds=3)
_SMALLEST = Sizes(train=384, epochs=1, held_out=320, seeds=1)

QUICK = replace(_SMALLEST, train=64, held_out=32)


def _sizes() -> Iterator[Sizes]:
    """From the whole job down to the least: first seeds go, then passes and texts, then label sets."""
    yield WHOLE
    yield replace(WHOLE, epochs=1)
    for train in (896, 768):
        yield replace(WHOLE, train=train, epochs=1)
    for train in (1024, 896, 768, 640):
        yield replace(_SMALLEST, train=train, held_out=500)
    yield replace(_SMALLEST, train=512, held_out=400)
    yield _SMALLEST
    yield replace(_SMALLEST, train=192, held_out=96)
    yield QUICK
    yield replace(QUICK, label_sets=1)


def choose(cost: Cost, seconds: float) -> Sizes:
    """The largest run that takes at most ``seconds``; the least there is where none does."""
    sizes = WHOLE
    for sizes in _sizes():
        if sizes.seconds(cost) <= seconds:
            break
    return sizes


def left_out(sizes: Sizes) -> list[str]:
    """What ``sizes`` has less of than the whole job, in words."""
    names = {"train": "training texts", "epochs": "passes", "held_out": "held-out texts"}
    names |= {"seeds": "seeds of LoRA", "label_sets": "label sets"}
    less = [
        f"{name} {getattr(sizes, field)} of {getattr(WHOLE, field)}"
        for field, name in names.items()
        if getattr(sizes, field) < getattr(WHOLE, field)
    ]
    return less if sizes.compared else [*less, "too few to ask that LoRA beats frozen features"]
