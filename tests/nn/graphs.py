"""A compiler that runs the graphs of ``torch.compile`` as they are and notes our ops in each."""

from __future__ import annotations

from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func


class Graphs:
    """``torch.compile(model, backend=Graphs())``; ``ops[i]`` are the names in the i-th graph."""

    def __init__(self):
        self.ops = []
        self._backend = aot_autograd(fw_compiler=self._note)

    def __call__(self, graph, inputs, **options):
        return self._backend(graph, inputs)

    def _note(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        self.ops.append([t.split(".")[1] for t in targets if t.startswith("lora_kernels.")])
        return make_boxed_func(graph.forward)

    def count(self, op):
        """How often an op is in the graph of the forward pass."""
        return self.ops[0].count(op)
