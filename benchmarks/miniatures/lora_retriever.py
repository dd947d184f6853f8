"""LoraRetriever: the adapters of a mixed batch found by what their inputs look like."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.nn import LoRALinear, mixed_adapters
from lora_kernels.routing import AdapterIndex

from ._tasks import RANK, copy_of, error, lora, tasks

CLAIM = (
    "three tasks: the retrieved adapter leaves what each task's own leaves, a tenth of what their mean leaves"
)
COUNT = 3


def run(seed: int) -> dict[str, float]:
    """The part of the error that is left with its own adapter, the retrieved one, and all of them."""
    toy = tasks(seed, COUNT)
    names = [str(i) for i in range(COUNT)]
    layer = LoRALinear.from_linear(copy_of(toy.linear), r=RANK, lora_alpha=RANK, adapter_name="0")
    for i, name in enumerate(names):
        if i:
            layer.add_adapter(name, LoRAConfig(RANK, lora_alpha=RANK))
        layer.adapters[name].load_state_dict(lora(toy, RANK, i)[0].adapters["default"].state_dict())
    model = nn.Sequential(layer)
    # A sample's number is its text, and its embedding the mean of its tokens.
    index = AdapterIndex(lambda texts: toy.x[[int(t.split()[-1]) for t in texts]].mean(1), cosine=True)
    for i, name in enumerate(names):
        index.add(name, [str(int(n)) for n in (toy.task == i).nonzero()[:4]])
    queries = [str(n) for n in range(len(toy.x))]
    found, every = index.search(queries, 1), index.search(queries, COUNT)

    def left(own: list[list[str]], weights: torch.Tensor) -> float:
        with mixed_adapters(model, own, weights=weights, batch_dim=0):
            return error(model(toy.x), toy)

    ones = torch.ones(len(toy.x), 1)
    return {
        "own": left([[names[t]] for t in toy.task.tolist()], ones),
        "retrieved": left(found.names, found.weights),
        "mean of all": left(every.names, every.weights),
    }


def holds(figures: list[dict[str, float]]) -> bool:
    """Both, in every seed."""
    return all(
        one["retrieved"] < 1.5 * one["own"] + 1e-3 and one["retrieved"] < 0.1 * one["mean of all"]
        for one in figures
    )
