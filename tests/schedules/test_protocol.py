"""What every schedule promises: go on from a checkpoint bit for bit, refuse what it cannot do."""

from __future__ import annotations

import io

import pytest
import torch
from optim_models import loss, net, values
from schedule_cases import CASES, WITHOUT_ADAPTERS, adam, fresh, run

from lora_kernels import schedules
from lora_kernels.schedules import Schedule, as_callback

every_schedule = pytest.mark.parametrize("key", CASES)


def built(key):
    make_model, make = CASES[key]
    model = make_model()
    optimizer = adam(model)
    return model, optimizer, make(model, optimizer)


def test_every_schedule_has_a_case():
    exported = [getattr(schedules, name) for name in schedules.__all__]
    found = {one.key for one in exported if isinstance(one, type) and hasattr(one, "key")}
    assert found == set(CASES)


@every_schedule
def test_it_goes_on_bit_for_bit(key):
    model, optimizer, schedule = built(key)
    run(model, optimizer, schedule, 3)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (model, optimizer, schedule)], file)
    run(model, optimizer, schedule, 5, first=3)

    file.seek(0)
    others = built(key)
    for one, state in zip(others, torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(state)
    run(*others, 5, first=3)
    want = values(model)
    assert all(torch.equal(value, want[name]) for name, value in values(others[0]).items())
    assert others[2].steps == 8


@every_schedule
def test_an_optimiser_holds_all_that_trains(key):
    model, optimizer, schedule = built(key)
    before = {name: (id(one), one.shape) for name, one in model.named_parameters()}
    run(model, optimizer, schedule, 6)
    assert {name: (id(one), one.shape) for name, one in model.named_parameters()} == before


@every_schedule
def test_a_state_is_a_copy(key):
    model, optimizer, schedule = built(key)
    run(model, optimizer, schedule, 3)
    state = schedule.state_dict()
    before = io.BytesIO()
    torch.save(state, before)
    run(model, optimizer, schedule, 3, first=3)
    after = io.BytesIO()
    torch.save(state, after)
    assert before.getvalue() == after.getvalue()


@every_schedule
def test_the_state_of_another_is_refused(key):
    schedule = built(key)[2]
    own = schedule.state_dict()
    with pytest.raises(ValueError, match=f"state: expected one of '{key}', got one of 'another'"):
        schedule.load_state_dict({**own, "schedule": "another"})
    with pytest.raises(ValueError, match="state: expected 'steps', got 'schedule'"):
        schedule.load_state_dict({"schedule": key})
    with pytest.raises(ValueError, match=r"state: expected .*, got 'more'"):
        schedule.load_state_dict({**own, "more": 1})
    with pytest.raises(ValueError, match=r"state\['steps'\]: expected int, got str"):
        schedule.load_state_dict({**own, "steps": "three"})
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        schedule.load_state_dict([])
    assert schedule.steps == 0


@pytest.mark.parametrize("key", [key for key in CASES if key not in WITHOUT_ADAPTERS])
def test_a_model_without_adapters_is_refused(key):
    make = CASES[key][1]
    with pytest.raises(ValueError, match=r"model: .*expected"):
        make(net(), None)


@every_schedule
def test_without_its_optimizer_it_says_so(key):
    make_model, make = CASES[key]
    model = make_model()
    schedule = make(model, None)
    if not schedule.with_optimizer:
        pytest.skip("needs none")
    before = values(model)
    with pytest.raises(ValueError, match=f"optimizer: {key} expected the one that trains the model"):
        schedule.step()
    assert schedule.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("what", ["sgd", [1]])
def test_an_optimizer_is_one(what):
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got list"):
        schedules.ReLoRA([])
    with pytest.raises(TypeError, match="optimizer: expected a torch optimiser, got"):
        schedules.ReLoRA(fresh(), what)


class Counter(Schedule):
    """Holds one of each kind of state."""

    key = "counter"
    saved = ("rng", "sums", "seen", "best")

    def __init__(self, model, names=("a", "b")):
        super().__init__(model)
        self.rng = torch.Generator().manual_seed(0)
        self.sums = {name: torch.zeros(2) for name in names}
        self.seen, self.best = [], 0.0

    def act(self, step):
        self.seen.append(torch.rand((), generator=self.rng).item())


def test_a_state_on_another_model_is_refused():
    one = Counter(net())
    one.step()
    state = one.state_dict()
    with pytest.raises(ValueError, match=r"state\['sums'\]: expected 'c', got 'a', 'b'"):
        Counter(net(), ("c",)).load_state_dict(state)
    state["sums"]["a"] = torch.zeros(3)
    other = Counter(net())
    with pytest.raises(ValueError, match=r"state\['sums'\]\['a'\]: expected the shape \(2,\), got \(3,\)"):
        other.load_state_dict(state)
    assert other.seen == [] and other.steps == 0


def test_draws_go_on():
    one = Counter(net())
    one.step()
    other = Counter(net())
    other.load_state_dict(one.state_dict())
    one.step()
    other.step()
    assert other.seen == one.seen and len(one.seen) == 2


def test_as_callback_takes_a_schedule():
    with pytest.raises(TypeError, match="schedule: expected a Schedule, got int"):
        as_callback(3)


def test_losses_differ():
    model = fresh()
    assert loss(model, 0).item() != loss(model, 1).item()
