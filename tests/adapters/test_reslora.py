"""ResLoRA's own promises, over a chain of layers of one role."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import same, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import load_adapter, save_adapter
from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear, apply_lora, merge_adapters, remove_lora, side_inputs
from lora_kernels.stats import estimate_reslora_merge

WIDTH, R, DEPTH, S = 6, 2, 4, 1.5
WIDE = torch.float64


def base():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH, dtype=WIDE)}) for _ in range(DEPTH))
    )


def new(**options):
    model = base()
    config = LoRAConfig(r=R, lora_alpha=S * R, method="reslora", target_modules=["proj"])
    config.method_options, config.init_lora_weights = options, False
    return apply_lora(model, config)


def through(model, x):
    with side_inputs(model):
        for block in model:
            x = torch.tanh(block["proj"](x))
    return x


def dense(model, x, mode, most=DEPTH, first="double"):
    """The three formulas, as sums of products."""
    inputs = []
    for layer in (block["proj"] for block in model):
        inputs.append(x)
        i, own = len(inputs) - 1, layer.adapters["default"]
        adapters = [block["proj"].adapters["default"] for block in model][: i + 1][::-1][: most + 1]
        if mode == "bs":
            branch = sum(x @ one.lora_A.T @ one.lora_B.T for one in adapters)
        elif mode == "ms":
            h = sum(seen @ one.lora_A.T for seen, one in zip(inputs[::-1], adapters, strict=False))
            branch = h @ own.lora_B.T
        else:
            extra = inputs[-2] if i else (x if first == "double" else 0 * x)
            branch = (x + extra) @ own.lora_A.T @ own.lora_B.T
        x = torch.tanh(F.linear(x, layer.weight, layer.bias) + S * branch)
    return x


@pytest.mark.parametrize(
    "options,most",
    [
        ({"mode": "bs"}, DEPTH),
        ({"mode": "bs", "pre_num": 1}, 1),
        ({"mode": "ms"}, DEPTH),
        ({"mode": "ms", "pre_num": 2}, 2),
        ({"mode": "is"}, 1),
        ({"mode": "is", "first": "single"}, 1),
    ],
)
def test_values_gradients_and_count(options, most):
    model, x = new(**options), torch.randn(2, 3, WIDTH, dtype=WIDE, requires_grad=True)
    assert trained(model) == DEPTH * 2 * R * WIDTH
    y, want = through(model, x), dense(model, x, options["mode"], most, options.get("first", "double"))
    same(y, want, [x, *(p for p in model.parameters() if p.requires_grad)], torch.randn_like(y))


@pytest.mark.parametrize("mode", ["bs", "ms"])
def test_without_layers_before_it_is_lora(mode):
    model, lora = new(mode=mode, pre_num=0), base()
    apply_lora(lora, LoRAConfig(r=R, lora_alpha=S * R, target_modules=["proj"]))
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("kappa")}
    lora.load_state_dict(state)
    x = torch.randn(3, WIDTH, dtype=WIDE)
    torch.testing.assert_close(through(model, x), through(lora, x))


def test_bs_merges_exactly():
    model, x = new(mode="bs"), torch.randn(3, WIDTH, dtype=WIDE)
    want = through(model, x)
    torch.testing.assert_close(through(remove_lora(copy.deepcopy(model), merge=True), x), want)


ESTIMATES = {
    ("is", "input"): lambda f, i: [f[i - 1] / f[i]] if i else [1.0],
    ("is", "weight"): lambda f, i: [f[i - 2] / f[i - 1]] if i > 1 else [1.0],
    ("ms", "input"): lambda f, i: [f[j] / f[i] for j in reversed(range(i))] or [0.0],
    ("ms", "scalar"): lambda f, i: [f[j] / f[i] for j in reversed(range(i))] or [0.0],
}


@pytest.mark.parametrize("mode,merge", ESTIMATES)
def test_is_and_ms_merge_by_estimates(mode, merge, tmp_path):
    model, batches = new(mode=mode, merge=merge), [torch.randn(3, WIDTH, dtype=WIDE) for _ in range(2)]
    layers = [block["proj"] for block in model]
    with pytest.raises(RuntimeError, match=r"cannot merge: reslora's .* needs estimate_reslora_merge"):
        merge_adapters(model)
    assert not any(layer.merged for layer in layers)
    estimate_reslora_merge(model, batches, through)
    norms = torch.zeros(DEPTH, dtype=WIDE)
    for batch in batches:
        seen = []
        handles = [
            layer.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0])) for layer in layers
        ]
        through(model, batch)
        [handle.remove() for handle in handles]
        for i, (layer, x) in enumerate(zip(layers, seen, strict=True)):
            adapter = layer.adapters["default"]
            delta = S * adapter.lora_B @ adapter.lora_A
            found = {"input": x, "scalar": x @ adapter.lora_A.T, "weight": layer.weight + delta}[merge]
            norms[i] += found.detach().norm() / len(batches)
    for i, layer in enumerate(layers):
        adapter, kappa = layer.adapters["default"], ESTIMATES[mode, merge](norms, i)
        a = [adapter.lora_A, *(layers[j].adapters["default"].lora_A for j in reversed(range(i)))]
        if (mode, merge) == ("ms", "input"):
            total = a[0] + sum(k * one for k, one in zip(kappa, a[1:], strict=False))
        else:
            total = (1 + sum(kappa)) * a[0]
        want = layer.weight + S * adapter.lora_B @ total
        torch.testing.assert_close(layer.merged_weight(), want)
    save_adapter(model, tmp_path)
    other = load_adapter(base(), tmp_path)
    torch.testing.assert_close(other[-1]["proj"].merged_weight(), layers[-1].merged_weight())
    torch.testing.assert_close(through(other, batches[0]), through(model, batches[0]))


@pytest.mark.parametrize("mode", ["is", "bs", "ms"])
def test_compiled_copied_and_checkpointed(mode):
    torch._dynamo.reset()
    model, x = new(mode=mode), torch.randn(3, WIDTH, dtype=WIDE)
    y = through(model, x)
    torch.testing.assert_close(through(copy.deepcopy(model), x), y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(y.square().sum(), parameters)
    with side_inputs(model) as call:
        h = x
        for block in model:
            run = call.bind(lambda h, block=block: torch.tanh(block["proj"](h)))
            h = checkpoint(run, h, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(h.square().sum(), parameters), want)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block["proj"](x))
            return x

    whole = Whole()
    with side_inputs(whole):
        torch.testing.assert_close(torch.compile(whole, backend="aot_eager")(x), y)


def test_what_it_refuses():
    for options, words in (
        ({"mode": "no"}, "mode: expected one of"),
        ({"pre_num": -2}, "pre_num: expected at least -1, got -2"),
        ({"mode": "is", "merge": "scalar"}, r"merge: expected one of \('input', 'weight'\)"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRALinear(4, 4, r=2, method="reslora", method_options=options)
    with pytest.raises(ValueError, match=r"can be written inside lora_kernels\.nn\.side_inputs"):
        LoRALinear(4, 4, r=2, method="reslora", method_options={"mode": "ms"})(torch.ones(1, 4))
    with pytest.raises(ValueError, match="model: expected ResLoRA adapters of mode 'is' or 'ms', got none"):
        estimate_reslora_merge(new(mode="bs"))
    with pytest.raises(
        ValueError, match=r"batches: expected some that reach every layer, got none at 0\.proj"
    ):
        estimate_reslora_merge(new(mode="ms"))
