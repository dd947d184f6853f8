"""Over all schedules: what does not fit is refused by name, and nothing is changed."""

from __future__ import annotations

import pytest
import schedule_cases
import torch
from optim_models import net
from schedule_cases import CASES, WITHOUT_ADAPTERS, adam, fresh, run

from lora_kernels import schedules
from lora_kernels.optim import DerivativeFree, FloraAccumulator


def picture(model):
    """Everything of a model that a refusal must leave alone."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {
        name: len(one._forward_pre_hooks) + len(one._forward_hooks) for name, one in model.named_modules()
    }
    return tensors, trains, hooks


def assert_untouched(model, before):
    tensors, trains, hooks = picture(model)
    assert trains == before[1] and hooks == before[2]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(value, tensors[name]) for name, value in before[0].items())


# Phases that do not fit into the steps there are, and what is said of them.
PHASES = {
    "adalora": (
        lambda m, o: schedules.AdaLoRA(m, 5, target_r=2, tinit=3, tfinal=2),
        r"total_steps: expected more than",
    ),
    "lamda_freezer": (lambda m, o: schedules.LaMDAFreezer(m, max_steps=0), r"max_steps: expected at least 1"),
    "aflora_freezer": (
        lambda m, o: schedules.AFLoRAFreezer(m, total_steps=3, t_i=2, t_f=2, window=1),
        r"total_steps: expected",
    ),
    "roselora": (lambda m, o: schedules.RoseLoRA(m, t_i=5, t_f=5), r"t_f: expected more than t_i = 5"),
    "sora_schedule": (
        lambda m, o: schedules.SoRASchedule(m, xis=(1e-3, 1e-2), steps=(2,)),
        r"steps: expected one for",
    ),
    "delta_lora": (lambda m, o: schedules.DeltaLoRA(m, start_step=-1), r"start_step: expected"),
    "lisa": (lambda m, o: schedules.LISA(m, [m.wide], n_active=2, interval=1), r"n_active: expected"),
    "lorasc": (lambda m, o: schedules.LoRASC(m, o, every=0), r"every: expected at least 1"),
    "plora": (lambda m, o: schedules.PeriodicLoRA(m, o, every=0), r"every: expected at least 1"),
    "relora": (lambda m, o: schedules.ReLoRA(m, o, every=0), r"every: expected at least 1"),
    "prilora": (lambda m, o: schedules.PRILoRA(m, every=0), r"every: expected at least 1"),
    "alora_alloc": (
        lambda m, o: schedules.ALoRAAllocator(m, lambda: 0.0, every=0),
        r"every: expected at least 1",
    ),
    "blora": (lambda m, o: schedules.BLoRA(m, warmup=-1), r"warmup: expected"),
    "tensor_rank_reduction": (lambda m, o: schedules.RankReducer(m, every=0), r"every: expected at least 1"),
    "bilora": (lambda m, o: schedules.BiLoRA(m, None, None, None, radius=0.0), r"radius: expected"),
    "autolora_rank": (lambda m, o: schedules.AutoLoRA(m, None, None, None, unroll=-1.0), r"unroll: expected"),
    "dylora_sampler": (lambda m, o: schedules.DyLoRASampler(m, seed=0.5), r"seed: expected an int"),
    "lora_asr_study": (lambda m, o: schedules.RankWarmup(m, o, steps=0), r"steps: expected at least 1"),
}


def test_every_schedule_is_here():
    assert set(PHASES) == set(CASES)


@pytest.mark.parametrize("key", PHASES)
def test_steps_that_do_not_hold_its_phases(key):
    make, words = PHASES[key]
    model = CASES[key][0]()
    before, optimizer = picture(model), adam(model)
    with pytest.raises((ValueError, TypeError), match=words):
        make(model, optimizer)
    assert_untouched(model, before)


@pytest.mark.parametrize("key", [key for key in CASES if key not in WITHOUT_ADAPTERS])
def test_a_model_without_adapters_is_left_alone(key):
    model = net()
    before = picture(model)
    with pytest.raises(ValueError, match=r"model: .*expected"):
        CASES[key][1](model, None)
    assert_untouched(model, before)


# What freezes factors does so on any LoRA.
ANY = ("lamda_freezer", "aflora_freezer")


@pytest.mark.parametrize("key", [key for key in CASES if key not in (*WITHOUT_ADAPTERS, *ANY)])
def test_adapters_of_another_method(key):
    """A schedule of one method refuses others; that of LoRA takes another, or refuses it."""
    own = {one.method for one in adapters(CASES[key][0]())}
    model = fresh(method="dora" if own == {"lora"} else "lora")
    before = picture(model)
    try:
        CASES[key][1](model, adam(model))
    except ValueError as error:
        assert str(error).startswith("model: ")
        assert_untouched(model, before)
    else:
        assert own == {"lora"}


def adapters(model):
    return [one.adapters["default"] for one in model.modules() if hasattr(one, "adapters")]


def shapes(state):
    """The shapes of all tensors of a state."""
    if isinstance(state, torch.Tensor):
        return [tuple(state.shape)]
    if isinstance(state, dict):
        return [(key, shapes(value)) for key, value in state.items()]
    return [shapes(one) for one in state] if isinstance(state, list) else []


def built(key):
    model = CASES[key][0]()
    optimizer = adam(model)
    return model, optimizer, CASES[key][1](model, optimizer)


@pytest.mark.parametrize("key", CASES)
def test_the_state_of_a_model_of_other_ranks(key, monkeypatch):
    model, optimizer, schedule = built(key)
    run(model, optimizer, schedule, 2)
    real = schedule_cases.ours
    monkeypatch.setattr(schedule_cases, "ours", lambda dtype, **o: real(dtype, **{"r": 2, **o}))
    other_model, other_optimizer, other = built(key)
    run(other_model, other_optimizer, other, 2)
    state = other.state_dict()
    if shapes(state) == shapes(schedule.state_dict()):
        pytest.skip("nothing of it depends on the rank")
    before, own = picture(model), schedule.state_dict()
    with pytest.raises(ValueError, match=r"state"):
        schedule.load_state_dict(state)
    assert_untouched(model, before)
    assert shapes(schedule.state_dict()) == shapes(own) and schedule.steps == own["steps"]


@pytest.mark.parametrize("key", CASES)
def test_the_state_of_the_next_schedule(key):
    names = list(CASES)
    other = built(names[(names.index(key) + 1) % len(names)])[2].state_dict()
    model, _, schedule = built(key)
    before = picture(model)
    with pytest.raises(ValueError, match=f"state: expected one of '{key}', got one of '{other['schedule']}'"):
        schedule.load_state_dict(other)
    assert_untouched(model, before)


def rate():
    return schedules.MinAutoLR()


def continual():
    return schedules.InfLoRA(fresh(), 2)


def accumulator():
    return FloraAccumulator(net().parameters(), rank=4)


def search():
    pytest.importorskip("cma")
    return DerivativeFree(fresh(), dim=4)


# What has a state and is no schedule.
HOLDERS = {"rate": rate, "continual": continual, "accumulator": accumulator, "search": search}


@pytest.mark.parametrize("name", HOLDERS)
def test_states_of_what_is_no_schedule(name):
    one = HOLDERS[name]()
    own = one.state_dict()
    before = shapes(own)
    with pytest.raises(TypeError, match=r"state.*: expected a mapping, got list"):
        one.load_state_dict([])
    for other in (CASES["prilora"], CASES["relora"]):
        model = other[0]()
        with pytest.raises(ValueError, match=r"state.*: expected"):
            one.load_state_dict(other[1](model, adam(model)).state_dict())
    for key in own:
        with pytest.raises(ValueError, match=r"state.*: expected"):
            one.load_state_dict({k: v for k, v in own.items() if k != key})
    with pytest.raises(ValueError, match=r"state.*: expected .*, got 'more'"):
        one.load_state_dict({**own, "more": 1})
    assert shapes(one.state_dict()) == before
    one.load_state_dict(own)


def test_sums_of_other_shapes():
    one, other = accumulator(), FloraAccumulator(net().parameters(), rank=3)
    state = one.state_dict()
    state["sums"][0] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"state_dict: expected a sum of shape \(.*\), got \(2, 2\)"):
        one.load_state_dict(state)
    assert one.sums == [None] * len(one.params) and len(other.params) >= len(one.params)
