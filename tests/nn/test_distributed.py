"""Data parallelism on two and four processes: gradients and parameters as if there were one."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graphs
from processes import run

from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import (
    apply_lora,
    delete_adapter,
    disable_adapters,
    group_layers,
    layer_groups,
    lora_layers,
    remove_lora,
    set_adapter,
    ungroup_layers,
)

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


def mine(tensor):
    """The rows of this process."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def ddp(rank):
    model, x, dy = build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    one_step(wrapped, mine(x), mine(dy))
    check(model.named_parameters(), rank)


def fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    model, x, dy = build()
    for layer in lora_layers(model).values():
        fully_shard(layer)
    fully_shard(model)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    one_step(model, mine(x), mine(dy))
    check(model.named_parameters(), rank)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    merged_in_shards(model)


def merged_in_shards(model):
    """Merging works on what each process holds."""
    layer = model[0]
    layer.reshard()
    want = layer.weight.full_tensor() + layer.adapters["default"].delta().full_tensor()
    torch.testing.assert_close(layer.merged_weight().full_tensor(), want)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.a(x) * self.b(x)


def fsdp2_of_a_group(rank):
    """The class that FSDP2 puts on top, before or after ours, and compiled."""
    from torch.distributed.fsdp import fully_shard

    config = LoRAConfig(r=3, target_modules=["a", "b"], init_lora_weights=False)
    whole, x, dy = apply_lora(Pair(), config), torch.randn(4, 8), torch.randn(4, 6)
    whole(x).backward(dy)
    want = [p.grad for p in whole.parameters() if p.requires_grad]
    for kind in ("ours below", "ours on top", "none of ours"):
        split = copy.deepcopy(whole)
        split.zero_grad()
        if kind != "ours below":
            ungroup_layers(split)
        fully_shard(split)
        if kind == "ours on top":
            group_layers(split)
        assert len(layer_groups(split)) == (kind != "none of ours")
        torch._dynamo.reset()
        graphs = Graphs()
        for step in (split, torch.compile(split, backend=graphs)):
            split.zero_grad()
            step(mine(x)).backward(dist.get_world_size() * mine(dy))
            got = [p.grad.full_tensor() for p in split.parameters() if p.requires_grad]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert graphs.count("lora_linear_group") == (kind != "none of ours")
        ungroup_layers(split)
        assert not layer_groups(split)
        split(mine(x))


