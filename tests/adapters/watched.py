"""What autograd saves, and what is made, while a method runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """The tensors that autograd saves while it is entered."""

    def __init__(self):
        self.tensors: list[torch.Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        self.tensors.append(tensor)
        return tensor

    def elements(self, *known: torch.Tensor) -> int:
        """Of the storages saved, each once, but for those of the ``known`` tensors."""
        skip = {tensor.untyped_storage().data_ptr() for tensor in known}
        sizes = {}
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skip:
                sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return sum(sizes.values())


class Made(TorchDispatchMode):
    """The largest tensor that any op makes while it is entered; views of the ``known`` do not count."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, leaf.numel())
        return result
