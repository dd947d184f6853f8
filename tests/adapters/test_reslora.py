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


class Chain(nn.Module):
    """The same chain in a model whose forward runs it, with or without checkpointing of each block."""

    def __init__(self, mode, dtype=WIDE):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = base().to(dtype)
        config = LoRAConfig(r=R, lora_alpha=S * R, method="reslora", target_modules=["proj"])
        config.method_options, config.init_lora_weights = {"mode": mode}, False
        apply_lora(self, config)

    def forward(self, x=None, labels=None):
        checkpointed = vars(self).get("_gradient_checkpointing_func")
        for block in self.blocks:

            def run(h, block=block):
                return torch.tanh(block["proj"](h))

            x = run(x) if checkpointed is None else self._gradient_checkpointing_func(run, x)
        return x if labels is None else {"loss": (x - labels).square().mean(), "logits": x}


def gradients(model, x):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(model(x).square().sum(), trained)


@pytest.mark.parametrize("mode", ["is", "ms"])
def test_a_model_opens_its_call_itself(mode):
    torch._dynamo.reset()
    model, x = Chain(mode), torch.randn(3, WIDTH, dtype=WIDE)
    want = through(model.blocks, x)
    torch.testing.assert_close(model(x), want)
    whole = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    model._gradient_checkpointing_func = lambda f, *a: checkpoint(f, *a, use_reentrant=False)
    both = [model(x), model(2 * x)]  # a backward pass finds the call of its own forward pass
    trained = [p for p in model.parameters() if p.requires_grad]
    again = torch.autograd.grad(both[0].square().sum() + 0 * both[1].sum(), trained)
    torch.testing.assert_close(again, whole)


@pytest.mark.parametrize("mode", ["is", "ms"])
def test_no_call_outlives_a_forward_or_an_adapter(mode):
    model, x = Chain(mode), torch.randn(3, WIDTH, dtype=WIDE)
    with pytest.raises(ValueError, match=f"expected last dimension {WIDTH}"):
        model(x[:, :-1])
    with pytest.raises(ValueError, match=r"call: .* is passed from layer to layer, and no call is open"):
        model.blocks[0]["proj"](x)
    with side_inputs(model) as call:
        model(x)
        assert call  # the block's is used
    remove_lora(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not apply_lora(model, LoRAConfig(target_modules=["proj"]))._forward_pre_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_the_trainer(checkpointing, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=8))
    options = {"method": "reslora", "method_options": {"mode": "ms"}}
    apply_lora(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    tokens = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        gradient_checkpointing=checkpointing, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    assert Trainer(model, arguments, train_dataset=tokens).train().global_step == 2
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_what_it_refuses():
    for options, words in (
        ({"mode": "no"}, "mode: expected one of"),
        ({"pre_num": -2}, "pre_num: expected at least -1, got -2"),
        ({"mode": "is", "merge": "scalar"}, r"merge: expected one of \('input', 'weight'\)"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRALinear(4, 4, r=2, method="reslora", method_options=options)
    with pytest.raises(ValueError, match="is passed from layer to layer, and no call is open"):
        LoRALinear(4, 4, r=2, method="reslora", method_options={"mode": "ms"})(torch.ones(1, 4))
    with pytest.raises(ValueError, match="model: expected ResLoRA adapters of mode 'is' or 'ms', got none"):
        estimate_reslora_merge(new(mode="bs"))
    with pytest.raises(
        ValueError, match=r"batches: expected some that reach every layer, got none at 0\.proj"
    ):
        estimate_reslora_merge(new(mode="ms"))
