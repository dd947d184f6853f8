"""Every measured figure of README and docs/benchmarks.md, and the picture, is that of a committed table."""

from __future__ import annotations

import csv
import re
import struct
from functools import cache
from pathlib import Path

import pytest

from benchmarks import picture

ROOT = Path(__file__).parents[1]
BIG, SMALL = "512x2048x2048", "1x64x64"
# The Xeon and the EPYC, each with AVX-512 and with it hidden.
PROCESSORS = ("", "-avx2", "-epyc", "-epyc-avx2")


@cache
def table(name):
    with (ROOT / f"benchmarks/results/{name}.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def row(name, provider, mode="both", **columns):
    want = {"provider": provider, "mode": mode, **columns}
    found = [row for row in table(name) if want.items() <= row.items()]
    assert len(found) == 1, (name, want)
    return found[0]


def ratio(to, *where, **columns):
    return float(row(*where, **columns)[f"ratio_{to}"])


def linear(name, provider, dropout, to="frozen"):
    return ratio(to, name, provider, shape=BIG, dtype="float32", rank="16", dropout=dropout)


def pair(name, provider):
    return [linear(name, provider, dropout) for dropout in ("0", "0.1")]


def each(suite, *where, to, **columns):
    """On every processor."""
    return [ratio(to, f"cpu{suite and '-'}{suite}{which}", *where, **columns) for which in PROCESSORS]


def quantized(rows, form="nf4"):
    shape = f"{rows}x4096x4096"
    return each("quantized_linear", "ours_cpp", "forward", to="dense", shape=shape, format=form)


def serving(rows, pattern, to, adapters="32"):
    columns = {"rows": rows, "adapters": adapters, "pattern": pattern, "rank": "16", "shape": "4096x4096"}
    return each("serving", "ours_cpp", "delta", to=to, **columns)


def lycoris():
    return [ratio("lycoris", "cpu-methods", "ours", method=one) for one in ("lora", "dora", "loha", "lokr")]


def call(provider, mode="overhead"):
    return ratio("peft", "cpu", provider, mode, shape=SMALL)


def spread():
    """How far apart two rows are that run the same code."""
    rows = [one for one in table("cpu") if one["provider"] == "ours_cpp" and one["mode"] == "both"]
    same = {key: rows[0][key] for key in ("shape", "dtype", "rank")}
    return max(
        abs(linear("cpu", "ours_cpp", one["dropout"]) - linear("cpu", "ours_module", one["dropout"]))
        for one in rows
        if same.items() <= one.items()
    )


def saved():
    at = {"mode": "saved_bytes", "dtype": "bfloat16", "dropout": "0.1"}
    ours, peft = (int(row("cpu", one, **at)["bytes"]) for one in ("ours_module", "peft_byte_mask"))
    return ours / peft


GROUP = {"to": "frozen", "shape": "512x1024x1024", "dropout": "0"}
FOUR_PAIRS = r"\| (N) / (N) " * 4 + r"\|$"
FOUR = r".*\| (N) / (N) \| (N) / (N) \|"
# Of each line of a page that has figures, where they stand in it and what the tables say.
FIGURES = {
    "README.md": (
        (r"of 512.2048.2048 take (N) .", lambda: [linear("cpu", "ours_module", "0.1")]),
        (r"PEFT takes (N) .", lambda: [linear("cpu", "peft", "0.1")]),
        (r"differ by up to (N)", lambda: [spread()]),
        *(
            (
                rf"^\| {name} {FOUR_PAIRS}",
                lambda one=one: [f for which in PROCESSORS for f in pair(f"cpu{which}", one)],
            )
            for name, one in (
                ("`LoRALinear`", "ours_module"),
                ("PEFT after `accelerate`", "ours_in_peft"),
                ("eager PyTorch", "eager"),
                ("PEFT", "peft"),
            )
        ),
    ),
    "docs/benchmarks.md": (
        (r"by up to (N)\. Do not read", lambda: [spread()]),
        (r"takes (N) . PEFT's time \(", lambda: [call("ours_module")]),
        (r"after `accelerate` (N) .\)", lambda: [call("ours_in_peft")]),
        (r"in bf16 a layer keeps (N) .", lambda: [saved()]),
        (
            rf"^\| DoRA forward{FOUR}",
            lambda: each("dora_linear", "ours_module", to="peft", shape=BIG, dropout="0"),
        ),
        (
            rf"^\| the same with dropout{FOUR}",
            lambda: each("dora_linear", "ours_module", to="peft", shape=BIG, dropout="0.1"),
        ),
        (rf"as one group{FOUR}", lambda: each("lora_linear_group", "ours_group_cpp", **GROUP)),
        (rf"^\| NF4 linear of 1 row{FOUR}", lambda: quantized(1)),
        (rf"^\| NF4 linear of 8 rows{FOUR}", lambda: quantized(8)),
        (rf"^\| int8 linear of 1 row{FOUR}", lambda: quantized(1, "int8")),
        (rf"^\| delta of 32 rows{FOUR}", lambda: serving("32", "distinct", "peft")),
        (rf"^\| delta of 128 rows{FOUR}", lambda: serving("128", "uniform", "peft")),
        (r"^\| the same \| (N) / (N) \| (N) / (N) \|", lambda: serving("128", "uniform", "vllm_torch")),
        (rf"^\| delta of one row{FOUR}", lambda: serving("1", "identical", "loop", adapters="1")),
        (r"takes (N) . LyCORIS' time, DoRA (N), LoHa (N) and LoKr (N) .", lycoris),
    ),
}
CASES = [(page, *figure) for page, figures in FIGURES.items() for figure in figures]


def expression(pattern):
    return pattern.replace("(N)", r"(\d\.\d+)").replace(" ", r"\s+")


@pytest.mark.parametrize("page, pattern, measured", CASES, ids=range(len(CASES)))
def test_figures_are_those_of_the_tables(page, pattern, measured):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(expression(pattern), text, re.MULTILINE)
    assert found, "the page does not say this any more"
    assert list(found.groups()) == [f"{figure:.2f}" for figure in measured()]


@pytest.mark.parametrize("page", FIGURES)
def test_every_ratio_of_a_page_is_under_test(page):
    """Each figure with two decimals lies in what a pattern above takes; 1.02 is counted, not measured."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for pattern, _ in FIGURES[page]:
        text = re.sub(expression(pattern), "", text, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w.])\d\.\d\d(?![\w.+])", text)) <= {"1.02"}


def texts(path):
    """The text chunks of a PNG file."""
    data, place = path.read_bytes(), 8
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"tEXt":
            key, _, value = data[place + 8 : place + 8 + length].partition(b"\0")
            yield key.decode(), value.decode()
        place += 12 + length


@pytest.mark.parametrize("theme", picture.THEMES)
def test_the_picture_is_that_of_the_table(theme):
    path = picture.files()[theme]
    assert dict(texts(path))["Source"] == picture.digest(), "run python -m benchmarks.picture"
    assert str(path.relative_to(ROOT)) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_draws(tmp_path):
    pytest.importorskip("matplotlib")
    for name, path in picture.files(tmp_path).items():
        picture.draw(path, picture.THEMES[name])
        assert dict(texts(path))["Source"] == picture.digest()
