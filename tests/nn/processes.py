"""Runs cases in several processes on gloo; each case sees its rank and the number of processes."""

from __future__ import annotations

import multiprocessing
import os
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a process needs, seconds of imports, is imported once, by the server that they are all forked from.
# Nothing is computed there, so that it has no threads.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "lora_kernels.nn"]
)


def run(cases, processes, folder):
    """Runs every case in every process, one after the other; raises with the first failure's traceback."""
    mp.start_processes(_worker, (cases, processes, str(folder)), nprocs=processes, start_method="forkserver")
    failed = [
        f"rank {rank}:\n{text}"
        for rank in range(processes)
        if (text := (folder / f"rank{rank}.txt").read_text())
    ]
    assert not failed, "\n".join(failed)


def _worker(rank, cases, processes, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    report = ""
    for case, *arguments in cases:
        torch.manual_seed(0)
        try:
            case(rank, *arguments)
        except Exception:
            # The other processes may wait for this one in vain: the first failure ends it all.
            report = f"{case.__name__}{tuple(arguments)}\n{traceback.format_exc()}"
            break
    with open(os.path.join(folder, f"rank{rank}.txt"), "w") as file:
        file.write(report)
    if report:
        os._exit(0)
    dist.destroy_process_group()
