"""LoRA without gradients: CMA-ES over a short vector for each layer, a population in one batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.pairs import Pair
from ..nn.rows import Samples, Trial, row_ids, trial
from ..ops.adapter_stack import stack_adapters
from ..ops.multi_lora_linear import multi_lora_linear
from ._common import check_count, check_keys, check_number, pairs_of

Losses = Callable[[Any], Tensor]


class DerivativeFree(Optimizer):
    """A = reshape(P_A z₁), B = reshape(P_B z₂), z = (z₁, z₂) of each layer found by CMA-ES

    Derivative-free optimisation of LoRA (Jin et al., 2024, arXiv 2403.01754). The P are random and stay; z
    starts at zero, and so does ΔW. One :meth:`step` goes through the layers: for each it asks for ``popsize``
    candidates, computes the losses of all of them and of the present z on the same batch, with the other
    layers at their best, and takes the best candidate where it is better. The candidates are adapters of one
    multi-adapter batch that repeats the samples, so the base is read once for all. Needs the ``cma`` package,
    and no gradient is ever computed: A and B are frozen.

    Args:
        model: one of :func:`apply_lora` or of PEFT, with linears whose adapters are still zero.
        dim: numbers in each z, at least 2.
        sigma: CMA-ES's first step.
        popsize: candidates for each layer and step.
        spread: P_A is N(0, (spread / (√dim · sigma))²), P_B uniform in ±1/√(dim/2); the paper takes the
            spread of the layer's input.
        seed: of the P and of CMA-ES.
        repeats: how many rows next to each other may belong to one sample in a layer's input, besides one.
        batch_dim: which dimension of a layer's input is the samples, if not the first.

    Raises:
        ImportError: the ``cma`` package is missing.
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a layer is no linear, its adapter is not plain or has started to learn; or a number is out
            of range.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int = 500,
        *,
        sigma: float = 1.0,
        popsize: int = 20,
        spread: float = 1.0,
        seed: int = 0,
        repeats: Collection[int] = (),
        batch_dim: int | None = None,
    ) -> None:
        Samples.said((), repeats, batch_dim)
        for name, value in (("dim", dim), ("popsize", popsize)):
            check_count(name, value)
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        check_number("sigma", sigma, above=True)
        check_number("spread", spread, above=True)
        pairs = pairs_of(model)
        for pair in pairs:
            _check(pair)
        searches = [
            _Search(pair, dim, sigma, popsize, spread, seed + 1000003 * i) for i, pair in enumerate(pairs)
        ]
        super().__init__([factor for pair in pairs for factor in (pair.lora_a, pair.lora_b)], {"lr": 0.0})
        self._searches, self._said, self._model = searches, (repeats, batch_dim), model
        self._shown: dict[str, frozenset[int]] | None = None
        for search in searches:
            search.write()

    @torch.no_grad()
    def step(self, losses: Losses, batch: Any) -> float:  # type: ignore[override]
        """One generation for each layer; returns the mean loss that the model then has on the batch.

        The first step runs ``losses`` once more, on up to three samples, each given twice, to see which
        dimension of each layer's input is the samples.

        Args:
            losses: runs the model on a batch and gives one loss a sample, ``[samples]``.
            batch: a tensor, or a mapping or sequence of tensors, samples first.

        Raises:
            ValueError: the losses are not one a sample, or nothing tells which rows of a layer's input are
                which candidate's.
        """
        best, samples = math.inf, _samples_of(batch)
        if self._shown is None and self._said[1] is None:
            names = [str(i) for i in range(samples)]
            self._shown = trial(losses, self._model, ([batch], {}), Samples.said(names), self._watched)
        for search in self._searches:
            candidates = search.ask()
            every = [search.z, *candidates]
            repeated = _repeat(batch, len(every))
            with search.population(every, self._rows(samples, len(every))):
                found = losses(repeated)
            if found.dim() != 1 or found.numel() % len(every):
                want = f"[{len(every)} · samples] losses, one a sample"
                raise ValueError(f"losses: expected {want}, got shape {tuple(found.shape)}")
            means = found.float().view(len(every), -1).mean(1).tolist()
            search.tell(means)
            best = min(means)
        return best

    def _rows(self, samples: int, candidates: int) -> Callable[[str, tuple[int, ...]], Tensor]:
        """Of a layer and what rows it reads: which candidate each is of."""
        names = [str(i) for i in range(candidates) for _ in range(samples)]
        said, numbers = Samples.said(names, *self._said), torch.arange(candidates).repeat_interleave(samples)

        def rows(at: str, lead: tuple[int, ...]) -> Tensor:
            dim, each = said.dimension(lead, (self._shown or {}).get(at), at)
            return row_ids(numbers.repeat_interleave(each), lead, dim)

        return rows

    @contextlib.contextmanager
    def _watched(self, seen: Trial) -> Iterator[None]:
        """Inside the block the layers are their base, and tell ``seen`` what they read."""
        with contextlib.ExitStack() as scope:
            for pair in (search.pair for search in self._searches):
                scope.enter_context(_forwarded(pair, partial(_seen, pair, seen)))
            yield

    def fit(self, losses: Losses, batch: Any, budget: int = 8000) -> float:
        """Steps until ``budget`` candidates have been tried; returns the last step's loss."""
        check_count("budget", budget)
        steps = max(1, budget // sum(search.popsize for search in self._searches))
        return [self.step(losses, batch) for _ in range(steps)][-1]

    def state_dict(self) -> dict[str, Any]:
        """What every generation gave: from that :meth:`load_state_dict` repeats the search, bit for bit."""
        histories = [torch.tensor(search.history, dtype=torch.float64) for search in self._searches]
        return {**super().state_dict(), "histories": histories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the search back to where it was, and A and B with it.

        Raises:
            TypeError: no mapping.
            ValueError: another's state, or of another number of layers or of candidates; nothing is changed.
        """
        check_keys("state_dict", ("state", "param_groups", "histories"), state_dict)
        histories = state_dict["histories"]
        want = [search.popsize + 1 for search in self._searches]
        got = [h.shape[-1] if h.numel() else n for h, n in zip(histories, want, strict=False)]
        if len(histories) != len(want) or got != want:
            raise ValueError(f"state_dict: expected losses of {want} candidates by layer, got {got}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "histories"})
        for search, history in zip(self._searches, histories, strict=True):
            search.restart()
            for losses in history.tolist():
                search.ask()
                search.tell(losses)


class _Search:
    """One layer's z, what it makes of A and B, and the CMA-ES that moves it."""

    def __init__(self, pair: Pair, dim: int, sigma: float, popsize: int, spread: float, seed: int) -> None:
        self.pair, self.dim, self.sigma, self.popsize, self.seed = pair, dim, sigma, popsize, seed
        half = dim // 2
        generator = torch.Generator().manual_seed(seed)
        to_a = torch.randn(pair.lora_a.numel(), half, generator=generator)
        to_b = torch.rand(pair.lora_b.numel(), dim - half, generator=generator)
        self.to_a = (to_a * (spread / (math.sqrt(dim) * sigma))).to(pair.lora_a)
        self.to_b = ((2 * to_b - 1) / math.sqrt(dim - half)).to(pair.lora_b)
        self.restart()

    def restart(self) -> None:
        """As before the first generation, A and B aside."""
        try:
            import cma
            import numpy
        except ImportError as error:
            raise ImportError(
                "DerivativeFree needs the cma package: pip install 'lora-kernels[cma]'"
            ) from error
        self.z = torch.zeros(self.dim, dtype=torch.float64)
        self.history: list[list[float]] = []
        options: dict[str, Any] = {"popsize": self.popsize, "verbose": -9, "seed": math.nan}
        options["randn"] = numpy.random.RandomState(self.seed % 2**32).randn  # and not the global one
        self.strategy = cma.CMAEvolutionStrategy(self.z.numpy(), self.sigma, options)

    def ask(self) -> list[Tensor]:
        """The candidates of the next generation."""
        self.asked = self.strategy.ask()
        return [torch.from_numpy(candidate) for candidate in self.asked]

    def tell(self, losses: list[float]) -> None:
        """Their losses, that of the present z first; the best of all is the next."""
        self.strategy.tell(self.asked, losses[1:])
        self.history.append(losses)
        best = min(range(len(losses)), key=losses.__getitem__)
        if best:
            self.z = torch.from_numpy(self.asked[best - 1].copy())
        self.write()

    def factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of z."""
        half = self.dim // 2
        lora_a = (self.to_a @ z[:half].to(self.to_a)).view_as(self.pair.lora_a)
        lora_b = (self.to_b @ z[half:].to(self.to_b)).view_as(self.pair.lora_b)
        return lora_a, lora_b

    @torch.no_grad()
    def write(self) -> None:
        """A and B of the present z, which never train by gradient."""
        for parameter, value in zip((self.pair.lora_a, self.pair.lora_b), self.factors(self.z), strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.copy_(value)

    @contextlib.contextmanager
    def population(
        self, every: list[Tensor], rows: Callable[[str, tuple[int, ...]], Tensor]
    ) -> Iterator[None]:
        """Inside the block the layer takes a batch that repeats its samples, once for each z."""
        lora_as, lora_bs = zip(*map(self.factors, every), strict=True)
        stack = stack_adapters(lora_as, lora_bs, [self.pair.scaling] * len(every))
        with _forwarded(self.pair, partial(_forward, self.pair, stack, rows)):
            yield


@contextlib.contextmanager
def _forwarded(pair: Pair, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    state = pair.layer.__dict__
    state["forward"] = forward
    try:
        yield
    finally:
        del state["forward"]


def _base(pair: Pair, x: Tensor) -> Tensor:
    layer: Any = pair.layer
    base: Any = pair.base
    return layer._base(x, layer._own_weight) if base is layer else base(x)


def _seen(pair: Pair, seen: Trial, x: Tensor) -> Tensor:
    seen.see(pair.name, x, tuple(x.shape[:-1]))
    return _base(pair, x)


def _forward(pair: Pair, stack: Any, rows: Callable[[str, tuple[int, ...]], Tensor], x: Tensor) -> Tensor:
    ids = rows(pair.name, tuple(x.shape[:-1])).to(x.device)
    if pair.weight is not None:
        return multi_lora_linear(x, pair.weight, stack, ids, bias=getattr(pair.base, "bias", None))
    return _base(pair, x) + multi_lora_linear(x, None, stack, ids)


def _samples_of(batch: Any) -> int:
    """How many samples a batch has, by its first tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    batch = list(batch.values()) if isinstance(batch, Mapping) else batch
    parts = batch if isinstance(batch, (list, tuple)) else ()
    return next((found for found in map(_samples_of, parts) if found), 0)


def _repeat(batch: Any, times: int) -> Any:
    """The batch so many times, one after the other."""
    if isinstance(batch, Tensor):
        return batch.repeat(times, *[1] * (batch.dim() - 1))
    if isinstance(batch, Mapping):
        return {key: _repeat(value, times) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_repeat(value, times) for value in batch)
    return batch


def _check(pair: Pair) -> None:
    base: Any = pair.base
    if pair.lora_a.ndim != 2 or pair.is_embedding or (pair.weight is not None and base.weight.ndim != 2):
        raise ValueError(f"model: {pair.name}: expected a linear, got {base}")
    if not pair.plain:
        raise ValueError(f"model: {pair.name}: expected an adapter that is s · B A and no more, got another")
    if pair.lora_a.count_nonzero() and pair.lora_b.count_nonzero():
        raise ValueError(f"model: {pair.name}: expected an adapter that is still zero, got one that is not")
    if "forward" in vars(pair.layer):
        raise ValueError(f"model: {pair.name}: expected a layer with its own forward, got one replaced")
