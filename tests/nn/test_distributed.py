"""Two processes on gloo: gradients and sharded parameters as if there were one."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import apply_lora, lora_layers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    apply_lora(model, LoRAConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    return model, torch.randn(4, 8), torch.randn(4, 6)


def one_step(model, x, dy):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(x) * dy).sum(-1).mean().backward()
    optimiser.step()


def expected():
    model, x, dy = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    one_step(model, x, dy)
    after = dict(model.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "adapters" in name}
    return after


def check(named, rank):
    named = dict(named)
    for name, want in expected().items():
        got = named[name].full_tensor() if hasattr(named[name], "full_tensor") else named[name]
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"rank {rank}, {name}: {text}")


def ddp(rank):
    model, x, dy = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    one_step(wrapped, x[rank * 2 : rank * 2 + 2], dy[rank * 2 : rank * 2 + 2])
    check(model.named_parameters(), rank)


def fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    model, x, dy = build()
    for layer in lora_layers(model).values():
        fully_shard(layer)
    fully_shard(model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    one_step(model, x[rank * 2 : rank * 2 + 2], dy[rank * 2 : rank * 2 + 2])
    check(model.named_parameters(), rank)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    merged_in_shards(model)


def merged_in_shards(model):
    """Merging works on what each process holds."""
    layer = model[0]
    layer.reshard()
    want = layer.weight.full_tensor() + layer.adapters["default"].delta().full_tensor()
    torch.testing.assert_close(layer.merged_weight().full_tensor(), want)


def worker(rank, port, case):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        case(rank)
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("case", [ddp, fsdp2])
def test_two_processes_equal_one(case):
    mp.spawn(worker, (free_port(), case), nprocs=2)