def fsdp2_with_dropout_and_checkpoints(rank):
    """Parameters are gathered again for the second forward pass, and the mask is the first one's."""
    from torch.distributed.fsdp import fully_shard

    model, x, dy = build()
    for layer in lora_layers(model).values():
        layer.adapters["default"].lora_dropout = 0.5
    grads = []
    for recompute in (False, True):
        split = copy.deepcopy(model)
        for layer in lora_layers(split).values():
            fully_shard(layer)
        fully_shard(split)
        torch.manual_seed(rank)
        y = checkpoint(split, mine(x), use_reentrant=False) if recompute else split(mine(x))
        y.backward(mine(dy))
        assert not torch.equal(y, split.eval()(mine(x)))
        grads.append({n: p.grad.full_tensor() for n, p in split.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def fsdp2_in_mixed_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, x, dy = build()
    whole = copy.deepcopy(model)
    whole(x).backward(dy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    y = model(mine(x))
    assert y.dtype == torch.bfloat16
    y.backward(dist.get_world_size() * mine(dy).bfloat16())  # the mean over processes is then the sum
    want = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = parameter.grad.full_tensor() - want[name].grad
            assert parameter.grad.dtype == torch.float32 and error.norm() < 0.03 * want[name].grad.norm()


def adapters_of_fsdp2_are_saved_whole(rank):
    from torch.distributed.fsdp import fully_shard

    from lora_kernels import load_adapter, save_adapter

    model, x, _ = build()
    y = model(x)
    fully_shard(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        alone, *_ = build()
        for layer in lora_layers(alone).values():
            layer.adapters["default"].reset_parameters()
        assert not torch.equal(alone(x), y)
        load_adapter(alone, folder)
        torch.testing.assert_close(alone(x), y)
        wide = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
        save_adapter(apply_lora(wide, LoRAConfig(r=5, target_modules="all-linear")), folder)
        with pytest.raises(
            RuntimeError, match="by tensors of other shapes after fully_shard took the parameters"
        ):
            load_adapter(model, folder)
        torch.testing.assert_close(model(x), y)


def what_adapters_own_under_fsdp2(rank):
    """It trains as in one process; what would exchange parameters that FSDP2 holds is refused by name."""
    from torch.distributed.fsdp import fully_shard

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
        own = {"modules_to_save": ["2"], "bias": "lora_only", "init_lora_weights": False}
        return apply_lora(model, LoRAConfig(r=3, target_modules=["0"], **own))

    model, whole = made(), made()
    x, dy = torch.randn(4, 8), torch.randn(4, 6)
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    one_step(model, mine(x), mine(dy))
    one_step(whole, x, dy)
    named = dict(model.named_parameters())
    for name, want in whole.named_parameters():
        torch.testing.assert_close(named[name].full_tensor(), want, msg=name)
    keys = list(model.state_dict())
    other = LoRAConfig(r=3, target_modules=["0"], modules_to_save=["2"])
    for refused in (lambda: set_adapter(model, []), lambda: apply_lora(model, other, "b")):
        with pytest.raises(RuntimeError, match="fully_shard took"):
            refused()
    with pytest.raises(RuntimeError, match="fully_shard took"), disable_adapters(model):
        pass
    assert list(model.state_dict()) == keys and model[0].active == ("default",)


def fsdp2_takes_no_adapter_later(rank):
    """It would be split by nobody, and each process would train one of its own: every way in says so."""
    from torch.distributed.fsdp import fully_shard

    from lora_kernels import load_adapter, save_adapter
    from lora_kernels.compose import add_weighted_adapter

    config = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    plain = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    model, x, _ = build()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        for each in (plain[0], plain[2], *lora_layers(model).values(), plain, model):
            fully_shard(each)
        want, modules = model(x), [type(one) for one in model.modules()]
        ways = (
            lambda: apply_lora(plain, config),
            lambda: apply_lora(model, config, "b"),
            lambda: load_adapter(plain, folder),
            lambda: load_adapter(model, folder, "b"),
            lambda: add_weighted_adapter(model, ["default"], [1.0], "b"),
            lambda: model[0].add_adapter("b", config),
            lambda: remove_lora(model),
            lambda: remove_lora(model, merge=True),
        )
        for way in ways:
            with pytest.raises(
                RuntimeError, match="after fully_shard took the parameters over; do it before"
            ):
                way()
    assert not lora_layers(plain) and [type(one) for one in model.modules()] == modules
    torch.testing.assert_close(model(x), want)


def what_fsdp2_holds_is_chosen_among_and_deleted(rank):
    """Adapters that were there before: each trains as in one process, alone and together."""
    from torch.distributed.fsdp import fully_shard

    whole, x, dy = build()
    for name in "bc":
        apply_lora(whole, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False), name)
    split = copy.deepcopy(whole)
    for layer in lora_layers(split).values():
        fully_shard(layer)
    fully_shard(split)
    for names in ("b", ["default", "b"], "default"):
        for model, rows in ((whole, slice(None)), (split, slice(2 * rank, 2 * rank + 2))):
            set_adapter(model, names)
            model.zero_grad()
            (model(x[rows]) * dy[rows]).sum(-1).mean().backward()
        want = {name: one.grad for name, one in whole.named_parameters() if one.grad is not None}
        got = {name: one.grad.full_tensor() for name, one in split.named_parameters() if one.grad is not None}
        torch.testing.assert_close(got, want)
        for model in (whole, split):
            if names == ["default", "b"]:
                delete_adapter(model, "b")


def test_two_processes_equal_one(tmp_path):
    more = (
        fsdp2_takes_no_adapter_later,
        what_fsdp2_holds_is_chosen_among_and_deleted,
        fsdp2_of_a_group,
        fsdp2_with_dropout_and_checkpoints,
        fsdp2_in_mixed_precision,
        adapters_of_fsdp2_are_saved_whole,
        what_adapters_own_under_fsdp2,
    )
    run([(case,) for case in (ddp, fsdp2, *more)], 2, tmp_path)


def test_four_processes_equal_one(tmp_path):
    run([(ddp,), (fsdp2,)], 4, tmp_path)
