"""Timers that compare implementations fairly: interleaved, with medians and paired ratios.

A machine drifts: frequency, heat, neighbours. Two medians taken minutes apart compare the drift as much
as the code, so every round times each contender once, in a fresh random order, and a ratio is the median
of the ratios within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Prepare = Callable[[], Any]
Run = Callable[[Any], Any]
Sampler = Callable[[], float]


@dataclass(frozen=True)
class Summary:
    """Median and the 20th and 80th percentiles, in the unit of the samples."""

    median: float
    p20: float
    p80: float


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of the samples lie, interpolated between neighbours."""
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(samples: Sequence[float]) -> Summary:
    """Median, p20 and p80 of ``samples``.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    return Summary(statistics.median(samples), percentile(samples, 0.2), percentile(samples, 0.8))


def paired_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """median over rounds of ``samples[i] / base[i]``: slow drift divides out.

    Raises:
        ValueError: the two have different numbers of rounds.
    """
    if len(samples) != len(base):
        raise ValueError(f"base: expected {len(samples)} rounds as in samples, got {len(base)}")
    return statistics.median(a / b for a, b in zip(samples, base, strict=True))


def interleave(
    samplers: Mapping[str, Sampler],
    repeats: int,
    *,
    order: random.Random | None = None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """``repeats`` rounds; each takes one sample of every sampler, in a new random order.

    Args:
        samplers: what each contender takes, by name.
        repeats: number of rounds.
        order: the source of the orders; seeded alike by default, so that a run can be repeated.
        after_round: called after each round, for a progress bar.
    """
    order = order or random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name in order.sample(list(samplers), len(samplers)):
            samples[name].append(samplers[name]())
        after_round()
    return samples


class Timer(Protocol):
    """Turns work into a sampler of its microseconds; ``prepare`` is not timed, its result goes to ``run``."""

    def sampler(self, prepare: Prepare, run: Run) -> Sampler: ...


class HostTimer:
    """Wall time of ``calls`` calls in a row, per call: CPU work, or the host's share of GPU work.

    Args:
        calls: calls in one sample; more where one call is near the clock's resolution.
        device: ``cuda`` waits for the device before and after a sample.
    """

    def __init__(self, calls: int = 1, device: str = "cpu") -> None:
        self.calls = calls
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)

    def sampler(self, prepare: Prepare, run: Run) -> Sampler:
        run(prepare())

        def sample() -> float:
            states = [prepare() for _ in range(self.calls)]
            self._wait()
            start = time.perf_counter_ns()
            for state in states:
                run(state)
            self._wait()
            return (time.perf_counter_ns() - start) / 1e3 / self.calls

        return sample


class CudaTimer:
    """Device time of one replay of a CUDA graph that starts with a cold L2 cache.

    The graph takes the host out of the figure. ``run`` is captured after ``prepare``, on one stream, so
    a ``run`` that is a backward pass must keep its graph (``retain_graph=True``).

    Before each sample a buffer of twice the L2 cache is read, not written: lines that the flush left dirty
    would be written back at the cost of what is timed. It takes longer than the host takes to launch the
    graph, so the device does not wait between the first event and the graph.
    """

    WARMUPS = 3
    FLUSHES = 3

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = 2 * max(getattr(properties, "L2_cache_size", 0), 32 << 20)
        self._cold = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
        self._stream = torch.cuda.Stream()

    def sampler(self, prepare: Prepare, run: Run) -> Sampler:
        graph = self._capture(prepare, run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            for _ in range(self.FLUSHES):
                self._cold.amax()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3

        return sample

    def _capture(self, prepare: Prepare, run: Run) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self.WARMUPS):
                run(prepare())
            state = prepare()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run(state)
        graph.replay()
        torch.cuda.synchronize()
        # The captured kernels read what prepare() made: it lives as long as the graph.
        graph._state = state  # type: ignore[attr-defined]
        return graph
