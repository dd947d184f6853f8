"""InfLoRA: tasks one after the other, each in a subspace that does not disturb those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import each
from ..nn.pairs import Pair
from ..optim._common import check_keys, check_number
from ._common import check_unmerged, merge_, mergeable_pairs


class DualGPM:
    """A subspace of a layer's inputs: M itself, or what is left beside it once M would be the larger half

    DualGPM (Liang and Li, 2023). ``basis`` M ``[in, k]`` is orthonormal; while ``keeps`` the memory is
    span(M), afterwards its complement is.
    """

    def __init__(self, size: int, like: Tensor | None = None) -> None:
        self.basis = torch.zeros(size, 0) if like is None else like.new_zeros(size, 0)
        self.keeps = True

    def project(self, second: Tensor) -> Tensor:
        """H - M Mᵀ H, what of H is beside the memory (M Mᵀ H where M spans the rest)."""
        inside = self.basis @ (self.basis.T @ second)
        return second - inside if self.keeps else inside

    def update(self, second: Tensor, share: float) -> None:
        """Takes in so many directions of H ``[in, in]`` that the memory holds ``share`` of its energy.

        The energy is σ² of H, as in the paper's code, which for the first task stops a direction short.
        """
        size = len(self.basis)
        total = second.square().sum()
        u, s, _ = torch.linalg.svd(self.project(second))
        energy = s.square()
        held = (total - energy.sum()).clamp(min=0)
        reached = (held + energy.cumsum(0)) / total.clamp(min=1e-30)
        enough = share - 16 * torch.finfo(second.dtype).eps
        count = 0 if held / total.clamp(min=1e-30) >= enough else int((reached < enough).sum()) + 1
        count = min(count, size - self.basis.shape[1] if self.keeps else self.basis.shape[1])
        self._take(u[:, :count])
        if self.keeps and self.basis.shape[1] > size / 2:
            self.basis, self.keeps = _complement(self.basis), False

    def _take(self, new: Tensor) -> None:
        if self.keeps:
            self.basis = torch.linalg.qr(torch.cat([self.basis, new], 1)).Q
        elif new.shape[1]:
            u, _, _ = torch.linalg.svd(self.basis - new @ (new.T @ self.basis), full_matrices=False)
            self.basis = u[:, : self.basis.shape[1] - new.shape[1]]


def _complement(basis: Tensor) -> Tensor:
    q = torch.linalg.qr(basis, mode="complete").Q
    return q[:, basis.shape[1] :]


def inflora_design(second: Tensor, memory: DualGPM, r: int) -> Tensor:
    """A = U_rᵀ / √3 ``[r, in]`` for P = U S Vᵀ, P what of H = E[x xᵀ] is beside the memory

    Raises:
        ValueError: fewer than r directions are left.
    """
    size, taken = memory.basis.shape
    free = size - taken if memory.keeps else taken
    if r > free:
        raise ValueError(f"r: expected at most the {free} directions that the tasks before left, got {r}")
    return torch.linalg.svd(memory.project(second)).U[:, :r].T / 3**0.5


class InfLoRA:
    """y = W x + s Σ_t B_t A_t x: A_t in the inputs of task t that earlier tasks have not, frozen; B_t trains

    InfLoRA (Liang and Li, 2024, arXiv 2404.00228). For each task: :meth:`begin_task`, train, then
    :meth:`end_task`, which moves B_t A_t into W. With all energy kept the outputs on what earlier tasks read
    do not change. The head, and a loss on the task's own classes, are the caller's.

    Args:
        model: one of :func:`apply_lora` or of PEFT with plain LoRA on linears.
        tasks: how many will come.
        share: of the energy that is kept after the first task; it rises linearly to ``share_end``.
        share_end: towards the last.

    Raises:
        TypeError: of a wrong type.
        ValueError: a share is not in [0, 1], or W cannot take the adapters (see :class:`ReLoRA`).
    """

    def __init__(self, model: nn.Module, tasks: int, *, share: float = 0.95, share_end: float = 1.0) -> None:
        check_number("tasks", tasks, 1)
        for name, value in (("share", share), ("share_end", share_end)):
            check_number(name, value, 0.0, 1.0 + 1e-12)
        self.model, self.pairs = model, mergeable_pairs(model)
        for pair in self.pairs:
            if pair.is_embedding:
                raise ValueError(f"model: {pair.name}: expected a linear, got an embedding")
        self.tasks, self.share, self.share_end, self.done = tasks, share, share_end, 0
        self.memory = {pair.name: DualGPM(pair.lora_a.shape[1], pair.lora_a.detach()) for pair in self.pairs}

    @torch.no_grad()
    def begin_task(self, run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
        """A from what the task's batches give each layer, B = 0; ``run(batch)`` runs the model.

        Raises:
            ValueError: no batches, or not r directions are left; nothing is changed.
        """
        check_unmerged(self.pairs)
        seen = self._second_moments(run, batches)
        made = {p.name: inflora_design(seen[p.name], self.memory[p.name], p.rank) for p in self.pairs}
        for pair in self.pairs:
            pair.lora_a.copy_(made[pair.name])
            pair.lora_a.requires_grad_(False)
            pair.lora_b.zero_()

    @torch.no_grad()
    def end_task(self, run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
        """Remembers what the task's batches give each layer, and moves B A into W.

        Raises:
            ValueError: no batches; nothing is changed.
        """
        check_unmerged(self.pairs)
        seen = self._second_moments(run, batches)
        share = self.share + (self.share_end - self.share) * self.done / self.tasks
        for pair in self.pairs:
            self.memory[pair.name].update(seen[pair.name], share)
            merge_(pair)
            pair.lora_b.zero_()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint between two tasks needs."""
        memory = {name: {"basis": one.basis.clone(), "keeps": one.keeps} for name, one in self.memory.items()}
        return {"schedule": "inflora", "done": self.done, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there.

        Raises:
            TypeError: no mapping.
            ValueError: the state of another, or of another model; nothing is changed.
        """
        if isinstance(state, Mapping) and state.get("schedule") != "inflora":
            raise ValueError(f"state: expected one of 'inflora', got one of {state.get('schedule')!r}")
        check_keys("state", ("schedule", "done", "memory"), state)
        check_keys("state['memory']", self.memory, state["memory"])
        for name, own in self.memory.items():
            given = state["memory"][name]
            check_keys(f"state['memory'][{name!r}]", ("basis", "keeps"), given)
            if given["basis"].dim() != 2 or len(given["basis"]) != len(own.basis):
                raise ValueError(
                    f"state: expected a basis of {len(own.basis)} inputs for {name}, got another"
                )
        self.done = state["done"]
        for name, own in self.memory.items():
            own.basis, own.keeps = (
                state["memory"][name]["basis"].to(own.basis),
                state["memory"][name]["keeps"],
            )

    def _second_moments(self, run: Callable[[Any], Any], batches: Iterable[Any]) -> dict[str, Tensor]:
        """E[x xᵀ] over all rows that each layer reads."""
        sums: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        handles = [pair.layer.register_forward_pre_hook(_adder(pair, sums, rows)) for pair in self.pairs]
        try:
            for batch in each("InfLoRA", batches):
                run(batch)
        finally:
            for handle in handles:
                handle.remove()
        for pair in self.pairs:
            if not rows.get(pair.name):
                raise ValueError(f"batches: expected them to reach every layer, and {pair.name} never ran")
        return {name: total / rows[name] for name, total in sums.items()}


def _adder(pair: Pair, sums: dict[str, Tensor], rows: dict[str, int]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).to(pair.lora_a.dtype)
        sums[pair.name] = sums[pair.name] + x.T @ x if pair.name in sums else x.T @ x
        rows[pair.name] = rows.get(pair.name, 0) + len(x)

    return hook
