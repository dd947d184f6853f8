"""Flora: momentum and accumulated gradients as random sketches, drawn from seeds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .. import _extension
from ._common import check_count, check_keys, check_number, evaluate


def sketch(rank: int, size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """P ``[rank, size]`` of N(0, 1/rank), the same for a seed (on one kind of device); E[PᵀP] = I."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rank, size, generator=generator, device=device, dtype=dtype) / math.sqrt(rank)


def compress(gradient: Tensor, projection: Tensor) -> Tensor:
    """G Pᵀ for P over G's columns, P G for P over its rows."""
    return gradient @ projection.T if _over_columns(gradient.shape) else projection @ gradient


def decompress(compressed: Tensor, projection: Tensor, shape: torch.Size) -> Tensor:
    """C P or Pᵀ C: G again, in expectation over P."""
    return compressed @ projection if _over_columns(shape) else projection.T @ compressed


def compressed_weight_grad(x: Tensor, dy: Tensor, projection: Tensor) -> Tensor:
    """(dyᵀ x) Pᵀ = dyᵀ (x Pᵀ) for in ≤ out, else P (dyᵀ x) = (dy Pᵀ)ᵀ x

    What :func:`compress` makes of the gradient of W, which is not formed: the products are those of a LoRA
    layer's backward pass, dB for A = P or dA for B = Pᵀ. x is ``[..., in]``, dy ``[..., out]``, and P
    ``[r, in]`` or ``[r, out]``.

    Raises:
        ValueError: P has another width.

    Examples:
        >>> compressed_weight_grad(torch.randn(5, 8), torch.randn(5, 16), torch.randn(2, 8)).shape
        torch.Size([16, 2])
    """
    x, dy = x.flatten(0, -2), dy.flatten(0, -2)
    right = _over_columns(torch.Size((dy.shape[1], x.shape[1])))
    width = x.shape[1] if right else dy.shape[1]
    if projection.ndim != 2 or projection.shape[1] != width:
        raise ValueError(f"projection: expected [r, {width}], got {tuple(projection.shape)}")
    return dy.T @ (x @ projection.T) if right else (dy @ projection.T).T @ x


def _over_columns(shape: torch.Size) -> bool:
    return shape[0] >= shape[1]


def _side(shape: torch.Size) -> int:
    return min(shape)


class Flora(Optimizer):
    """U = G / √V̂, W ← W - η max(ε₂, RMS(W)) · ((1-β) U + β P̂(M)), M ← β M + (1-β) P(U)

    Flora (Hao et al., 2024, arXiv 2402.03293): Adafactor (V̂ from row and column means, β₂ = 1 - t^-0.8, U
    clipped to an RMS of 1) whose momentum M is kept as P(U) = U Pᵀ ``[out, r]`` or P U ``[r, in]``, on the
    shorter side, with P drawn anew from a seed at each use. Every ``kappa`` steps M passes from one P to the
    next. A tensor that is no matrix, has a side below ``rank`` or sides further apart than 4 to 1 keeps its
    momentum whole. State of a matrix: out + in numbers, and r · max(out, in) for momentum.

    Args:
        params: tensors, or groups of them.
        lr: η.
        rank: rows of P.
        kappa: steps between two P.
        beta1: β, or ``None`` for no momentum.
        eps: ε₁ of the squared gradient and ε₂, the least scale of a step.
        clip: largest RMS of U.
        weight_decay: λ: W ← (1 - ηλ) W before the step.
        seed: of all P.

    Raises:
        TypeError: a number is none.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        rank: int = 16,
        *,
        kappa: int = 1000,
        beta1: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_number("lr", lr)
        check_count("rank", rank)
        check_count("kappa", kappa)
        if beta1 is not None:
            check_number("beta1", beta1, 0.0, 1.0)
        check_number("clip", clip, above=True)
        check_number("weight_decay", weight_decay)
        options: dict[str, Any] = {"lr": lr, "rank": rank, "kappa": kappa, "beta1": beta1, "eps": eps}
        options.update(clip=clip, weight_decay=weight_decay, seed=seed)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what ``closure`` gives."""
        loss = evaluate(closure)
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group, place)
                place += 1
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state: dict[str, Any] = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        if _fits_native(parameter, group):
            return _move_natively(parameter, state, group, place)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        gradient: Any = parameter.grad
        update = _normalised(gradient.to(wide), state, group)
        if group["beta1"] is not None:
            update = _with_momentum(update, state, group, place)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rms = _mean_square(parameter.to(wide)).sqrt_().clamp_(min=group["eps"][1])
        if parameter.dtype == wide:
            parameter.addcmul_(update, rms, value=-group["lr"])
        else:
            parameter.sub_(update * rms * group["lr"])


