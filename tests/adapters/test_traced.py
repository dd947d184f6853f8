"""What the register puts into a forward pass is one graph to ``torch.compile`` and ``torch.export``.

Structures are in a model with a group, trained and asked without gradients; a layer by itself is compiled by
the invariants too. What ``torch.export`` does not take stands in ``UNEXPORTED`` with the reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from cases import IN, case, shake
from test_invariants import new_model
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, methods
from lora_kernels import nn as ours
from lora_kernels.adapters import METHODS
from lora_kernels.nn import side_inputs

# Key -> why torch.export has no program of it; to torch.compile all are one graph.
_KEPT = "the layer keeps W, a parameter, among its buffers while another weight acts; export makes it twice"
UNEXPORTED = {"pissa": _KEPT, "merged": _KEPT}


def structure(method):
    x = torch.randn(4, IN)
    return shake(new_model(method)).float(), (x,), case(method).side(x)


def start(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    return apply_lora(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=name)), (X,), {}


def merged():
    model, inputs, side = start(False)
    ours.merge_adapters(model)
    return model, inputs, side


def memvp():
    model = ours.apply_memvp(nn.Sequential(nn.Linear(8, 8)), ["0"])
    return model, (torch.randn(2, 3, 8),), {"memory": torch.randn(2, 2, 5, 8).unbind()}


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ours.MultiTaskLinear(8, 8, ("a", "b"), r=2, r_task={"a": 2, "b": 1}, lora_dropout=0.0)

    def forward(self, x):
        y, each = self.layer(x, {"a": 2 * x})
        return y + each["a"] * each["b"]


def compacter():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    ours.insert_compacter(model, ["0"], reduction=2, n=2)
    return model, (X,), {}


X = torch.linspace(-1, 1, 24).view(3, 8)
LAYERS = {
    "memvp": memvp,
    "mtlora_mt": lambda: (Tasks(), (X,), {}),
    "lors": lambda: (ours.LORSLinear(nn.Linear(8, 8), r=2), (X,), {}),
    "colora_pde": lambda: (ours.CoLoRALinear(8, 8, r=2), (X, torch.rand(2)), {}),
    "compacter_adapter": compacter,
    "lbp_wht": lambda: (ours.WHTLinear(8, 4, (8, 8)), (torch.randn(2, 64, 8),), {}),
}
MADE = (
    {key: (lambda key=key: structure(key)) for key in sorted(METHODS)}
    | {key: (lambda key=key: start(key)) for key in ("gaussian", "pissa", "mica")}
    | {"merged": merged}
    | LAYERS
)
every = pytest.mark.parametrize("key", MADE)


def of_kind(kind):
    return {entry.key for entry in methods.REGISTER if entry.kind == kind}


def test_every_structure_and_layer_is_here():
    assert of_kind("structure") == set(METHODS)
    assert of_kind("layer") == {*LAYERS, "clip_lora"}  # which is a recipe for LoRA's layers
    assert set(UNEXPORTED) <= set(MADE)


def prepared(key):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs, side = MADE[key]()
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad and not one.any():
                one.normal_(std=0.1)
    return model.train(), inputs, side_inputs(model, **side)


def step(run, model, inputs):
    """y and every gradient, with one seed."""
    model.zero_grad()
    torch.manual_seed(1)
    y = run(*inputs)
    if y.requires_grad:
        y.sin().sum().backward()
    return {"y": y.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.spread("key", of=5)
@every
def test_a_training_step_and_an_answer_are_one_graph_each(key):
    model, inputs, block = prepared(key)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with block:
        want = step(model, model, inputs)
        got = step(compiled, model, inputs)
        model.eval()
        with torch.no_grad():
            want["answer"], got["answer"] = model(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Whose tensors are more than two, always.
COUNTED = {"_LoRALinearGroup", "_SparseCore"}


def test_no_function_takes_names_beside_a_star():
    """Compiled without gradients, torch takes away the context of one that gets as many as its names."""
    folder = Path(ours.__file__).parents[1] / "ops"
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases):
                forward = next(one for one in node.body if getattr(one, "name", "") == "forward")
                if forward.args.vararg and len(forward.args.args) > 1:
                    found.add(node.name)
    assert found == COUNTED


@pytest.mark.spread("key", of=5)
@every
def test_the_exported_program_answers_alike(key):
    model, inputs, block = prepared(key)
    with block, torch.no_grad():
        want = model.eval()(*inputs)
        if key in UNEXPORTED:
            with pytest.raises(KeyError, match="already exists"):
                torch.export.export(model, inputs).module()
            ours.remove_lora(model, merge=True)
        program = torch.export.export(model, inputs)
        torch.testing.assert_close(program.module()(*inputs), want, rtol=1e-4, atol=1e-5)
