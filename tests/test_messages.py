"""Warnings point at the user's line, logs are below one name and silent, bars are for terminals."""

from __future__ import annotations

import ast
import io
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lora_kernels import (
    LoRAConfig,
    _backend,
    _cpu_ways,
    _extension,
    _messages,
    apply_lora,
    calibrate,
    load_adapter,
    planner,
    save_adapter,
)
from lora_kernels.nn import delete_adapter

PACKAGE = Path(_messages.__file__).parent
# What is run to read what it prints.
PRINTS = ("cli/", "demo/report.py", "kernels/cuda_static.py", "nn/adapted.py", "_messages.py")


def calls(name):
    """(file, line) of each call of a function of this name in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield path.relative_to(PACKAGE).as_posix(), node.lineno


def test_there_is_one_place_that_warns_and_few_that_print():
    assert {path for path, _ in calls("warnings.warn")} == {"_messages.py"}
    assert {path for path, _ in calls("print") if not path.startswith(PRINTS)} == set()
    for path, _ in calls("logging.getLogger"):
        assert "getLogger(__name__)" in (PACKAGE / path).read_text() or path == "_messages.py"


class Reads(nn.Module):
    """A parent that computes with the weight of a linear and does not call it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.proj = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.proj(self.embed(input_ids) if inputs_embeds is None else inputs_embeds)


def adapted(model, targets="all-linear", **options):
    return apply_lora(model, LoRAConfig(r=2, target_modules=targets, **options))


def two():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def of_peft():
    peft = pytest.importorskip("peft")
    from lora_kernels import accelerate

    return accelerate(peft.get_peft_model(Reads(), peft.LoraConfig(r=2, target_modules=["proj"])))


def embedding_in_a_pool():
    pytest.importorskip("safetensors")
    from lora_kernels.integrations.pool import _factors

    return _factors({"base_model.model.0.base_layer.weight": torch.zeros(4, 4)})


def without_ids():
    model = adapted(Tokens(), ["proj"], alora_invocation_tokens=[1])
    for _ in range(3):  # at each step of a loop, and said once
        model(inputs_embeds=torch.zeros(1, 2, 4))


def unsound(read, name):
    path = Path(f"{name}.json")
    path.write_text("{}", encoding="utf-8")
    return read(path)


def optimiser_of_another_rank():
    """A file of another rank, loaded over an adapter whose optimiser goes on."""
    pytest.importorskip("safetensors")
    save_adapter(adapted(two()), "wide")
    model = apply_lora(two(), LoRAConfig(r=1, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    load_adapter(model, "wide")
    for _ in range(2):
        optimizer.step()


def optimiser_of_a_deleted_adapter():
    model = adapted(two())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    delete_adapter(model, "default")
    for _ in range(2):
        optimizer.step()


CAUSES = {
    "_extension.py": lambda: _extension._rebuild("the extension is of another version, rebuild it"),
    "_cpu_ways.py": lambda: unsound(_cpu_ways.read, "cpu"),
    "integrations/peft.py": of_peft,
    "integrations/pool.py": embedding_in_a_pool,
    "nn/apply.py": lambda: adapted(two(), ["0"], modules_to_save=["1", "nope"]),
    "nn/exposed.py": lambda: adapted(Reads(), ["proj"], lora_dropout=0.1),
    "nn/invocation.py": without_ids,
    "nn/outdated.py": optimiser_of_another_rank,
    "nn/outdated.py deleted": optimiser_of_a_deleted_adapter,
    "nn/sites.py": lambda: adapted(nn.Sequential(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4)))),
    "nn/sites.py strays": lambda: adapted(two(), ["0", "nope"]),
    "planner.py": lambda: unsound(lambda path: planner.read(path, "sm_90"), "sm_90"),
}


def test_each_warning_has_its_cause():
    assert sorted(path for path, _ in calls("warn")) == sorted(key.partition(" ")[0] for key in CAUSES)


@pytest.mark.parametrize("key", CAUSES)
def test_a_warning_comes_once_and_points_at_the_line_of_the_user(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CAUSES[key]()
    assert [one.filename for one in caught if one.category is UserWarning] == [__file__]


def test_logs_are_silent_unless_asked(caplog, capfd):
    adapted(two())(torch.zeros(1, 4))
    assert capfd.readouterr() == ("", "")
    caplog.set_level(logging.INFO, "lora_kernels")
    adapted(two())
    text = "adapter default: lora of 2 layers"
    assert ("lora_kernels.nn.apply", logging.INFO, text) in caplog.record_tuples
    assert capfd.readouterr() == ("", "")


def test_the_backend_is_logged_with_the_reason_for_a_fallback(caplog):
    caplog.set_level(logging.INFO, "lora_kernels")
    _backend._resolve.cache_clear()
    assert _backend.resolve("cpu", torch.int8, 4) == "reference"
    assert "auto is reference" in caplog.text and "cpp cannot run: it takes float16" in caplog.text
    _backend._resolve.cache_clear()


class Terminal(io.StringIO):
    def isatty(self):
        return True


SHOWN = "\rcalibrate: 1/2\rcalibrate: 2/2\n"


@pytest.mark.parametrize("terminal, shown", [(Terminal, SHOWN), (io.StringIO, "")])
def test_progress_shows_on_a_terminal_alone(terminal, shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal())
    calibrate(two(), [torch.zeros(2, 4)] * 2)
    assert sys.stderr.getvalue() == shown


def test_progress_by_tqdm(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(_messages.each("steps", iter(range(3)))) == [0, 1, 2]
    assert "steps: 1/" not in sys.stderr.getvalue()
