"""Tensor parallelism on two and four processes equals one: values, gradients, dropout, checkpoints."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from processes import run

from lora_kernels import lora_linear
from lora_kernels.adapters import METHODS as ADAPTERS
from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear, apply_lora, parallel, set_adapter
from lora_kernels.nn.parallel import ColwiseLoRA, RowwiseLoRA

SIZES = (8, 12, 8)
# All in float64: what differs is the order of the sums.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


class MLP(nn.Module):
    """The pair that tensor parallelism is made for, with an activation between."""

    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(SIZES[0], SIZES[1], bias=bias)
        self.down = nn.Linear(SIZES[1], SIZES[2], bias=bias)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


def build(method="lora", p=0.0, **options):
    torch.manual_seed(0)
    model = MLP().double()
    config = LoRAConfig(
        r=3, method=method, lora_dropout=p, target_modules="all-linear", init_lora_weights=False, **options
    )
    apply_lora(model, config)
    for parameter in model.parameters():  # no zero start, and a gate of ones hides mistakes
        nn.init.normal_(parameter)
    return model, torch.randn(2, 5, SIZES[0], dtype=torch.float64), torch.randn(2, 5, SIZES[2]).double()


PLAN = {"up": ColwiseLoRA(), "down": RowwiseLoRA()}


def mesh_of(size):
    return init_device_mesh("cpu", (size,))


def gradients(model, x, dy, run=None):
    """y and all gradients; ``run``: how to call the model, where not as it is."""
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.backward(dy)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            whole(got[name]), value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def equals_one_process(rank, method, bias_trained):
    model, x, dy = build(method)
    model.up.bias.requires_grad_(bias_trained)
    model.down.bias.requires_grad_(bias_trained)
    want = gradients(copy.deepcopy(model), x, dy)
    split = parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    same(gradients(split, x, dy), want)
    assert not any(p.requires_grad for p in (split.up.weight, split.down.weight))


def lies_where_it_should(rank):
    model, *_ = build()
    world = dist.get_world_size()
    parallelize_module(model, mesh_of(world), PLAN)
    (n, k), (rows, cols) = (SIZES[1], SIZES[0]), (SIZES[2], SIZES[1])
    up, down = model.up.adapters["default"], model.down.adapters["default"]
    assert model.up.weight.to_local().shape == (n // world, k)
    assert up.lora_B.to_local().shape == (n // world, 3) and up.lora_A.to_local().shape == (3, k)
    assert model.down.weight.to_local().shape == (rows, cols // world)
    assert down.lora_A.to_local().shape == (3, cols // world) and down.lora_B.to_local().shape == (rows, 3)


def whole_gradients_are_left_where_the_parameter_is(rank):
    """An optimiser on each process must see the whole gradient of what is whole."""
    model, x, dy = build()
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    gradients(model, x, dy)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.placements == parameter.placements, name
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    mine = whole(model.up.adapters["default"].lora_A.detach())
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine.contiguous())
    assert all(torch.equal(one, mine) for one in gathered)


def column_dropout_is_that_of_one_process(rank, seeded_alike):
    """All drop the same elements, those that the first process would drop alone; also in a checkpoint."""
    model, x, dy = build(p=0.4)
    column = nn.Sequential(model.up)
    dy = torch.randn(2, 5, SIZES[1], dtype=torch.float64)
    torch.manual_seed(7)
    want = gradients(copy.deepcopy(column), x, dy)
    style = ColwiseLoRA(output_layouts=Replicate())
    parallelize_module(column, mesh_of(dist.get_world_size()), {"0": style})
    for recompute in (False, True):
        column.zero_grad()
        torch.manual_seed(7 if seeded_alike or rank == 0 else 100 + rank)
        call = (lambda x: checkpoint(column, x, use_reentrant=False)) if recompute else None
        same(gradients(column, x, dy, call), want)


def row_dropout_is_independent(rank):
    """W = 0, A = B = I: y is drop(x), so the masks of all parts can be seen at once."""
    world, size, p = dist.get_world_size(), 64, 0.25
    mesh = mesh_of(world)
    torch.manual_seed(3)  # alike on all processes, and the masks differ all the same
    eye = torch.eye(size)
    weight = distribute_tensor(torch.zeros(size, size), mesh, [Shard(1)])
    a = distribute_tensor(eye, mesh, [Shard(1)])
    b = distribute_tensor(eye, mesh, [Replicate()])
    x = distribute_tensor(torch.ones(128, size), mesh, [Shard(1)]).requires_grad_()
    y = lora_linear(x, weight, a, b, dropout_p=p)
    y.sum().backward()
    keep = (y.full_tensor() != 0).float()
    torch.testing.assert_close(x.grad.full_tensor(), keep / (1 - p))
    assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5
    parts = keep.chunk(world, 1)
    agree = (parts[0] == parts[1]).float().mean()
    assert abs(agree - (p * p + (1 - p) ** 2)) < 0.05


def layouts_of_the_function(rank):
    """The public function on DTensors: rows split, branch alone, gate, scaling, uneven parts."""
    world = dist.get_world_size()
    mesh = mesh_of(world)
    m, k, n, r = 6, 10, 7, 3
    made = {"x": (m, k), "weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,), "gate": (r,)}
    torch.manual_seed(1)
    given = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in made.items()}
    dy = torch.randn(m, n, dtype=torch.float64)
    column = {"weight": Shard(0), "lora_b": Shard(0), "bias": Shard(0)}
    by_row = {"x": Shard(1), "weight": Shard(1), "lora_a": Shard(1)}
    for places in (column, by_row, {"x": Shard(0)}, {}):
        for left_out in ((), ("weight", "bias"), ("bias", "gate")):
            tensors = {name: t for name, t in given.items() if name not in left_out}
            want = outcome({name: t.clone().requires_grad_() for name, t in tensors.items()}, dy)
            got = outcome(
                {
                    name: distribute_tensor(t, mesh, [places.get(name, Replicate())]).requires_grad_()
                    for name, t in tensors.items()
                },
                distribute_tensor(dy, mesh, [Replicate()]),
            )
            same(got, want)


def outcome(tensors, dy):
    y = lora_linear(**{"weight": None, **tensors}, scaling=0.5)
    grads = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True))}


def checkpoints_go_both_ways(rank):
    from lora_kernels import load_adapter, save_adapter

    model, x, _ = build()
    want = {name: value.clone() for name, value in model.state_dict().items()}
    y = model(x)
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    same(full, want)
    other, *_ = build()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    parallelize_module(other, mesh_of(dist.get_world_size()), PLAN)
    set_model_state_dict(other, full, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(other(x), y, **TOLERANCE)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        alone, *_ = build()
        for parameter in alone.parameters():
            if parameter.requires_grad:
                nn.init.zeros_(parameter)
        load_adapter(alone, folder)
        torch.testing.assert_close(alone(x), y, **TOLERANCE)
        for parameter in other.parameters():
            if parameter.requires_grad:
                nn.init.zeros_(parameter)
        load_adapter(other, folder)
        torch.testing.assert_close(other(x), y, **TOLERANCE)


def compiles_whole(rank):
    model, x, dy = build(p=0.4)
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    torch.manual_seed(3)
    want = {name: whole(value).clone() for name, value in gradients(model, x, dy).items()}
    model.zero_grad()
    torch.manual_seed(3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(gradients(model, x, dy, compiled), want)


def merges_in_parts(rank):
    model, x, _ = build()
    y = model(x)
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    before = [layer.weight.full_tensor() for layer in (model.up, model.down)]
    for layer in (model.up, model.down):
        layer.merge()
    torch.testing.assert_close(model(x), y, **TOLERANCE)
    for layer in (model.up, model.down):
        layer.unmerge()
    assert all(
        torch.equal(layer.weight.full_tensor(), w)
        for layer, w in zip((model.up, model.down), before, strict=True)
    )


def with_fully_sharded_data(rank):
    """Two by two: rows of the batch over one dimension, the layer over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model, _, _ = build()
    x = torch.randn(4, 5, SIZES[0], dtype=torch.float64)
    dy = torch.randn(4, 5, SIZES[2], dtype=torch.float64)
    want = gradients(copy.deepcopy(model), x, dy)
    parallelize_module(model, mesh["model"], PLAN)
    fully_shard(model, mesh=mesh["data"])
    mine = slice(2 * mesh.get_local_rank("data"), 2 * mesh.get_local_rank("data") + 2)
    got = gradients(model, x[mine], 2 * dy[mine])  # FSDP takes the mean over its processes
    want["y"], want["x"], got["x"] = want["y"][mine], want["x"][mine], got["x"] / 2
    same(got, want)


