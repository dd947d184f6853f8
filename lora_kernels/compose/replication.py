"""Federated LoRA with clients of unequal ranks: what a short client lacks is replicated, not zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .rounds import Server, State, Upload, shares_of, weighted_mean

PADS = ("replicate", "zero")
_RANK_DIM = {"lora_A": 0, "lora_B": 1}


def aggregate_lora(
    clients: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None, pad: str = "replicate"
) -> tuple[Tensor, Tensor]:
    """A[j] = Σ_{i: r_i > j} w_i A_i[j] / Σ_{i: r_i > j} w_i, and so the columns of B

    Replication (Koo et al., 2024, arXiv 2406.17477): a client of lower rank is filled up with the mean of
    those that own the slice. With ``pad="zero"`` the sum is over Σ_i w_i, and a slice that few own shrinks
    by their share. How the paper weighs more than two levels of rank was not to be had; here as above.

    Args:
        clients: (A ``[r_i, in]``, B ``[out, r_i]``) of each.
        weights: how much each counts; all the same by default.
        pad: one of the above.

    Returns:
        A and B of the largest rank.

    Raises:
        ValueError: no clients, factors that do not fit, weights that do not, or no such ``pad``.

    Examples:
        >>> clients = [(torch.ones(2, 8), torch.ones(4, 2)), (torch.zeros(1, 8), torch.zeros(4, 1))]
        >>> a, b = aggregate_lora(clients)
        >>> a[:, 0]
        tensor([0.5000, 1.0000])
    """
    if pad not in PADS:
        raise ValueError(f"pad: expected one of {', '.join(PADS)}, got {pad!r}")
    shares = shares_of(len(clients), weights)
    for i, (a, b) in enumerate(clients):
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"clients: expected A [r, in] and B [out, r], got {shapes} of client {i}")
    columns = _slices([b.T for _, b in clients], shares, pad)
    return _slices([a for a, _ in clients], shares, pad), columns.T.contiguous()


def truncate_lora(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A[:rank], B[:, :rank]): what goes to a client of that rank.

    Raises:
        ValueError: the rank is not 1 to that of A.

    Examples:
        >>> a, b = truncate_lora(torch.randn(4, 8), torch.randn(6, 4), rank=2)
        >>> a.shape, b.shape
        (torch.Size([2, 8]), torch.Size([6, 2]))
    """
    if not 1 <= rank <= lora_a.shape[0]:
        raise ValueError(f"rank: expected 1 to {lora_a.shape[0]}, got {rank}")
    return lora_a[:rank].clone(), lora_b[:, :rank].clone()


def _slices(factors: list[Tensor], shares: list[float], pad: str) -> Tensor:
    """The mean of each row over those that have it."""
    widths = {factor.shape[1] for factor in factors}
    if len(widths) > 1:
        raise ValueError(f"clients: expected factors of one width, got {', '.join(map(str, sorted(widths)))}")
    like = max(factors, key=len)
    wide = torch.promote_types(like.dtype, torch.float32)
    total, owned = torch.zeros_like(like, dtype=wide), torch.zeros(len(like), 1, dtype=wide)
    for factor, share in zip(factors, shares, strict=True):
        total[: len(factor)] += share * factor.detach().to(wide)
        owned[: len(factor)] += share
    if pad == "replicate":
        total /= torch.where(owned > 0, owned, 1.0).to(total.device)
    return total.to(like.dtype)


class ReplicationServer(Server):
    """Sends each client its rank of the factors, and aggregates by :func:`aggregate_lora`

    s must not depend on a client's rank: give all clients the alpha and rank of the largest, or a fixed s.

    Args:
        state: tensors at the largest rank; those with ``lora_A`` or ``lora_B`` in their names are factors,
            the others are averaged.
        ranks: of each client, by its number; one without gets the largest.
        pad: see :func:`aggregate_lora`.

    Raises:
        ValueError: no factors, a rank that is not 1 to the largest, or no such ``pad``.
    """

    def __init__(self, state: Mapping[str, Tensor], ranks: Mapping[int, int], pad: str = "replicate") -> None:
        super().__init__(state)
        sizes = [tensor.shape[dim] for name, tensor in state.items() if (dim := _rank_dim(name)) is not None]
        if not sizes:
            raise ValueError("state: expected tensors named lora_A and lora_B, got none")
        for client, rank in ranks.items():
            if not 1 <= rank <= min(sizes):
                raise ValueError(f"ranks: expected 1 to {min(sizes)}, got {rank} of client {client}")
        if pad not in PADS:
            raise ValueError(f"pad: expected one of {', '.join(PADS)}, got {pad!r}")
        self.ranks, self.pad = dict(ranks), pad

    def send(self, client: int | None = None) -> State:
        state = super().send(client)
        if client not in self.ranks:
            return state
        rank = self.ranks[client]
        dims = {name: _rank_dim(name) for name in state}
        return {
            name: tensor if (dim := dims[name]) is None else tensor.narrow(dim, 0, rank).clone()
            for name, tensor in state.items()
        }

    def update(self, uploads: Sequence[Upload]) -> None:
        shares = shares_of(len(uploads), [one.weight for one in uploads])
        self.state = {name: self._mean(name, uploads, shares) for name in self.state}

    def _mean(self, name: str, uploads: Sequence[Upload], shares: list[float]) -> Tensor:
        tensors, dim = [one.state[name] for one in uploads], _rank_dim(name)
        if dim is None:
            return weighted_mean(name, tensors, shares)
        mean = _slices([tensor.transpose(0, dim) for tensor in tensors], shares, self.pad)
        total = self.state[name].transpose(0, dim).clone()  # what nobody of this round owns stays
        total[: len(mean)] = mean
        return total.transpose(0, dim).contiguous()


def _rank_dim(name: str) -> int | None:
    return next((dim for part, dim in _RANK_DIM.items() if part in name), None)
