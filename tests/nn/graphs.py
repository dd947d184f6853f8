"""A compiler that runs the graphs of ``torch.compile`` as they are and notes our ops in each."""

from __future__ import annotations

import functools

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint


class Graphs:
    """``torch.compile(model, backend=Graphs())``; ``ops[i]`` are the names in the i-th graph."""

    def __init__(self):
        self.ops, self.targets = [], []
        self._backend = aot_autograd(fw_compiler=self._note)

    def __call__(self, graph, inputs, **options):
        return self._backend(graph, inputs)

    def _note(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.targets.append(targets)
        self.ops.append([t.split(".")[1] for t in targets if t.startswith("lora_kernels.")])
        return make_boxed_func(graph.forward)

    def count(self, op):
        """How often an op is in the graph of the forward pass."""
        return self.ops[0].count(op)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return 2 * dy * y * y


@functools.cache
def makes_functions_again():
    """Whether this torch's ``checkpoint``, compiled, makes again what a Function saved, any Function.

    2.11 does not: it marks what stands in the checkpoint itself, and not what a Function in it does.
    """
    torch._dynamo.reset()
    graphs = Graphs()
    run = torch.compile(lambda x: checkpoint(_Square.apply, x, use_reentrant=False), backend=graphs)
    run(torch.ones(2, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    return "aten.exp.default" in graphs.targets[1]
