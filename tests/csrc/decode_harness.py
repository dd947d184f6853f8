"""The decode kernels' loops, compiled by the host's compiler and called on torch's CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

from lora_kernels import AdapterStack, plan_batch

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
COMPILER = os.environ.get("CXX", "g++").split()[0]
missing = None if shutil.which(COMPILER) else f"no C++ compiler ({COMPILER}) was found"
MAX_PROJECTIONS = 4
SIMULATION = "decode_simulation.so"
pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class Projection(ctypes.Structure):
    _fields_ = (
        *((name, pointer) for name in ("a", "b")),
        *((name, i64) for name in ("a_stride", "b_stride")),
        *((name, pointer) for name in ("pages", "spans", "scalings")),
        *((name, i32) for name in ("out_begin", "out_cols")),
    )


class DecodeProblem(ctypes.Structure):
    _fields_ = (
        ("x", pointer),
        ("x_stride", i64),
        *((name, i32) for name in ("rows", "cols")),
        *((name, pointer) for name in ("coef", "order", "offsets", "tiles")),
        *((name, i32) for name in ("adapters", "tile_count", "max_rank")),
        *((name, pointer) for name in ("weight", "bias")),
        ("weight_stride", i64),
        ("cluster_cols", i32),
        ("y", pointer),
        ("y_stride", i64),
        ("accumulate", ctypes.c_bool),
        ("projection", Projection * MAX_PROJECTIONS),
        ("projections", i32),
        ("parts", pointer),
    )


def compile_simulation(folder: Path, *flags: str) -> None:
    """The simulation as a library in ``folder``."""
    command = [COMPILER, *FLAGS, *flags, "-fPIC", "-shared", str(HERE / "decode_simulation.cpp")]
    done = subprocess.run([*command, "-o", str(folder / SIMULATION)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load_simulation(folder: Path) -> ctypes.CDLL:
    """The library in ``folder``."""
    loaded = ctypes.CDLL(str(folder / SIMULATION))
    loaded.part_elements_of.restype = i64
    return loaded


def scattered(lora_as, lora_bs, scalings, spare=3):
    """An :class:`AdapterStack` whose pages lie anywhere, with pages of nobody, all NaN, between them."""
    ranks = [len(a) for a in lora_as]
    total = sum(ranks)
    place = torch.randperm(total + spare)[:total]
    cols, out = lora_as[0].shape[1], lora_bs[0].shape[0]
    a_pages = torch.full((total + spare, cols), torch.nan, dtype=lora_as[0].dtype)
    b_pages = torch.full((total + spare, out), torch.nan, dtype=lora_as[0].dtype)
    a_pages[place], b_pages[place] = torch.cat(lora_as), torch.cat([b.T for b in lora_bs])
    widths = torch.tensor(ranks, dtype=torch.int32)
    spans = torch.stack([widths.cumsum(0).int() - widths, widths], 1).contiguous()
    return AdapterStack(a_pages, b_pages, place.int(), spans, scalings, max(ranks))


def simulate(library, x, stacks, ids, weight=None, bias=None, two_launches=False, clusters=2):
    """y of one launch (or two): ``stacks`` has the adapters of each projection of x."""
    adapters, rows = len(stacks[0]), x.shape[0]
    plan = plan_batch(ids, adapters)
    coef = torch.cat([stacks[0].scalings, torch.zeros(1)])[plan.ids].contiguous()
    outs = [stack.b_pages.shape[1] for stack in stacks]
    y = torch.full((rows, sum(outs)), torch.nan, dtype=x.dtype)
    problem = problem_of(x, stacks, plan, coef, y)
    if weight is not None:
        problem.weight, problem.weight_stride = weight.data_ptr(), weight.stride(0)
        problem.bias = None if bias is None else bias.data_ptr()
        problem.cluster_cols = library.columns_per_cluster_of(max(outs), clusters)
    run(library, problem, x.dtype, two_launches)
    return y


def simulate_add(library, y, x, stacks, ids, weights=None, two_launches=False):
    """Adds the deltas of all projections to ``y``, each with the scalings of its own stack."""
    plan = plan_batch(ids, len(stacks[0]))
    problem = problem_of(x, stacks, plan, weights, y)
    problem.accumulate = True
    for i, stack in enumerate(stacks):
        problem.projection[i].scalings = stack.scalings.data_ptr()
    run(library, problem, x.dtype, two_launches)


def problem_of(x, stacks, plan, coef, y):
    """The projections side by side in ``y``; ``coef`` has a factor for each row, or is None."""
    problem = DecodeProblem(
        *(x.data_ptr(), x.stride(0), *x.shape, None if coef is None else coef.data_ptr()),
        *(plan.order.data_ptr(), plan.offsets.data_ptr(), plan.tiles.data_ptr()),
        *(len(stacks[0]), len(plan.tiles), max(stack.max_rank for stack in stacks)),
    )
    problem.y, problem.y_stride, problem.projections = y.data_ptr(), y.stride(0), len(stacks)
    first = 0
    for i, stack in enumerate(stacks):
        problem.projection[i] = Projection(
            *(stack.a_pages.data_ptr(), stack.b_pages.data_ptr()),
            *(stack.a_pages.stride(0), stack.b_pages.stride(0)),
            *(stack.pages.data_ptr(), stack.spans.data_ptr(), None, first, stack.b_pages.shape[1]),
        )
        first += stack.b_pages.shape[1]
    return problem


def run(library, problem, dtype, two_launches):
    """Both launches have sums between them, which start as NaN."""
    if two_launches:
        tiles = problem.projections * problem.tile_count
        parts = torch.full((tiles * library.part_elements_of(problem.max_rank),), torch.nan)
        problem.parts = parts.data_ptr()
    library.simulate(ctypes.byref(problem), int(dtype == torch.bfloat16))