def errors_say_what_is_wrong(rank):
    mesh = mesh_of(dist.get_world_size())
    entire = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    cols = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="weight: expected a layer split by out features"):
        lora_linear(entire, cols, entire, entire)
    with pytest.raises(TypeError, match="lora_b: expected a DTensor"):
        lora_linear(entire, entire, entire, torch.ones(4, 4))
    with pytest.raises(TypeError, match="x: expected a DTensor"):
        lora_linear(torch.ones(4, 4), entire, entire, entire)
    model, *_ = build()
    model.up.merge()
    with pytest.raises(RuntimeError, match="merged"):
        parallelize_module(model, mesh, PLAN)


def other_modules_are_split_by_torch(rank):
    model = MLP().double()
    want = copy.deepcopy(model)
    x = torch.randn(3, SIZES[0], dtype=torch.float64)
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    assert isinstance(model.up.weight, DTensor)
    torch.testing.assert_close(model(x), want(x), **TOLERANCE)


def what_adapters_own_is_split_with_it(rank):
    """A module saved whole, and the bias of an adapted one, each of the adapter that is chosen."""
    model = MLP().double()
    for name in "ab":
        own = {"modules_to_save": ["down"], "bias": "lora_only", "init_lora_weights": False}
        apply_lora(model, LoRAConfig(r=3, target_modules=["up"], **own), name)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    want = copy.deepcopy(model)
    x, dy = (torch.randn(2, 5, n, dtype=torch.float64) for n in (SIZES[0], SIZES[2]))
    parallelize_module(model, mesh_of(dist.get_world_size()), PLAN)
    for names in ("b", [], "a"):
        set_adapter(model, names)
        set_adapter(want, names)
        got, wanted = gradients(model, x, dy), gradients(want, x, dy)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(whole(got[name]), value, **TOLERANCE, msg=f"{names}: {name}")
        model.zero_grad()
        want.zero_grad()


