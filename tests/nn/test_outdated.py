"""Optimisers outlive what is done to a model: its parameters stay the same, or the optimiser is told."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, quantize_base, save_adapter
from lora_kernels.nn import (
    delete_adapter,
    disable_adapters,
    lora_configs,
    lora_layers,
    mark_only_lora_as_trainable,
    merge_adapters,
    outdated,
    remove_lora,
    set_adapter,
    unmerge_adapters,
)

TAKING = ["pissa", "pissa_niter_2", "olora", "milora", "loftq"]


def model(targets=("0", "2"), **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 8))
    return apply_lora(base, LoRAConfig(**({"r": 3, "target_modules": list(targets)} | options)))


def trained(one):
    return [parameter for parameter in one.parameters() if parameter.requires_grad]


def adam(one, **options):
    return torch.optim.AdamW(trained(one), lr=1e-2, **options)


def step(one, optimizer, seed=0):
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    one(x).square().sum().backward()
    optimizer.step()


def quietly(act):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        act()


def saved(folder, **options):
    """A trained adapter's files, and the model that wrote them."""
    other = model(**options)
    optimizer = adam(other)
    for seed in range(3):
        step(other, optimizer, seed)
    save_adapter(other, folder)
    return other


@pytest.mark.parametrize("start", TAKING)
def test_an_optimiser_goes_on_after_a_load_that_changes_the_base(start, tmp_path):
    want = saved(tmp_path, init_lora_weights=start)
    own = model(init_lora_weights=start)
    optimizer = adam(own)
    step(own, optimizer, 7)
    before = {name: id(one) for name, one in own.named_parameters()}
    load_adapter(own, tmp_path)
    assert {name: id(one) for name, one in own.named_parameters()} == before
    x = torch.randn(4, 12)
    torch.testing.assert_close(own(x), want(x), rtol=1e-4, atol=1e-5)
    held = [one.clone() for one in trained(own)]
    quietly(lambda: step(own, optimizer))
    assert all(not torch.equal(one, was) for one, was in zip(trained(own), held, strict=True))


def test_a_start_is_taken_from_the_base_whichever_of_the_two_weights_acts(tmp_path):
    want = saved(tmp_path, init_lora_weights="pissa")
    own = apply_lora(model(init_lora_weights="pissa"), LoRAConfig(r=2, target_modules=["0"]), "other")
    set_adapter(own, "other")
    load_adapter(own, tmp_path)
    set_adapter(own, "default")
    x = torch.randn(4, 12)
    torch.testing.assert_close(own(x), want(x), rtol=1e-4, atol=1e-5)


OTHERS = {
    "rank": {"r": 5},
    "pattern": {"rank_pattern": {"0": 5}},
    "structure": {"method": "lora_xs"},
    "start": {"init_lora_weights": "pissa"},
    "more layers": {"targets": ("0", "2", "3")},
    "fewer layers": {"targets": ("0",)},
    "modules saved whole": {"modules_to_save": ["3"]},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_an_optimiser_that_holds_others_says_so_once(options, tmp_path):
    saved(tmp_path, **options)
    own = model()
    optimizer = adam(own)
    step(own, optimizer)
    before = {id(one): one.shape for one in trained(own)}
    load_adapter(own, tmp_path)
    after = {id(one) for one in trained(own)}
    if after <= before.keys():  # nothing came, so that it trains all there is
        quietly(lambda: step(own, optimizer))
        return
    with pytest.warns(UserWarning, match="'default' that was loaded has .* make the optimiser again") as said:
        step(own, optimizer)
    assert [one.filename for one in said] == [__file__]
    quietly(lambda: step(own, optimizer))


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_an_optimiser_made_again_is_told_nothing(options, tmp_path):
    saved(tmp_path, **options)
    own = model()
    step(own, adam(own))
    load_adapter(own, tmp_path)
    optimizer = adam(own)
    for _ in range(2):
        quietly(lambda: step(own, optimizer))


def test_what_keeps_its_shape_stays_in_a_load_that_replaces_others(tmp_path):
    saved(tmp_path, rank_pattern={"0": 5}, modules_to_save=["3"])
    own = model(modules_to_save=["3"])
    before = {name: id(one) for name, one in own.named_parameters()}
    load_adapter(own, tmp_path)
    after = {name: id(one) for name, one in own.named_parameters()}
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"0.adapters.default.lora_A", "0.adapters.default.lora_B"}


def test_nothing_is_kept_once_nobody_holds_the_old_ones(tmp_path):
    others = list(outdated._notes)  # of what other tests' optimisers still hold
    saved(tmp_path, r=5)
    own = model()
    load_adapter(own, tmp_path)
    assert set(outdated._notes) - set(others)
    gc.collect()
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert set(outdated._notes) <= set(others) and bool(outdated._hooks) == bool(outdated._notes)


GONE = {
    "delete_adapter": lambda one: delete_adapter(one, "default"),
    "delete_adapter of a layer": lambda one: [layer.delete_adapter("default") for layer in one[::2]],
    "remove_lora": remove_lora,
    "remove_lora, merged": lambda one: remove_lora(one, merge=True),
}


