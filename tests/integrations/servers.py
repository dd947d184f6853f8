"""Stacks, metadata and plain-loop oracles in the layouts of vLLM and SGLang."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# A folder with `lift_vllm` and `lift_sglang`, each importable as the real package's kernels: where it is
# given, the cases run against those too.
PEERS = os.environ.get("LORA_KERNELS_PEERS")
_POOL = {}


def peers_missing() -> str | None:
    """Why the servers' own kernels cannot be run beside ours, or None; makes them importable."""
    if PEERS is None:
        return "LORA_KERNELS_PEERS does not name a folder with vLLM's and SGLang's kernels"
    for name in ("lift_vllm", "lift_sglang"):
        folder = str(Path(PEERS) / name)
        if folder not in sys.path:
            sys.path.append(folder)
    return None


def cut(dtype, *shape, place=0, scale=1.0):
    """Random numbers cut out of a pool: a stack of a hundred adapters costs no time to draw."""
    size = int(torch.tensor(shape).prod())
    key = dtype, scale
    if key not in _POOL or _POOL[key].numel() < size + 4096:
        generator = torch.Generator().manual_seed(1)
        _POOL[key] = (torch.randn(max(size + 4096, 1 << 22), generator=generator) * scale).to(dtype)
    return _POOL[key][place * 64 : place * 64 + size].view(shape)


@dataclass
class VllmBatch:
    """One call's tensors in vLLM's layout."""

    x: torch.Tensor
    lora_a: list
    lora_b: list
    mapping: torch.Tensor
    meta: tuple
    y: torch.Tensor


def vllm_meta(mapping, max_loras):
    """The seven metadata arguments of a batch, as vLLM 0.33.0 lays them out."""
    tokens = len(mapping)
    ids, counts = mapping.unique(return_counts=True)
    active = torch.full((max_loras + 1,), -1, dtype=torch.int32)
    per_lora, starts = torch.zeros(max_loras + 1).int(), torch.zeros(max_loras + 2).int()
    active[: len(ids)], per_lora[: len(ids)], starts[1 : len(ids) + 1] = ids, counts.int(), counts.cumsum(0)
    none = torch.tensor([bool((mapping == -1).all())])
    order = mapping.sort(stable=True).indices.int()
    assert len(order) == tokens
    return mapping.int(), order, per_lora, starts, active, none, torch.tensor([len(ids)])


def vllm_batch(batches, num_loras, rank, hidden, slices, dtype, seq_length, widths=None):
    """``batches`` requests of up to ``seq_length`` tokens, some with no adapter."""
    generator = torch.Generator().manual_seed(batches + 7 * rank + hidden)
    lengths = torch.randint(1, seq_length + 1, (batches,), generator=generator)
    prompt = torch.randint(-1, num_loras, (batches,), generator=generator)
    prompt[0] = num_loras - 1
    mapping = prompt.repeat_interleave(lengths)
    widths = widths or [hidden] * slices
    tokens = len(mapping)
    return VllmBatch(
        cut(dtype, tokens, hidden, place=3),
        [cut(dtype, num_loras, 1, rank, hidden, place=s, scale=hidden**-0.5) for s in range(slices)],
        [cut(dtype, num_loras, 1, n, rank, place=9 + s, scale=rank**-0.5) for s, n in enumerate(widths)],
        mapping,
        vllm_meta(mapping, num_loras),
        cut(dtype, tokens, sum(widths), place=5).clone(),
    )


def vllm_loop(batch, scaling, dtype, offset=0, h=None):
    """(h, y) token by token in ``dtype``; from a given h where there is one."""
    tokens, slices = len(batch.mapping), len(batch.lora_a)
    rank = batch.lora_a[0].shape[2]
    given = h is not None
    h = h.to(dtype) if given else torch.zeros(slices, tokens, rank, dtype=dtype)
    y = batch.y.to(dtype).clone()
    for t, i in enumerate(batch.mapping.tolist()):
        if i < 0:
            continue
        column = offset
        for s in range(slices):
            if not given:
                h[s, t] = scaling * (batch.lora_a[s][i, 0].to(dtype) @ batch.x[t].to(dtype))
            width = batch.lora_b[s].shape[2]
            y[t, column : column + width] += batch.lora_b[s][i, 0].to(dtype) @ h[s, t]
            column += width
    return h, y


@dataclass
class SglangInfo:
    """The fields of SGLang 0.5.23's LoRABatchInfo that say which token uses which adapter."""

    num_segments: int
    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    seg_lens: torch.Tensor | None
    permutation: torch.Tensor | None
    bs: int = 0
    use_cuda_graph: bool = False
    max_len: int | None = None


def sglang_info(adapters, lora_ranks, scalings, *, chunk=None, spare=0):
    """Chunks of sorted tokens (``chunk``: at most so many), or requests of one token in order."""
    if chunk is None:
        order, weights, lens = None, adapters.int(), torch.ones(len(adapters)).int()
    else:
        order = adapters.sort(stable=True).indices.int()
        weights, lens = [], []
        for i in adapters.unique().tolist():
            count = int((adapters == i).sum())
            cuts = [min(chunk, count - first) for first in range(0, count, chunk)]
            weights, lens = weights + [i] * len(cuts), lens + cuts
        weights, lens = torch.tensor(weights).int(), torch.tensor(lens).int()
    starts = torch.cat([torch.zeros(1).int(), lens.cumsum(0).int()])
    pad = torch.full((spare,), 10**6, dtype=torch.int32)  # a graph's buffers are longer than the batch
    return SglangInfo(
        len(lens),
        torch.cat([starts, pad]),
        torch.cat([weights, pad]),
        lora_ranks,
        scalings,
        torch.cat([lens, pad]),
        order,
        len(lens),
        max_len=int(lens.max()),
    )


def sglang_loop(x, lora_a, lora_b, adapters, lora_ranks, scalings, sizes, y, dtype):
    """y token by token in ``dtype``."""
    y = y.to(dtype).clone()
    for t, i in enumerate(adapters.tolist()):
        rank, column = int(lora_ranks[i]), 0
        for s, width in enumerate(sizes):
            a = lora_a[i, s * rank : (s + 1) * rank].to(dtype)
            b = lora_b[i, column : column + width, :rank].to(dtype)
            y[t, column : column + width] += float(scalings[i]) * (b @ (a @ x[t].to(dtype)))
            column += width
    return y
