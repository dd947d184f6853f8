"""InfLoRA: tasks one after the other, each in a subspace that does not disturb those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._messages import each
from ..nn.pairs import Pair
from ..optim._common import check_keys, check_number
from ..optim._vectors import leading_eigenvectors, leading_vectors, squared_singular
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

    def key(self) -> tuple[object, ...]:
        """The same for two memories that are one."""
        return self.basis.data_ptr(), self.basis.shape, self.keeps

    def update(self, second: Tensor, share: float) -> None:
        """Takes in so many directions of H ``[in, in]`` that the memory holds ``share`` of its energy.

        The energy is σ² of H, as in the paper's code, which for the first task stops a direction short.
        """
        size = len(self.basis)
        total = second.square().sum()
        energy, u = squared_singular(self.project(second).T)
        energy, u = energy.to(second.dtype), u.to(second.dtype)
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
    if memory.keeps and not taken:  # P = H, whose left vectors are its eigenvectors
        return leading_eigenvectors(second, r).T / 3**0.5
    return leading_vectors(memory.project(second), r, right=False).T / 3**0.5


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
        made: dict[object, Tensor] = {}
        for key, pair in self._keyed(seen):
            if (key, pair.rank) not in made:
                made[key, pair.rank] = inflora_design(seen[pair.name], self.memory[pair.name], pair.rank)
        for key, pair in self._keyed(seen):
            pair.lora_a.copy_(made[key, pair.rank])
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
        made: dict[object, DualGPM] = {}
        for key, pair in list(self._keyed(seen)):
            memory = self.memory[pair.name]
            if key not in made:
                memory.update(seen[pair.name], share)
                made[key] = memory
            memory.basis, memory.keeps = made[key].basis, made[key].keeps
            merge_(pair)
            pair.lora_b.zero_()
        self.done += 1

    def _keyed(self, seen: Mapping[str, Tensor]) -> Iterator[tuple[object, Pair]]:
        """Each pair, and what layers have in common that read the same and remember the same."""
        for pair in self.pairs:
            yield (id(seen[pair.name]), self.memory[pair.name].key()), pair

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
        """E[x xᵀ] over all rows that each layer reads; one tensor for layers that read the same."""
        moments = _Moments()
        handles = [pair.layer.register_forward_pre_hook(moments.adder(pair)) for pair in self.pairs]
        try:
            for batch in each("InfLoRA", batches):
                run(batch)
        finally:
            for handle in handles:
                handle.remove()
        for pair in self.pairs:
            if not moments.rows.get(pair.name):
                raise ValueError(f"batches: expected them to reach every layer, and {pair.name} never ran")
        return moments.means()


class _Moments:
    """Σ x xᵀ of each layer, once for those that read one tensor in turn, as query, key and value do"""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        # What was read last, its x xᵀ, and by the id of a former sum that sum and the one with x xᵀ.
        self.read: tuple[Tensor, int | None, torch.dtype] | None = None
        self.product = torch.empty(0)
        self.made: dict[int, tuple[Tensor | None, Tensor]] = {}

    def adder(self, pair: Pair) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(pair.name, args[0], pair.lora_a.dtype)

        return hook

    def add(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        # An inference tensor does not tell whether it was written to.
        last, version = self.read, None if x.is_inference() else x._version
        if last is None or version is None or last[0] is not x or last[1:] != (version, dtype):
            wide = x.detach().flatten(0, -2).to(dtype)
            self.read, self.product, self.made = (x, version, dtype), wide.T @ wide, {}
        former = self.sums.get(name)
        if id(former) not in self.made:
            self.made[id(former)] = former, self.product if former is None else former + self.product
        self.sums[name] = self.made[id(former)][1]
        self.rows[name] = self.rows.get(name, 0) + x.shape[:-1].numel()

    def means(self) -> dict[str, Tensor]:
        """The sums over the rows; what is one sum of as many rows stays one."""
        made: dict[tuple[int, int], Tensor] = {}
        for name, total in self.sums.items():
            key = id(total), self.rows[name]
            if key not in made:
                made[key] = total / self.rows[name]
        return {name: made[id(total), self.rows[name]] for name, total in self.sums.items()}
