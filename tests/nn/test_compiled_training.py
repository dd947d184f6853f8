"""A whole Transformers block in training: compiled, recomputed, in mixed precision, in parts, in graphs."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("transformers")

import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graphs, makes_functions_again

from lora_kernels import _backend, planner, use_backend
from lora_kernels.adapters import LoRAConfig
from lora_kernels.nn import LoRALinear, apply_lora, lora_layers

LENGTH, HIDDEN = 8, 32


def build(p=0.3, dtype=torch.float32):
    """A decoder layer with LoRA on its seven linears, an input and the gradient of its output."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    config._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(config, 0).to(dtype)
    options = {"target_modules": "all-linear", "init_lora_weights": False}
    apply_lora(block, LoRAConfig(r=4, lora_dropout=p, **options))
    assert len(lora_layers(block)) == 7
    x, dy = torch.randn(2, 2, LENGTH, HIDDEN, dtype=dtype)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    return block.train(), x, dy, rotary


def plain(block, x, rotary):
    return block(x, position_embeddings=rotary)


def recomputing(block, x, rotary):
    return checkpoint(lambda x: block(x, position_embeddings=rotary), x, use_reentrant=False)


def all_again(ctx, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def contexts():
    return create_selective_checkpoint_contexts(all_again)


def recomputing_by_policy(block, x, rotary):
    """As docs/training.md has it for a torch that marks no Function."""
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    return run(lambda x: block(x, position_embeddings=rotary), x)


def step(run, block, x, dy, rotary, seed=5):
    """y, dX and the gradients of all factors, with one seed."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = run(block, x, rotary)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.requires_grad)]


def close(got, want):
    assert len(got) == len(want) > 2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def compiled(run, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(run, backend=backend, fullgraph=True)


@pytest.fixture
def seeds_drawn(monkeypatch):
    """Every seed that the opaque op draws, in order."""
    from lora_kernels import _ops
    from lora_kernels.ops import _dispatch

    drawn = []

    def draw(like):
        drawn.append(_dispatch._dropout_seed(like))
        return drawn[-1]

    with torch.library._scoped_library(_ops.NAMESPACE, "IMPL") as library:
        library.impl("dropout_seed", draw, "CPU")
        yield drawn


def test_compiled_block_equals_eager_with_dropout(seeds_drawn):
    block, *rest = build()
    want = step(plain, block, *rest)
    assert not seeds_drawn  # eager draws without the opaque op
    run = compiled(plain)
    close(step(run, block, *rest), want)
    # Query, key and value share x, and so do gate and up: a mask for each, none of them twice.
    assert len({int(seed) for seed in seeds_drawn}) == 7
    close(step(run, block, *rest), want)
    other = step(run, block, *rest, seed=6)
    assert not torch.allclose(other[0], want[0])


@pytest.mark.parametrize("way", (recomputing, recomputing_by_policy))
def test_compiled_block_draws_the_same_masks_when_it_recomputes(way, seeds_drawn):
    block, *rest = build()
    want = step(plain, block, *rest)
    close(step(way, block, *rest), want)
    makes_again = way is recomputing_by_policy or makes_functions_again()
    close(step(compiled(way), block, *rest), want)
    first, again = seeds_drawn[:7], seeds_drawn[7:]
    assert len(again) == (7 if makes_again else 0)
    if not makes_again:
        return
    assert {int(seed) for seed in first} == {int(seed) for seed in again}


TINY = {"vocab_size": 32, "hidden_size": HIDDEN, "num_hidden_layers": 1, "use_cache": False}


def llama():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(intermediate_size=48, **heads, **TINY))


def bert():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(intermediate_size=48, **off, **TINY))


def by_apply_lora(model, targets):
    config = LoRAConfig(r=4, lora_dropout=0.3, target_modules=targets, init_lora_weights=False)
    return apply_lora(model, config)


def by_peft(model, targets):
    peft = pytest.importorskip("peft")
    from lora_kernels.integrations.peft import accelerate

    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    assert not accelerate(model).alone_compiled
    return model


LLAMA, BERT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["query", "key", "value"]


@pytest.mark.spread("make", "adapt", "recompute", of=3)
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("adapt", (by_apply_lora, by_peft))
@pytest.mark.parametrize(("make", "targets", "groups"), ((llama, LLAMA, 2), (bert, BERT, 1)))
def test_compiled_models_share_as_eager_ones_do(make, targets, groups, adapt, recompute):
    torch.manual_seed(0)
    inner = make()
    model, ids = adapt(inner, targets).train(), torch.randint(32, (2, LENGTH))
    if recompute:
        inner._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))

    def run(block, ids):
        return block(input_ids=ids)[0]

    def step(run):
        model.zero_grad()
        torch.manual_seed(5)
        y = run(model, ids)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    again_too = recompute and makes_functions_again()
    graphs, want = Graphs(), step(run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        program = compiled(run, graphs)
        for _ in range(2):
            close(step(program), want)
    assert graphs.count("lora_linear_group") == groups
    assert graphs.count("lora_linear") == 0
    again = sum(ops.count("lora_linear_group") for ops in graphs.ops[1:])
    assert again == (groups if again_too else 0)
    assert sum(ops.count("lora_linear_group_backward") for ops in graphs.ops) == groups
    torch._dynamo.reset()


def test_signatures_are_those_of_transformers():
    plain = llama()
    model = by_apply_lora(copy.deepcopy(plain), LLAMA)
    for layer, base in zip(model.layers, plain.layers, strict=True):
        mine, own = layer.self_attn, base.self_attn
        assert type(mine) is not type(own) and isinstance(mine, type(own))
        assert inspect.signature(mine.forward) == inspect.signature(own.forward)
        assert isinstance(layer.mlp, type(base.mlp))


@pytest.mark.exhaustive
def test_inductor_equals_eager():
    block, *rest = build()
    close(step(compiled(recomputing, "inductor"), block, *rest), step(plain, block, *rest))


def test_compiled_block_under_autocast_equals_eager():
    block, *rest = build()

    def run(block, x, rotary):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(block, x, rotary)

    want = step(run, block, *rest)
    got = step(compiled(run), block, *rest)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 0.02 * other.norm()
    exact = step(plain, block, *rest)
    assert 0 < (want[0] - exact[0]).norm() < 0.05 * exact[0].norm()  # it was autocast, and right


def train(block, x, rotary, dy, scaler, steps=3):
    """A few steps of mixed precision, as the documentation of torch shows them."""
    trained = [p for p in block.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=1e-2)
    torch.manual_seed(1)
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (plain(block, x, rotary).float() * dy).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(trained, 1e3)
        scaler.step(optimiser)
        scaler.update()
    return [p.detach().clone() for p in trained]


def test_a_grad_scaler_changes_no_step():
    block, x, dy, rotary = build()
    start = [p.detach().clone() for p in block.parameters() if p.requires_grad]
    scaled, unscaled = (
        train(copy.deepcopy(block), x, rotary, dy, torch.amp.GradScaler("cpu", 2.0**12, enabled=on))
        for on in (True, False)
    )
    for before, one, other in zip(start, scaled, unscaled, strict=True):
        assert not torch.equal(before, one)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_grad_scaler_skips_a_step_that_overflows():
    block, x, dy, rotary = build()
    start = [p.detach().clone() for p in block.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", 2.0**12)
    after = train(block, x, rotary, dy * float("inf"), scaler, steps=1)
    assert all(torch.equal(one, other) for one, other in zip(start, after, strict=True))
    assert scaler.get_scale() == 2.0**11


def test_half_precision_base_keeps_fp32_adapters_and_gradients():
    block, x, dy, rotary = build(dtype=torch.bfloat16)
    for layer in lora_layers(block).values():
        layer.adapters.float()
    for got in step(plain, block, x, dy, rotary)[2:]:
        assert got.dtype == torch.float32 and bool(got.isfinite().all()) and bool(got.any())


def test_accumulated_gradients_equal_those_of_one_batch():
    block, x, dy, rotary = build(p=0.0, dtype=torch.float64)
    want = step(plain, block, x, dy, rotary)
    block.zero_grad()
    for one, d in zip(x.split(1), dy.split(1), strict=True):
        plain(block, one, rotary).backward(d)
    got = [p.grad for p in block.parameters() if p.requires_grad]
    for one, other in zip(got, want[2:], strict=True):
        torch.testing.assert_close(one, other)


class _HostSync(Exception):
    pass


class _Watch(TorchDispatchMode):
    """Raises at operations whose result, or its shape, the host must wait for."""

    refused = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if by_mask or name in self.refused:
            raise _HostSync(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync(monkeypatch):
    """Kernels are not run, only launched; any look at the values of a tensor raises.

    What a stream under capture does not allow either: a value that goes to the host.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launches = []
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: launches.append(self.fn.__name__),
    )

    def refuse(name):
        def look(*args, **kwargs):
            raise _HostSync(name)

        return look

    for name in ("tolist", "numpy", "cpu"):  # these call no operation on a CPU tensor
        monkeypatch.setattr(torch.Tensor, name, refuse(name))
    with _Watch():
        yield launches


