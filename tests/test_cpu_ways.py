"""Which way the CPU's ops go: a pure rule that gives up what ships for a gain alone, and its table in C++."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import _cpu_ways, _extension
from lora_kernels.cli import env

INSTRUCTIONS = ("avx512", "avx2", "sse2", "neon", "unheard of")
MAKERS = ("GenuineIntel", "AuthenticAMD", "")
built = pytest.mark.skipif(_extension.load() is not None, reason="the extension is not built")

times = st.dictionaries(
    st.sampled_from(list(_cpu_ways.OPS)),
    st.dictionaries(
        st.sampled_from(_cpu_ways.CLASSES),
        st.dictionaries(st.sampled_from(_cpu_ways.WAYS), st.floats(0.5, 1e6), min_size=1),
        max_size=4,
    ),
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    measured=times,
    op=st.sampled_from(list(_cpu_ways.OPS)),
    name=st.sampled_from(_cpu_ways.CLASSES),
    instructions=st.sampled_from(INSTRUCTIONS),
    maker=st.sampled_from(MAKERS),
)
def test_never_slower_than_the_best_measured(measured, op, name, instructions, maker):
    way, why = _cpu_ways.choose(op, name, measured, instructions, maker)
    assert way in _cpu_ways.OPS[op]
    known = {w: us for w, us in measured.get(op, {}).get(name, {}).items() if w in _cpu_ways.OPS[op]}
    if known:
        ships = _cpu_ways.choose(op, name, {}, instructions, maker).way
        assert known[way] * (_cpu_ways.MARGIN if way == ships else 1.0) <= min(known.values())
        assert why == "measured here"
    else:
        assert why == f"default for {instructions}"
        assert way == _cpu_ways.choose(op, name, {}, instructions, maker).way


@pytest.mark.parametrize("op", _cpu_ways.OPS)
def test_what_was_measured_goes_before_the_default(op):
    for name in _cpu_ways.CLASSES:
        for best in _cpu_ways.OPS[op]:
            measured = {op: {name: {way: 1.0 if way == best else 2.0 for way in _cpu_ways.OPS[op]}}}
            assert _cpu_ways.choose(op, name, measured, "avx512", "GenuineIntel").way == best


def test_a_gain_within_the_noise_changes_nothing():
    measured = {"lora_linear": {"many/large/low": {"torch": 1.0, "vendor": 0.97}}}
    assert _cpu_ways.choose("lora_linear", "many/large/low", measured, "avx2", "GenuineIntel").way == "torch"


@built
def test_what_is_forced_before_the_extension_is_loaded_stays():
    code = """
from lora_kernels import _extension, _cpu_ways
with _cpu_ways.forced("panels"):
    assert _extension.load() is None
    print({choice.way for choice in _cpu_ways.now()["lora_linear"].values()})
print({choice.why for choice in _cpu_ways.now()["lora_linear"].values()} & {"forced to panels"})
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == ["{'panels'}", "set()"]


def test_every_class_has_an_example_of_its_own():
    shapes = [_cpu_ways.example(name) for name in _cpu_ways.CLASSES]
    assert [_cpu_ways.shape_class(m, k * n, r) for m, k, n, r in shapes] == list(_cpu_ways.CLASSES)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("forced", ("auto", *_cpu_ways.WAYS))
def test_every_op_has_a_way_in_every_class(forced, instructions):
    choices = _cpu_ways.decide({}, forced, instructions, "")
    assert list(choices) == list(_cpu_ways.OPS)
    for op, classes in choices.items():
        assert list(classes) == list(_cpu_ways.CLASSES)
        assert {choice.way for choice in classes.values()} <= set(_cpu_ways.OPS[op])


@built
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(measured=times, sizes=st.tuples(st.integers(0, 10**5), st.integers(0, 2**30), st.integers(0, 1024)))
def test_the_extension_looks_up_what_the_rule_says(measured, sizes):
    choices = _cpu_ways.decide(measured, "auto", "avx512", "AuthenticAMD")
    try:
        _cpu_ways._native().set_ways(_cpu_ways.bounds(), _cpu_ways.to_bytes(choices))
        for place, op in enumerate(_cpu_ways.OPS):
            wanted = choices[op][_cpu_ways.shape_class(*sizes)].way
            assert _cpu_ways.WAYS[_cpu_ways._native().way(place, *sizes)] == wanted
    finally:
        _cpu_ways.settle()


@built
def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="table: expected 297 bytes, got 3"):
        _cpu_ways._native().set_ways(_cpu_ways.bounds(), b"123")


@built
def test_forcing_ends_with_its_block():
    before = _cpu_ways.now()
    with _cpu_ways.forced("torch"):
        with _cpu_ways.forced("panels"):
            assert _cpu_ways.now()["lora_linear"]["few/small/low"].way == "panels"
        assert _cpu_ways.now()["lora_linear"]["few/small/low"] == ("torch", "forced to torch")
        assert _cpu_ways.now()["dora_linear"]["few/small/low"].way == "vendor"
    assert _cpu_ways.now() == before


@built
def test_env_says_which_way_and_why():
    with _cpu_ways.forced("panels"):
        told = env.report()["cpu ways"]
    assert list(told) == list(_cpu_ways.OPS) and set(told.values()) == {"panels (forced to panels)"}
    measured = {"dora_linear": {"few/small/low": {"panels": 1.0}}}
    named = env._told(_cpu_ways.decide(measured, "auto", "sse2", "")["dora_linear"])
    assert named == ["vendor (default for sse2)", "panels for few/small/low (measured here)"]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_wide_branches_are_left_to_pytorch_where_our_products_are_not(instructions, maker):
    choices = _cpu_ways.decide({}, "auto", instructions, maker)
    ours = instructions in ("avx512", "avx2") and maker == "AuthenticAMD"
    for op in (op for op in _cpu_ways.OPS if "torch" in _cpu_ways.OPS[op]):
        assert choices[op]["many/large/high"].way == ("panels" if ours else "torch")
        assert choices[op]["few/small/high"].way == "torch"
    assert choices["lora_linear_backward"]["some/medium/high"].way == "torch"
    assert choices["lora_linear_dropped"]["few/large/low"].way == "vendor"


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_our_products_where_they_were_measured_faster(instructions):
    vector = instructions in ("avx512", "avx2")
    for maker, large in (("AuthenticAMD", vector), ("GenuineIntel", False), ("", False)):
        choices = _cpu_ways.decide({}, "auto", instructions, maker)
        for op, classes in choices.items():
            assert (classes["many/large/low"].way == "panels") == large, op
            assert "panels" not in {classes[name].way for name in classes if "few" in name or "small" in name}
