"""The twin of a forward: the same function but for the calls that share, or a reason why there is none."""

from __future__ import annotations

import contextlib
import functools
import traceback

import pytest
from torch import nn

import lora_kernels.nn.forward_source as forward_source
from lora_kernels.nn.forward_source import CannotRewrite, shared_inputs, twin

AB = [("a", "b")]
offset = 3


def member(parent, names, name, x, held):
    """Notes its arguments in the dict of the run, and calls the child."""
    held.setdefault("seen", []).append((names, name))
    return getattr(parent, name)(x) + 1000 * len(held["seen"])


class Base:
    def extra(self):
        return 7


class Parent(Base):
    __private = 2

    def a(self, x):
        return x + 1

    def b(self, x):
        return x + 2

    def forward(self, x, *more, scale=5, **options):
        """Everything that a faithful copy has to keep."""
        text = """two
lines"""
        y = self.a(x) * scale
        total = [scale + i + self.__private for i in more]
        z = self.b(x) + len(text) + offset + self.__private + super().extra()
        if options:
            raise KeyError(z)
        return y, z, total


def rewritten(forward, groups=AB, linears=("a", "b")):
    return twin(forward, groups, linears, member)


def test_a_twin_is_the_function_but_for_its_calls():
    parent, made = Parent(), rewritten(Parent.forward)
    y, z, total = parent.forward(1, 2, 3, scale=2)
    assert made(parent, 1, 2, 3, scale=2) == (y + 2000, z + 2000, total)
    assert made(parent, 1) == made(parent, 1)  # a new dict in every run
    for name in ("__defaults__", "__kwdefaults__", "__globals__", "__qualname__", "__module__"):
        assert getattr(made, name) == getattr(Parent.forward, name)
    assert made.__code__.co_varnames[:5] == Parent.forward.__code__.co_varnames[:5]
    assert forward_source._MEMBER not in Parent.forward.__globals__


def test_a_traceback_shows_the_lines_of_the_source():
    frames = []
    for run in (Parent.forward, rewritten(Parent.forward)):
        with pytest.raises(KeyError) as raised:
            run(Parent(), 1, fail=True)
        frames.append(traceback.extract_tb(raised.value.__traceback__)[-1])
    assert frames[0].line == "raise KeyError(z)"
    assert (frames[0].filename, frames[0].lineno) == (frames[1].filename, frames[1].lineno)


def test_a_closure_is_shared():
    def make(start):
        class Inner(Parent):
            def forward(self, x):
                nonlocal start
                start += 1
                return self.a(x) + self.b(x) + start

        return Inner

    kind = make(10)
    made = rewritten(kind.forward)
    assert kind().forward(1) == 5 + 11
    assert made(kind(), 1) == 5 + 12 + 3000
    assert kind().forward(1) == 5 + 13


def decorator(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)

    return run


class Decorated(Parent):
    @decorator
    def forward(self, x):
        return self.a(x) + self.b(x)


class Generator(Parent):
    def forward(self, x):
        yield self.a(x)
        yield self.b(x)


class Looks(Parent):
    def forward(self, x):
        return self.a(x) + self.b(x), dict(locals())


class Loop(Parent):
    def forward(self, x):
        for _ in range(2):
            y = self.a(x) + self.b(x)
        return y


class Inside(Parent):
    def forward(self, x):
        return (lambda: self.a(x) + self.b(x))()


class Augmented(Parent):
    def forward(self, x, total):
        total += self.a(x)
        return total + self.b(x)


class Stored(Parent):
    def forward(self, x):
        x[0] = self.a(x)
        return self.b(x)


class Method(Parent):
    def forward(self, x):
        y = self.a(x)
        x.mul_(2)
        return y + self.b(x)


class Out(Parent):
    def forward(self, x, other):
        y = self.a(x)
        other.add(1, out=other)
        return y + self.b(x)


class Given(Parent):
    def forward(self, x, other):
        return self.a(x) + other(x) + self.b(x)


