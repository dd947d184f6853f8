"""Several Python threads at once: an op gives what it gives alone, and what cannot be shared is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_schemas import IN_PLACE_SAMPLES, SAMPLES
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_kernels import (
    LoRAConfig,
    LoRAProjection,
    _backend,
    _cpu_ways,
    _extension,
    _ops,
    apply_lora,
    dora_linear,
    lora_linear,
    lora_linear_group,
    lora_mlp,
    multi_lora_linear,
    quantize,
    stack_adapters,
)
from lora_kernels.adapters import call as calls

THREADS = 4
# Sizes of x and y: one row, few, more than are packed at once, and wide ones.
SIZES = ((1, 96, 160), (37, 130, 70), (600, 64, 96), (70, 260, 96))
BF16 = torch.bfloat16

needs_cpp = pytest.mark.skipif(_extension.load() is not None, reason="cpp: no extension")


def normal(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def factors(cols, out, rank=8, grad=True):
    return normal(rank, cols, grad=grad), normal(out, rank, grad=grad)


def with_grads(function, *leaves):
    """A function without arguments that gives y, or several, and the gradients of ``leaves``."""

    def run():
        made = function()
        ys = made if isinstance(made, tuple) else (made,)
        return [*ys, *torch.autograd.grad([y.square().sum() for y in ys], leaves)]

    return run


def lone(rows, cols, out, dtype=torch.float32, weight=None, **options):
    x, (a, b) = normal(rows, cols, dtype=dtype, grad=True), factors(cols, out)
    weight = normal(out, cols, dtype=dtype) if weight is None else weight
    return with_grads(lambda: lora_linear(x, weight, a, b, 2.0, **options), x, a, b)


def quantised(rows, cols, out, format):
    return lone(rows, cols, out, weight=quantize(normal(out, cols), format))


def dora(rows, cols, out):
    x, weight, (a, b) = normal(rows, cols, grad=True), normal(out, cols), factors(cols, out)
    m = normal(out, grad=True)
    return with_grads(lambda: dora_linear(x, weight, a, b, m, 2.0), x, a, b, m)


def group(rows, cols, out):
    x, weights = normal(rows, cols, grad=True), [normal(out, cols), normal(48, cols)]
    pairs = [factors(cols, out), factors(cols, 48)]
    lora_as, lora_bs = zip(*pairs, strict=True)
    return with_grads(lambda: lora_linear_group(x, weights, lora_as, lora_bs), x, *lora_as, *lora_bs)


def mlp(rows, cols, out):
    x, sizes = normal(rows, cols, grad=True), ((cols, out), (cols, out), (out, cols))
    parts = [LoRAProjection(normal(n, k), *factors(k, n), 0.5) for k, n in sizes]
    return with_grads(lambda: lora_mlp(x, *parts), x, *(t for part in parts for t in part[1:3]))


def mixed(rows, cols, out, **options):
    pairs = [factors(cols, out, rank, grad=False) for rank in (3, 16, 5)]
    stack = stack_adapters(*zip(*pairs, strict=True))
    x, weight, ids = normal(rows, cols), normal(out, cols), torch.arange(rows) % 4 - 1
    return lambda: [multi_lora_linear(x, weight, stack, ids, **options)]


CALLS = {
    "lora_linear": lone,
    "bfloat16": lambda *size: lone(*size, dtype=torch.bfloat16),
    "gate": lambda *size: lone(*size, gate=normal(8)),
    "nf4": lambda *size: quantised(*size, "nf4"),
    "int8": lambda *size: quantised(*size, "int8"),
    "dora_linear": dora,
    "lora_linear_group": group,
    "lora_mlp": mlp,
    "multi_lora_linear": mixed,
    "batch_invariant": lambda *size: mixed(*size, batch_invariant=True),
}


def at_once(runs, rounds):
    """What each of ``runs`` gives, time and again, in a thread of its own; all begin together."""
    start = threading.Barrier(len(runs))

    def work(run):
        torch.get_num_threads()  # before which torch's products in a new thread have a count of their own
        start.wait()
        return [run() for _ in range(rounds)]

    with ThreadPoolExecutor(len(runs)) as pool:
        return [done.result() for done in [pool.submit(work, run) for run in runs]]


def assert_as_alone(runs, rounds):
    alone = [run() for run in runs]
    for want, found in zip(alone, at_once(runs, rounds), strict=True):
        for got in found:
            for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
                assert torch.equal(one, other)


@needs_cpp
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_as_alone_whatever_sizes_other_threads_have(name):
    assert_as_alone([CALLS[name](*size) for size in SIZES], rounds=3)


@needs_cpp
@pytest.mark.parametrize("way", _cpu_ways.WAYS)
def test_different_calls_at_once_are_as_alone(way):
    runs = [make(*size) for size in SIZES[1:] for make in CALLS.values()]

    def one_after_another(start):
        return lambda: [run() for run in runs[start:] + runs[:start]]

    with _cpu_ways.forced(way):
        assert_as_alone([one_after_another(i * len(runs) // THREADS) for i in range(THREADS)], rounds=1)


@needs_cpp
@pytest.mark.parametrize("op", (*_ops.CPP_OPS, *IN_PLACE_SAMPLES))
def test_every_op_is_as_alone(op):
    function = _backend.implementation("cpp", op)

    def run():
        found = []
        for args in (SAMPLES | IN_PLACE_SAMPLES)[op].values():
            own = tree_map_only(torch.Tensor, torch.clone, args)  # some ops write into what they are given
            found.append((function(*own), own))
        return [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]

    assert_as_alone([run] * THREADS, rounds=5)


def keeps(p, rows=64, width=32):
    """y is drop(1), and dx of y² is drop(2 y): by one mask."""
    x, eye = torch.ones(rows, width, requires_grad=True), torch.eye(width)
    return with_grads(lambda: lora_linear(x, None, eye, eye, dropout_p=p), x)


@needs_cpp
def test_a_backward_pass_has_the_mask_of_its_own_forward_pass():
    probabilities = (0.1, 0.3, 0.5, 0.7)
    found = at_once([keeps(p) for p in probabilities], rounds=10)
    masks = set()
    for y, dx in (pair for rounds in found for pair in rounds):
        torch.testing.assert_close(2 * y * y.detach().amax(), dx)
        masks.add(y.detach().numpy().tobytes())
    assert len(masks) == 10 * len(probabilities)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x).tanh()


@pytest.fixture
def passing_on():
    """A model whose layers read what the layers before them got."""
    model = nn.Sequential(*(Block() for _ in range(4)))
    options = {"method": "reslora", "method_options": {"mode": "is"}}
    apply_lora(model, LoRAConfig(r=2, target_modules=["fc"], **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_a_forward_pass_within_that_of_another_thread_is_refused(passing_on):
    x, refused = torch.randn(3, 8), []
    want = passing_on(x)

    def other():
        with pytest.raises(RuntimeError, match="side inputs of another thread") as raised:
            passing_on(torch.randn(5, 8))
        refused.append(raised)

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = passing_on[2].register_forward_pre_hook(meanwhile)
    assert torch.equal(passing_on(x), want) and len(refused) == 1
    assert torch.equal(passing_on(x), want)


def test_what_a_thread_left_behind_is_no_hindrance(passing_on):
    x = torch.randn(3, 8)
    want = passing_on(x)
    thread = threading.Thread(target=calls.begin)
    thread.start()
    thread.join()
    left = calls.current_call()
    assert torch.equal(passing_on(x), want)
    calls.end(left)


def test_two_threads_that_begin_at_once_do_not_share_a_call(monkeypatch):
    threads, found, real = [], [], calls.Call

    def second():
        with pytest.raises(RuntimeError, match="side inputs of another thread"):
            calls.begin()
        found.append("refused")

    def made_meanwhile():
        if not threads:  # while the first one begins
            threads.append(threading.Thread(target=second))
            threads[0].start()
            threads[0].join(0.2)
        return real()

    monkeypatch.setattr(calls, "Call", made_meanwhile)
    own = calls.begin()
    threads[0].join()
    assert found == ["refused"] and calls.current_call() is own
    calls.end(own)