COMMON = [
    (equals_one_process, "lora", True),
    (column_dropout_is_that_of_one_process, False),
    (row_dropout_is_independent,),
]
ON_TWO = [
    *((equals_one_process, method, False) for method, cls in ADAPTERS.items() if cls.splits),
    (column_dropout_is_that_of_one_process, True),
    (lies_where_it_should,),
    (whole_gradients_are_left_where_the_parameter_is,),
    (layouts_of_the_function,),
    (checkpoints_go_both_ways,),
    (compiles_whole,),
    (merges_in_parts,),
    (errors_say_what_is_wrong,),
    (other_modules_are_split_by_torch,),
    (what_adapters_own_is_split_with_it,),
]


def test_two_processes(tmp_path):
    run([*COMMON, *ON_TWO], 2, tmp_path)


def test_four_processes(tmp_path):
    run([*COMMON, (with_fully_sharded_data,)], 4, tmp_path)


def test_methods_that_do_not_split_are_refused():
    splitting = {method for method, cls in ADAPTERS.items() if cls.splits}
    assert {"lora", "lora_fa", "lora_xs", "sora", "dylora"} <= splitting and "dora" not in splitting
    layer = LoRALinear(4, 4, r=2)
    layer.adapters["default"].splits = {}
    with pytest.raises(TypeError, match=r"adapter 'default': expected a method among .*dylora, .*lora, "):
        parallel._check(layer)