class Child(Parent):
    def forward(self, x):
        return self.a(x) + self.c(x) + self.b(x)


class Branch(Parent):
    def forward(self, x, more=False):
        return self.a(x) + (self.b(x) if more else 0)


class Early(Parent):
    def forward(self, x, more=False):
        y = self.a(x)
        if not more:
            return y
        return y + self.b(x)


class Settings(Parent):
    def forward(self, x):
        with contextlib.nullcontext():
            y = self.a(x)
        return y + self.b(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    (
        (Decorated, "decorated"),
        (Generator, "generator"),
        (Looks, "local variables"),
        (Loop, "in a loop"),
        (Inside, "in a function inside"),
        (Augmented, "in place"),
        (Stored, "in place"),
        (Method, "in place"),
        (Out, "in place"),
        (Given, "x is used otherwise"),
        (Child, "x is used otherwise"),
        (Branch, "not always called together"),
        (Settings, "not always called together"),
        (Early, "not always called together"),
    ),
)
def test_what_has_no_twin(kind, reason):
    with pytest.raises(CannotRewrite, match=reason):
        rewritten(kind.forward)


def test_other_linears_and_sizes_are_no_hindrance():
    class Between(Parent):
        def c(self, x):
            return x

        def forward(self, x):
            y = None if x is None else self.a(x)
            return y

    rewritten(Child.forward, linears=("a", "b", "c"))
    with pytest.raises(CannotRewrite, match="shares its input with no other"):
        rewritten(Between.forward)


def test_a_branch_that_holds_them_all():
    class Both(Parent):
        def forward(self, x, other=None):
            if other is None:
                y = self.a(x)
                size = x.real if x is not None else 0
                return y + self.b(x) + size
            return 0

    with pytest.raises(CannotRewrite, match="used otherwise"):
        rewritten(Both.forward)

    class Sized(Parent):
        def forward(self, x, other=None):
            if other is None:
                y = self.a(x)
                size = x.shape[0] if x is not None else 0
                return y + self.b(x) + size
            return 0

    rewritten(Sized.forward)


def test_a_source_that_is_not_what_runs():
    def forward(self, x):
        return self.a(x) + self.b(x)

    forward.__code__ = forward.__code__.replace(co_consts=(*forward.__code__.co_consts, "another"))
    with pytest.raises(CannotRewrite, match="not what runs"):
        rewritten(forward)
    with pytest.raises(CannotRewrite, match="no source"):
        rewritten(eval("lambda self, x: self.a(x) + self.b(x)"))
    with pytest.raises(CannotRewrite, match="def of its own"):
        rewritten(lambda self, x: self.a(x) + self.b(x))
    with pytest.raises(CannotRewrite, match="no function"):
        rewritten(functools.partial(forward))


def test_the_forwards_of_transformers_have_twins():
    transformers = pytest.importorskip("transformers")
    from transformers.models import bert, gemma3, llama, mixtral, qwen3, t5  # noqa: F401

    models = transformers.models
    for kind, names in (
        (models.llama.modeling_llama.LlamaAttention, ("q_proj", "k_proj", "v_proj")),
        (models.llama.modeling_llama.LlamaMLP, ("gate_proj", "up_proj")),
        (models.bert.modeling_bert.BertSelfAttention, ("query", "key", "value")),
        (models.qwen3.modeling_qwen3.Qwen3Attention, ("q_proj", "k_proj", "v_proj")),
        (models.gemma3.modeling_gemma3.Gemma3Attention, ("q_proj", "k_proj", "v_proj")),
        (models.mixtral.modeling_mixtral.MixtralAttention, ("q_proj", "k_proj", "v_proj")),
        (models.t5.modeling_t5.T5Attention, ("k", "v")),
    ):
        instance = nn.Module.__new__(kind)
        groups = shared_inputs(instance, names)
        assert groups == [names]
        assert callable(rewritten(kind.forward, groups, names))