def _normalised(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """G / √V̂, shortened to the largest RMS; a tensor of its own."""
    beta2, least = 1 - state["step"] ** -0.8, group["eps"][0]
    if gradient.dim() < 2:
        square = gradient.square().add_(least)
        average = state.setdefault("exp_avg_sq", torch.zeros_like(square))
        update = gradient * average.lerp_(square, 1 - beta2).rsqrt()
        return update.mul_(_shortening(_mean_square(update), group))
    squares = gradient.square()
    rows, columns = squares.mean(-1).add_(least), squares.mean(-2).add_(least)
    rows = state.setdefault("exp_avg_sq_row", torch.zeros_like(rows)).lerp_(rows, 1 - beta2)
    columns = state.setdefault("exp_avg_sq_col", torch.zeros_like(columns)).lerp_(columns, 1 - beta2)
    by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt_()
    update = torch.mul(gradient, columns.rsqrt()[..., None, :], out=squares)
    # Of what the rows' factor will make of it: both factors then go over it at once.
    size = (_mean_square(update, -1) * by_row.square()).mean()
    return update.mul_((by_row * _shortening(size, group))[..., None])


def _mean_square(tensor: Tensor, *dim: int) -> Tensor:
    """The mean of the squares, without a tensor of them."""
    count = tensor.shape[dim[0]] if dim else tensor.numel()
    return torch.linalg.vector_norm(tensor, dim=dim or None).square_().div_(count)


def _shortening(mean_square: Tensor, group: dict[str, Any]) -> Tensor:
    """What an update of that mean square is multiplied by."""
    return (mean_square.sqrt() / group["clip"]).clamp_(min=1.0).reciprocal_()


def _with_momentum(update: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> Tensor:
    """(1-β) U + β M, in the place of U where M is a sketch; M, as it is kept, then takes its part of U."""
    beta, shape = group["beta1"], update.shape
    if not _sketched(shape, group["rank"]):
        average = state.setdefault("exp_avg", torch.zeros_like(update))
        return average.lerp_(update, 1 - beta)
    average, now = _momentum(update, state, group, place)
    own = compress(update, now)
    sides = (average, now) if _over_columns(shape) else (now.T, average)
    result = update.addmm_(*sides, beta=1 - beta, alpha=beta)
    average.lerp_(own, 1 - beta)
    return result


def _momentum(
    like: Tensor, state: dict[str, Any], group: dict[str, Any], place: int
) -> tuple[Tensor, Tensor]:
    """M in the P of this cycle, and that P."""
    cycle = (state["step"] - 1) // group["kappa"]
    now = _projection(like, group, place, cycle)
    if "exp_avg" not in state:
        rows, columns = like.shape
        state["exp_avg"] = like.new_zeros(
            (rows, group["rank"]) if _over_columns(like.shape) else (group["rank"], columns)
        )
    elif cycle != (state["step"] - 2) // group["kappa"]:
        former = decompress(state["exp_avg"], _projection(like, group, place, cycle - 1), like.shape)
        state["exp_avg"] = compress(former, now)
    return state["exp_avg"], now


@functools.cache
def _has_native() -> bool:
    """Whether the compiled extension is here, and of this version."""
    op = "lora_kernels::cpp_flora_step"
    return _extension.load() is None and torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def _fits_native(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether the step is one for the C++ form: of a plain float32 matrix on the CPU, momentum a sketch."""
    plain = all(
        one is not None
        and type(one) in (Tensor, torch.nn.Parameter)
        and one.dtype == torch.float32
        and one.device.type == "cpu"
        and one.layout == torch.strided
        and one.is_contiguous()
        for one in (parameter, parameter.grad)
    )
    whole = group["beta1"] is not None and not _sketched(parameter.shape, group["rank"])
    return plain and parameter.dim() == 2 and parameter.numel() > 0 and not whole and _has_native()


def _move_natively(parameter: Tensor, state: dict[str, Any], group: dict[str, Any], place: int) -> None:
    """The step in nine passes over G and W where tensors of its parts take sixteen."""
    average, now = None, None
    if group["beta1"] is not None:
        average, now = _momentum(parameter, state, group, place)
    for name, count in zip(("exp_avg_sq_row", "exp_avg_sq_col"), parameter.shape, strict=True):
        if name not in state:
            state[name] = parameter.new_zeros(count)
    squares = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    numbers = (
        float(group["lr"]),
        float(group["beta1"] or 0.0),
        1 - state["step"] ** -0.8,
        list(group["eps"]),
    )
    torch.ops.lora_kernels.cpp_flora_step(
        parameter, parameter.grad, *squares, average, now, *numbers, group["clip"], group["weight_decay"]
    )


def _sketched(shape: torch.Size, rank: int) -> bool:
    return len(shape) == 2 and _side(shape) >= rank and max(shape) <= 4 * _side(shape)


def _projection(like: Tensor, group: dict[str, Any], place: int, cycle: int) -> Tensor:
    seed = _seed(group["seed"], place, cycle)
    return sketch(group["rank"], _side(like.shape), seed, like.device, like.dtype)


def _seed(*numbers: int) -> int:
    """One seed from several numbers, the same in every process."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


class FloraAccumulator:
    """C ← C + P(G) after each backward pass; at the step G ← P̂(C)

    Flora's accumulation of gradients (arXiv 2402.03293). As soon as a matrix has its gradient, it goes into
    C ``[out, r]`` or ``[r, in]`` and is dropped, so that one gradient at a time is in memory.

        accumulator = FloraAccumulator(model.parameters(), rank=16)
        for batch in batches:
            loss(batch).backward()
        accumulator.restore()
        optimizer.step()

    Args:
        params: tensors. Those that do not train, are no matrices or have a side below ``rank`` stay as
            they are.
        rank: rows of P.
        seed: of all P.

    Raises:
        ValueError: ``rank`` is out of range.
    """

    def __init__(self, params: Iterable[Tensor], rank: int = 16, *, seed: int = 0) -> None:
        check_count("rank", rank)
        self.rank, self.seed, self.cycle = rank, seed, 0
        every = list(params)
        chosen = [p for p in every if p.requires_grad and p.dim() == 2 and _side(p.shape) >= rank]
        self.params = chosen
        self.sums: list[Tensor | None] = [None] * len(chosen)
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._taker(place))
            for place, parameter in enumerate(chosen)
        ]

    def _taker(self, place: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def take(parameter: Tensor) -> None:
            gradient: Any = parameter.grad
            compressed = compress(gradient, self._projection(place, gradient.dtype))
            before = self.sums[place]
            self.sums[place] = compressed if before is None else before.add_(compressed)
            parameter.grad = None

        return take

    def _projection(self, place: int, dtype: torch.dtype) -> Tensor:
        parameter = self.params[place]
        seed = _seed(self.seed, place, self.cycle)
        return sketch(self.rank, _side(parameter.shape), seed, parameter.device, dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the sums into ``.grad`` and starts anew, with other P."""
        for place, (parameter, total) in enumerate(zip(self.params, self.sums, strict=True)):
            if total is not None:
                parameter.grad = decompress(total, self._projection(place, total.dtype), parameter.shape)
        self.sums = [None] * len(self.params)
        self.cycle += 1

    def state_dict(self) -> dict[str, Any]:
        """The sums and the cycle."""
        return {"cycle": self.cycle, "sums": list(self.sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back.

        Raises:
            TypeError: no mapping.
            ValueError: another's state, or of tensors of another number or other shapes; nothing is changed.
        """
        check_keys("state_dict", ("cycle", "sums"), state_dict)
        if len(state_dict["sums"]) != len(self.params):
            raise ValueError(f"state_dict: expected {len(self.params)} sums, got {len(state_dict['sums'])}")
        for parameter, total in zip(self.params, state_dict["sums"], strict=True):
            rows, columns = parameter.shape
            want = (rows, self.rank) if _over_columns(parameter.shape) else (self.rank, columns)
            if total is not None and total.shape != want:
                raise ValueError(f"state_dict: expected a sum of shape {want}, got {tuple(total.shape)}")
        self.cycle, self.sums = state_dict["cycle"], list(state_dict["sums"])

    def remove(self) -> None:
        """Leaves the gradients alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