def test_the_optimisers_of_two_models_hear_each_of_its_own():
    models = [model(), model()]
    optimizers = [adam(one) for one in models]
    for one in models:
        delete_adapter(one, "default")
    for optimizer in optimizers:
        with pytest.warns(UserWarning, match="that was deleted"):
            optimizer.step()
        quietly(optimizer.step)


@pytest.mark.parametrize("way", GONE.values(), ids=GONE)
def test_an_optimiser_of_what_was_taken_out_says_so_once(way):
    """An adapter put in its place, of the same name and shapes, has other parameters."""
    own = model()
    optimizer, other = adam(own), adam(nn.Linear(2, 2))
    step(own, optimizer)
    way(own)
    apply_lora(
        own, LoRAConfig(r=3, target_modules=["0", "2"]), "default" if not lora_configs(own) else "next"
    )
    quietly(other.step)
    with pytest.warns(
        UserWarning, match=r"it holds \d parameters of .*adapter.* make the optimiser again"
    ) as said:
        optimizer.step()
    assert [one.filename for one in said] == [__file__]
    quietly(optimizer.step)


def test_one_made_after_a_deletion_and_one_of_another_adapter_are_told_nothing():
    own = apply_lora(model(), LoRAConfig(r=2, target_modules=["0"]), "other")
    before = adam(own)
    set_adapter(own, "other")
    other = adam(own)
    delete_adapter(own, "default")
    for _ in range(2):
        quietly(lambda: step(own, other))
        quietly(lambda: step(own, adam(own)))
    with pytest.warns(UserWarning, match="it holds 4 parameters of the adapter 'default' that was deleted"):
        before.step()


def test_what_a_deleted_adapter_owned_is_told_of():
    own = model(modules_to_save=["3"])
    optimizer = adam(own)
    delete_adapter(own, "default")
    with pytest.warns(UserWarning, match="it holds 6 parameters of the adapter 'default' that was deleted"):
        optimizer.step()


def test_a_bank_that_other_layers_still_read_is_not_gone():
    own = shared_banks()
    optimizer = torch.optim.SGD([own[0].adapters["default"].vblora_vector_bank], lr=0.1)
    own[0].delete_adapter("default")
    quietly(lambda: step(own, optimizer))
    delete_adapter(own, "default")
    with pytest.warns(UserWarning, match="it holds 1 parameters"):
        optimizer.step()


def shared_banks():
    return model(method="vblora", method_options={"num_vectors": 6, "vector_length": 4})


def test_what_layers_share_is_shared_after_a_load(tmp_path):
    own = shared_banks()
    save_adapter(own, tmp_path)
    own = shared_banks()
    bank = {name: id(one) for name, one in own.named_parameters(remove_duplicate=False)}
    load_adapter(own, tmp_path)
    assert {name: id(one) for name, one in own.named_parameters(remove_duplicate=False)} == bank


def switched(one):
    apply_lora(one, LoRAConfig(r=2, target_modules=["0"]), "other")
    set_adapter(one, "other")
    set_adapter(one, "default")


def merged_and_moved(one):
    merge_adapters(one)
    one.double()
    one.float()
    unmerge_adapters(one)


def off_and_on(one):
    with disable_adapters(one):
        pass


VERBS = {
    "merge, unmerge": lambda one: (merge_adapters(one), unmerge_adapters(one)),
    "merge, cast, unmerge": merged_and_moved,
    "set_adapter": switched,
    "disable_adapters": off_and_on,
    "mark_only_lora_as_trainable": mark_only_lora_as_trainable,
    "quantize_base": lambda one: quantize_base(one, "int8", ["0", "2"]),
    "load_state_dict": lambda one: one.load_state_dict(one.state_dict()),
    "half and back": lambda one: one.half().float(),
    "reset_parameters": lambda one: [a.reset_parameters() for a in adapters(one)],
}


def adapters(one):
    return [layer.adapters["default"] for layer in lora_layers(one).values()]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_keep_what_trains(verb):
    own = model(modules_to_save=["3"])
    optimizer = adam(own)
    step(own, optimizer)
    before = [id(one) for one in trained(own)]
    verb(own)
    assert [id(one) for one in trained(own)] == before
    quietly(lambda: step(own, optimizer))


def test_a_tie_survives_a_move_while_merged():
    own = model(targets=("3",))
    tied = nn.Linear(8, 8)
    tied.weight = own[3].weight
    whole = nn.ModuleList([own, tied])
    merge_adapters(own)
    whole.double()
    unmerge_adapters(own)
    assert own[3].weight is tied.weight and own[3].weight.dtype == torch.float64


def test_a_bias_that_trains_does_so_after_a_move_while_merged():
    own = model(targets=("0",), lora_bias=True)
    own[0].bias.requires_grad_(True)
    bias = own[0].bias
    merge_adapters(own)
    own.double()
    unmerge_adapters(own)
    assert own[0].bias is bias and bias.requires_grad and bias.dtype == torch.float64


def test_an_adapter_that_is_merged_is_not_filled(tmp_path):
    saved(tmp_path)
    own = model()
    merge_adapters(own)
    state = copy.deepcopy(own.state_dict())
    with pytest.raises(RuntimeError, match="cannot fill 'default' while default is merged"):
        load_adapter(own, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in own.state_dict().items())
