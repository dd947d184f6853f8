"""Merged adapters against PEFT's, kind by kind, and against dense sums."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.compose import Merging, add_weighted_adapter, merge_factors
from lora_kernels.compose.merging import KINDS
from lora_kernels.nn import lora_layers, lora_state_dict, set_adapter

peft = pytest.importorskip("peft")
WIDE, NAMES = torch.float64, ("one", "two", "three")
# Their products with the scales have exact roots: PEFT rounds the roots to float32.
SPECS = {"one": ["emb", "up", "conv"], "two": ["emb", "up", "down", "conv"], "three": ["up", "conv"]}
ALPHAS, WEIGHTS = {"one": 4, "two": 16, "three": 1}, [1.0, 0.25, -4.0]
SPARSE, MADE = {"density": 0.6}, {}
ELECTING = [(kind, signs) for kind in KINDS for signs in ("total", "frequency")[: 1 + Merging(kind).rule[1]]]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 7)
        self.conv = nn.Conv2d(3, 5, 3)


def base():
    torch.manual_seed(0)
    return Model().to(WIDE)


def shaken(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return model


def both(folder, ranks=(4, 4, 4)):
    """PEFT's model with three adapters, and ours with the same."""
    if ranks not in MADE:
        MADE[ranks] = made(folder, ranks)
    return copy.deepcopy(MADE[ranks])


def made(folder, ranks):
    theirs = None
    for (name, targets), r in zip(SPECS.items(), ranks, strict=True):
        config = peft.LoraConfig(r=r, lora_alpha=ALPHAS[name], target_modules=targets)
        if theirs is None:
            theirs = peft.PeftModel(base(), config, name, autocast_adapter_dtype=False)
        else:
            theirs.add_adapter(name, config, autocast_adapter_dtype=False)
    theirs = shaken(theirs.to(WIDE))
    theirs.save_pretrained(folder)
    ours = base()
    for name in NAMES:
        load_adapter(ours, folder / name, name)
    return theirs, ours


def deltas_of_peft(theirs, name):
    layers = {at: m for at, m in theirs.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    has = {at: m for at, m in layers.items() if name in m.lora_A or name in m.lora_embedding_A}
    return {at: m.get_delta_weight(name) for at, m in has.items()}


def deltas(model, name):
    layers = {at: m for at, m in lora_layers(model).items() if name in m.adapters}
    return {at: m._unmatrix(m.adapters[name].delta().detach()) for at, m in layers.items()}


def same(got, want, **bounds):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **{"rtol": 1e-11, "atol": 1e-11, **bounds})


def seed_after_injection(tuner, monkeypatch):
    """PEFT draws a start for the merged adapter first, which nobody sees."""
    inject = tuner.inject_adapter
    monkeypatch.setattr(tuner, "inject_adapter", lambda *given: (inject(*given), torch.manual_seed(2)))


@pytest.mark.parametrize("kind,signs", ELECTING)
def test_every_kind_has_pefts_numbers(kind, signs, tmp_path, monkeypatch):
    theirs, ours = both(tmp_path)
    options = SPARSE if Merging(kind).rule[0] else {}
    signing = {"majority_sign_method": signs}
    seed_after_injection(theirs.base_model, monkeypatch)
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "merged", kind, **signing, **options)
    torch.manual_seed(2)
    assert add_weighted_adapter(ours, NAMES, WEIGHTS, "merged", kind, **signing, **options) is ours
    same(deltas(ours, "merged"), deltas_of_peft(theirs, "merged"))
    if kind in ("cat", "svd"):
        total = dict.fromkeys(deltas(ours, "merged"), 0.0)
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            for at, delta in deltas(ours, name).items():
                total[at] = total[at] + weight * delta
        if kind == "cat":
            same(deltas(ours, "merged"), total)
        else:  # the rest of a best approximation is as large as the values left out
            left = torch.linalg.svdvals(total["up"])[4:].norm()
            torch.testing.assert_close((total["up"] - deltas(ours, "merged")["up"]).norm(), left)


@pytest.mark.parametrize("options", [{"svd_clamp": 0.8, "svd_rank": 2}, {"svd_rank": 2}, {}])
def test_unequal_ranks_and_the_options_of_the_decomposition(options, tmp_path):
    theirs, ours = both(tmp_path, (4, 2, 3))
    theirs.add_weighted_adapter(list(NAMES), WEIGHTS, "merged", "svd", svd_full_matrices=False, **options)
    add_weighted_adapter(ours, NAMES, WEIGHTS, "merged", "svd", **options)
    same(deltas(ours, "merged"), deltas_of_peft(theirs, "merged"))


