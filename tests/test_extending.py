"""Slips of whoever adds a structure, a start or a schedule by docs/extending.md: each message names them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.adapters import METHODS, LowRank, Start
from lora_kernels.adapters.base import Adapter, register
from lora_kernels.adapters.lora import LoRA
from lora_kernels.adapters.update import Dense
from lora_kernels.init import INITIALISERS, Drawn
from lora_kernels.init import register as register_start
from lora_kernels.schedules import Schedule


@pytest.fixture(autouse=True)
def registers_as_they_were():
    yield
    METHODS._classes.pop("mine", None)
    INITIALISERS.pop("mine", None)
    assert not any(one.__module__ == __name__ for one in METHODS._classes.values())
    assert not any(one.draw.__module__ == __name__ for one in INITIALISERS.values())


def step(**fields):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    apply_lora(model, LoRAConfig(r=2, target_modules="all-linear", **fields))
    model(torch.randn(3, 6)).sum().backward()


def structure(**body):
    register("mine")(type("Mine", (LoRA,), {"peft": False, **body}))
    step(method="mine")


def building(what):
    return lambda: structure(build=lambda self, site: what(self, site))


def lowering(what):
    return lambda: structure(lower=lambda self, x=None, call=None: what(self))


def with_tensor(name, value):
    def build(self, site):
        return Start({**LoRA.build(self, site).tensors, name: value})

    return lambda: structure(build=build)


STRUCTURES = {
    "no name": (lambda: register(LoRA), TypeError, r"@register\('name'\), got <class"),
    "an empty name": (lambda: register("")(LoRA), ValueError, "name without dots, got ''"),
    "a name of the package": (
        lambda: register("moslora")(type("Mine", (LoRA,), {})),
        ValueError,
        "'moslora', which is lora_kernels.adapters.low_rank.moslora.MoSLoRA's",
    ),
    "no Adapter": (lambda: register("mine")(nn.Linear), TypeError, "a subclass of Adapter, got .*Linear"),
    "options as a str": (lambda: structure(options="start"), TypeError, "options: Mine expected a frozenset"),
    "frozen as a str": (lambda: structure(frozen="lora_A"), TypeError, "frozen: Mine expected a frozenset"),
    "splits as a list": (lambda: structure(splits=["lora_A"]), TypeError, "splits: Mine expected a Mapping"),
    "frozen that is none": (
        lambda: structure(frozen=frozenset({"lora_a"})),
        ValueError,
        "frozen: mine expected some of lora_A, lora_B, got 'lora_a'",
    ),
    "no build": (
        lambda: (register("mine")(type("Mine", (Adapter,), {})), step(method="mine")),
        NotImplementedError,
        "Mine: build",
    ),
    "build of a dict": (
        building(lambda self, site: {"lora_A": site.zeros(2, 2)}),
        TypeError,
        "build: mine expected a Start of tensors by name, got dict",
    ),
    "build of nothing": (building(lambda self, site: None), TypeError, "a Start .* got NoneType"),
    "a number among the tensors": (with_tensor("d", 1.0), TypeError, "expected a tensor for 'd', got float"),
    "a name that is taken": (with_tensor("scaling", torch.ones(1)), ValueError, "build: .* got 'scaling'"),
    "a dotted name": (with_tensor("d.e", torch.ones(1)), ValueError, "build: .* got 'd.e'"),
    "lower of nothing": (lowering(lambda self: None), TypeError, "lower: expected LowRank.* got NoneType"),
    "lower of a tensor": (
        lowering(lambda self: self.lora_B @ self.lora_A),
        TypeError,
        "lower: .* got .*Tensor",
    ),
    "lower of a tuple": (lowering(lambda self: (self.lora_A, self.lora_B)), TypeError, "lower: .* got tuple"),
    "an option nobody knows": (
        lambda: (structure(), LoRAConfig(method="mine", method_options={"start": 1.0})),
        ValueError,
        "method_options: mine takes none, got 'start'",
    ),
}


def start(what, **options):
    def run():
        register_start("mine", **options)(what)
        step(init_lora_weights="mine")

    return run


def factors(site, a=None, b=None, **fields):
    a = torch.ones(site.config.r, site.in_features) if a is None else a
    return Drawn(a, torch.zeros(site.out_features, site.config.r) if b is None else b, **fields)


STARTS = {
    "no name": (lambda: register_start(factors), TypeError, r"@register\('name'\), got <function"),
    "a name of the package": (lambda: register_start("pissa")(factors), ValueError, "'pissa'"),
    "options as a str": (start(factors, options="value"), TypeError, "options: .* got the str 'value'"),
    "a tuple": (start(lambda site: tuple(factors(site))[:2]), TypeError, "a Drawn of 'mine', got tuple"),
    "nothing": (start(lambda site: None), TypeError, "a Drawn of 'mine', got NoneType"),
    "A on its side": (
        start(lambda site: factors(site, a=torch.ones(site.in_features, site.config.r))),
        ValueError,
        r"lora_a: expected floats of shape \(2, 6\) .* 'mine', got torch.float32 \(6, 2\)",
    ),
    "A on its side, taken out of W": (
        start(lambda site: factors(site, a=torch.ones(site.in_features, site.config.r)), takes=True),
        ValueError,
        "lora_a: expected",
    ),
    "B on its side": (
        start(lambda site: factors(site, b=torch.ones(site.config.r, site.out_features))),
        ValueError,
        r"lora_b: expected floats of shape \(4, 2\)",
    ),
    "whole numbers": (
        start(lambda site: factors(site, a=torch.ones(site.config.r, site.in_features, dtype=torch.long))),
        ValueError,
        "lora_a: expected floats .* got torch.int64",
    ),
    "W on its side": (
        start(lambda site: factors(site, weight=torch.ones(site.in_features, site.out_features))),
        ValueError,
        r"weight: expected floats of shape \(4, 6\)",
    ),
    "frozen that is none": (
        start(lambda site: factors(site, frozen=frozenset({"A"}))),
        ValueError,
        "frozen: expected lora_A or lora_B of the start 'mine', got 'A'",
    ),
    "a statistic nobody gathers": (start(factors, needs="covariances"), ValueError, "needs the statistic"),
    "an option nobody knows": (
        lambda: (start(factors)(), LoRAConfig(init_lora_weights="mine", method_options={"value": 1})),
        ValueError,
        "got 'value'",
    ),
}


def schedule(optimizer=True, **body):
    def run():
        body.setdefault("act", lambda self, step: None)
        kind = type("Mine", (Schedule,), {"key": "mine", **body} if "key" not in body else dict(body))
        model = nn.Linear(2, 2)
        one = kind(model, torch.optim.SGD(model.parameters(), lr=0.1) if optimizer else None)
        one.step()
        one.state_dict()

    return run


def keyless():
    kind = type("Mine", (Schedule,), {"act": lambda self, step: None})
    kind(nn.Linear(2, 2)).state_dict()


SCHEDULES = {
    "no key": (keyless, AttributeError, "key: expected a name on the class Mine"),
    "saved as a str": (
        schedule(saved="count"),
        TypeError,
        "saved: Mine expected a tuple of names, got 'count'",
    ),
    "saved that is not there": (
        schedule(saved=("count",)),
        AttributeError,
        "saved: expected names of attributes of Mine, got 'count'",
    ),
    "saved that cannot be": (
        schedule(saved=("rate",), rate=nn.Identity()),
        TypeError,
        "saved: expected numbers, .* got 'rate', a Identity",
    ),
    "an __init__ of its own": (
        schedule(__init__=lambda self, model, optimizer: None),
        AttributeError,
        r"Mine: call super\(\).__init__\(model, optimizer\)",
    ),
    "no optimiser": (schedule(False, with_optimizer=True), ValueError, "optimizer: mine expected the one"),
    "no act": (
        lambda: type("Mine", (Schedule,), {"key": "m"})(nn.Linear(2, 2)).step(),
        NotImplementedError,
        "act",
    ),
}

CASES = [(f"{kind}: {name}", *case) for kind, cases in (
    ("structure", STRUCTURES), ("start", STARTS), ("schedule", SCHEDULES)
) for name, case in cases.items()]  # fmt: skip


@pytest.mark.parametrize(
    ("run", "error", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_slip_is_named(run, error, words):
    with pytest.raises(error, match=words):
        run()


def test_what_is_defined_anew_takes_the_place_of_the_old():
    """A cell of a notebook, run twice."""
    for _ in range(2):

        @register("mine")
        class Mine(LoRA):
            def lower(self, x=None, call=None):
                return LowRank(self.lora_A, self.lora_B, 2 * self.scaling)

        @register_start("mine")
        def draw(site):
            return factors(site)

        assert METHODS["mine"] is Mine and INITIALISERS["mine"].draw is draw


def test_other_updates_are_still_taken():
    structure(plain=False, lower=lambda self, x=None, call=None: Dense(self.lora_B @ self.lora_A))
