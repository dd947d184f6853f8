"""The sums behind each statistic, as hooks on layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_IGNORED_LABEL = -100


class Gatherer:
    """One statistic of all layers: listens while batches run, then gives its tensors."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers

    def begin(self, batch: Any) -> None:
        """Called before each batch."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block the hooks are there."""
        handles = [handle for name, layer in self.layers.items() for handle in self.hooks(name, layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hooks(self, name: str, layer: Any) -> list[Any]:
        """Registers what the layer needs."""
        raise NotImplementedError

    def finish(self, rank: int | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name of each layer and its tensors; frees the sums as it goes."""
        raise NotImplementedError


class _OfInputs(Gatherer):
    """A sum over what each layer reads; what one x gives is computed once for all layers that read it."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        self.sums: dict[str, Any] = {}
        # The x before, kept so that its memory is not another's, what tells it apart, and what it gave.
        self._last: tuple[Tensor, tuple[Any, ...], Any] | None = None

    def begin(self, batch: Any) -> None:
        self._last = None

    def hooks(self, name: str, layer: Any) -> list[Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].detach()
            if not x.numel():
                return
            key, last = (x.data_ptr(), x.shape, x.stride(), x._version), self._last
            if last is None or last[1] != key:
                last = self._last = (x, key, self.part(x))
            self.sums[name] = self.plus(self.sums.get(name), last[2])

        return [layer.register_forward_hook(hook)]

    def part(self, x: Tensor) -> Any:
        """What one x gives."""
        raise NotImplementedError

    def plus(self, total: Any, part: Any) -> Any:
        """The sum with it; the part may be another layer's too and stays as it is."""
        raise NotImplementedError

    def finish(self, rank: int | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        self._last = None
        for name in self.layers:
            if name not in self.sums:
                raise ValueError(f"batches: expected them to reach every layer, and {name} never ran")
        for name in self.layers:
            yield name, self.result(self.sums.pop(name), rank)

    def result(self, total: Any, rank: int | None) -> dict[str, Tensor]:
        """The tensors that a sum gives."""
        raise NotImplementedError


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Covariance(_OfInputs):
    """(1/n) Σ XᵀX over samples X, each over |max X|."""

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        samples = _wide(x).flatten(1, -2) if x.dim() > 3 else _wide(x)
        samples = samples[None] if samples.dim() == 2 else samples
        sizes = samples.amax((1, 2), keepdim=True).abs()
        rows = (samples / torch.where(sizes > 0, sizes, 1.0)).flatten(0, 1)
        return rows.T @ rows, len(samples)

    def plus(self, total: Any, part: Any) -> Any:
        if total is None:
            return [part[0].clone(), part[1]]
        total[0] += part[0]
        total[1] += part[1]
        return total

    def result(self, total: Any, rank: int | None) -> dict[str, Tensor]:
        return {"covariance": total[0] / total[1]}


class _OfTokens(_OfInputs):
    """A sum over the tokens that count."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        self.mask: Tensor | None = None

    def begin(self, batch: Any) -> None:
        super().begin(batch)
        self.mask = _counted(batch)

    def rows(self, x: Tensor) -> Tensor:
        """x of the tokens that count ``[tokens, in]``."""
        mask = self.mask
        counts = mask is not None and x.shape[:-1] == mask.shape
        return _wide(x[mask.to(x.device)] if counts else x.flatten(0, -2))


class Squares(_OfTokens):
    """(1/n) Σ x² of each input, over n samples."""

    def part(self, x: Tensor) -> tuple[Tensor, int]:
        return self.rows(x).square().sum(0), len(x) if x.dim() > 2 else 1

    def plus(self, total: Any, part: Any) -> Any:
        return part if total is None else (total[0] + part[0], total[1] + part[1])

    def result(self, total: Any, rank: int | None) -> dict[str, Tensor]:
        return {"squares": total[0] / total[1]}


class Spread(_OfTokens):
    """Singular vectors of the centred inputs, from means and centred products that add up exactly."""

    def part(self, x: Tensor) -> tuple[int, Tensor, Tensor]:
        rows = self.rows(x)
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        centred = rows - mean
        return len(rows), mean, centred.T @ centred

    def plus(self, total: Any, part: Any) -> Any:
        count, mean, square = part
        if total is None:
            return [count, mean, square.clone()]
        both = total[0] + count
        if both:
            gap = mean - total[1]
            total[2] += square
            total[2].addr_(gap, gap, alpha=total[0] * count / both)
            total[1] = total[1] + gap * (count / both)
        total[0] = both
        return total

    def result(self, total: Any, rank: int | None) -> dict[str, Tensor]:
        values, vectors = torch.linalg.eigh(total[2])
        sizes = values.clamp(min=0).sqrt().flip(0)[:rank]
        rows = sizes[:, None] * vectors.flip(1)[:, :rank].T
        return {"activation_svd": rows.contiguous(), "activation_energy": total[2].trace()}


def _counted(batch: Any) -> Tensor | None:
    """Which tokens of a batch count, by its attention mask and its labels."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = None if mask is None or mask.dim() != 2 else mask.bool()
    if isinstance(labels, Tensor) and labels.dim() == 2:
        trained = labels != _IGNORED_LABEL
        counted = trained if counted is None else counted & trained
    return counted


class Gradient(Gatherer):
    """The mean over batches of the gradient of W."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        for name, layer in layers.items():
            weight = layer.weight
            if not isinstance(weight, Tensor) or not weight.is_floating_point():
                raise ValueError(
                    f"collect: 'gradient' expects dense weights, got {type(weight).__name__} in {name}"
                )
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def begin(self, batch: Any) -> None:
        self.batches += 1

    def hooks(self, name: str, layer: Any) -> list[Any]:
        def take(weight: Tensor) -> None:
            gradient: Any = weight.grad
            weight.grad = None
            if name in self.sums:
                self.sums[name] += gradient
            else:
                self.sums[name] = _wide(gradient)

        layer.weight.requires_grad_(True)
        return [layer.weight.register_post_accumulate_grad_hook(take)]

    def finish(self, rank: int | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, layer in self.layers.items():
            if name not in self.sums:
                raise ValueError(f"batches: expected a loss that reaches every layer, and not {name}")
            mean = self.sums.pop(name) / self.batches
            yield name, {"gradient": mean.T if _is_transposed(layer) else mean}


def _is_transposed(layer: nn.Module) -> bool:
    """Whether its weight is [in, out]."""
    return type(layer).__name__ == "Conv1D"