def test_a_merged_adapter_saves_as_one(tmp_path):
    _, ours = both(tmp_path, (4, 2, 3))
    add_weighted_adapter(ours, NAMES, WEIGHTS, "merged", "cat")
    save_adapter(ours, tmp_path / "out", "merged")
    want = deltas(ours, "merged")
    same(deltas(load_adapter(base(), tmp_path / "out"), "default"), want)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out", autocast_adapter_dtype=False)
    same(deltas_of_peft(theirs, "default"), want)
    before = {name: value.clone() for name, value in lora_state_dict(ours, "one").items()}
    assert all(layer.active != ("merged",) for layer in lora_layers(ours).values())
    set_adapter(ours, "merged")
    same(lora_state_dict(ours, "one"), before, rtol=0, atol=0)


def test_random_kinds_repeat_by_their_generator(tmp_path):
    _, ours = both(tmp_path)
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        options = {**SPARSE, "generator": torch.Generator().manual_seed(seed)}
        add_weighted_adapter(ours, NAMES, WEIGHTS, name, "dare_linear", **options)
    first, again, other = (deltas(ours, name) for name in ("first", "again", "other"))
    same(first, again, rtol=0, atol=0)
    assert not torch.equal(first["up"], other["up"])


def test_one_adapter_by_itself_is_scaled(tmp_path):
    _, ours = both(tmp_path)
    add_weighted_adapter(ours, ["two"], [-0.5], "smaller", "ties", density=0.1)
    same(deltas(ours, "smaller"), {at: -0.5 * delta for at, delta in deltas(ours, "two").items()})


def test_other_methods_and_taken_starts_merge_as_what_they_change():
    torch.manual_seed(0)
    model = base()
    target = {"r": 4, "target_modules": ["up"]}
    apply_lora(model, LoRAConfig(**target, method="moslora"), "mixed")
    apply_lora(model, LoRAConfig(**target, init_lora_weights="pissa"), "taken")
    apply_lora(model, LoRAConfig(**target, method="fourierft", method_options={"n_frequency": 5}), "waves")
    shaken(model)
    taker = model.up.adapters["taken"]
    change = taker.scaling * (taker.lora_B @ taker.lora_A - taker.start_B @ taker.start_A)
    mixed, waves = (model.up.adapters[name].delta() for name in ("mixed", "waves"))
    add_weighted_adapter(model, ["mixed", "taken"], [1.0, 2.0], "sum", "cat")
    torch.testing.assert_close(deltas(model, "sum")["up"], mixed + 2 * change)
    add_weighted_adapter(model, ["waves", "taken"], [1.0, 2.0], "dense", "svd", svd_rank=8)
    torch.testing.assert_close(deltas(model, "dense")["up"], waves + 2 * change)


def test_factors_alone():
    torch.manual_seed(0)
    factors = [(torch.randn(3, 6, dtype=WIDE), torch.randn(5, 3, dtype=WIDE), s) for s in (0.25, 4.0)]
    want = sum(w * s * b @ a for w, (a, b, s) in zip((2.0, -1.0), factors, strict=True))
    lora_a, lora_b = merge_factors(factors, [2.0, -1.0], Merging("cat"))
    torch.testing.assert_close(lora_b @ lora_a, want)
    lora_a, lora_b = merge_factors(factors, [2.0, -1.0], Merging("svd", svd_rank=9))
    assert lora_a.shape == (5, 6)  # all that there is
    torch.testing.assert_close(lora_b @ lora_a, want)


BAD = {
    "adapters: expected ones of one, two, dora, whole, got 'nope'": {"adapters": ["one", "nope"]},
    "adapters: expected names, each once": {"adapters": ["one", "one"]},
    "adapters: 'whole' owns parameters": {"adapters": ["one", "whole"]},
    "weights: expected one for each of 2": {"weights": [1.0]},
    "adapter_name: 'one' is taken": {"adapter_name": "one"},
    "combination_type: expected one of cat": {"combination_type": "mean"},
    "density: ties expects a number above 0": {"combination_type": "ties"},
    "density: dare_ties expects .* got 1.5": {"combination_type": "dare_ties", "density": 1.5},
    "majority_sign_method: expected one of total": {"majority_sign_method": "loud"},
    "svd_rank: expected at least 1": {"svd_rank": 0},
    "svd_clamp: expected a quantile": {"svd_clamp": 2.0},
    "up: combination_type: linear expects adapters of one rank, got .2, 4.": {"combination_type": "linear"},
    "up: method: dora has no": {"adapters": ["one", "dora"]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_changes_nothing(message):
    model = base()
    apply_lora(model, LoRAConfig(r=4, target_modules=["up"]), "one")
    apply_lora(model, LoRAConfig(r=2, target_modules=["up"]), "two")
    apply_lora(model, LoRAConfig(r=4, target_modules=["up"], use_dora=True), "dora")
    apply_lora(model, LoRAConfig(r=4, target_modules=["up"], modules_to_save=["down"]), "whole")
    given = {"adapters": ["one", "two"], "weights": [1.0, 1.0], "adapter_name": "new", **BAD[message]}
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, **given)
    assert list(model.state_dict()) == before