@pytest.mark.skipif(not _backend.interpreting(), reason="on a card the graph itself is captured")
@pytest.mark.parametrize("strategy", [name for name in planner.STRATEGIES if name != "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_triton_never_waits_for_the_device(strategy, dtype, no_host_sync):
    layer = LoRALinear(24, 40, r=5, lora_dropout=0.2, dtype=dtype)
    x, dy = torch.randn(12, 24, dtype=dtype, requires_grad=True), torch.randn(12, 40, dtype=dtype)
    with use_backend("triton"), planner.use_strategy(strategy):
        layer(x).backward(dy)
    assert len(no_host_sync) >= 3
    assert all(p.grad is not None for p in layer.adapters.parameters())


@pytest.mark.skipif(not _backend.interpreting(), reason="as above")
def test_a_look_at_a_value_would_be_seen(no_host_sync):
    one = torch.ones(1)
    for look in (one.item, one.tolist, one.nonzero, lambda: bool(one), lambda: one[one > 0]):
        with pytest.raises(_HostSync):
            look()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_draws_a_new_mask_at_every_replay():
    torch.manual_seed(0)
    layer = LoRALinear(256, 256, r=16, lora_dropout=0.5, device="cuda", dtype=torch.bfloat16)
    nn.init.normal_(layer.adapters["default"].lora_B)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = (x, *layer.adapters.parameters())

    def run():
        y = layer(x)
        return y, torch.autograd.grad(y, inputs, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = run()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append((y.clone(), [g.clone() for g in grads]))
    assert not torch.equal(seen[0][0], seen[1][0])
    for y, grads in seen:
        assert bool(y.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)
