"""Tensor parallelism: styles for ``torch.distributed.tensor.parallel.parallelize_module``.

    parallelize_module(model, mesh, {"up_proj": ColwiseLoRA(), "down_proj": RowwiseLoRA()})

Each process then computes its part of a :class:`LoRALinear` by the same fused call as one process alone; see
``lora_kernels/ops/dtensor.py`` for what is split, what is summed, and how dropout draws its masks. Apply
``fully_shard`` (FSDP2) afterwards, where both are wanted.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from ..adapters import METHODS, Adapter
from . import owned
from .linear import LoRALinear

__all__ = ["ColwiseLoRA", "RowwiseLoRA"]


class ColwiseLoRA(ColwiseParallel):
    """y_p = x W_pᵀ + b_p + s · (drop(x) Aᵀ ⊙ g) B_pᵀ on process p: W, b and B are split by out features.

    ``ColwiseParallel`` for a :class:`LoRALinear`; any other module is handed to it as it is. A is whole on
    every process, its gradient the sum over them; all drop the same elements of x. The arguments are those of
    ``ColwiseParallel``: by default x comes whole and y leaves as each process's local part.

    Raises:
        TypeError: an adapter of a method that does not split.
        RuntimeError: the layer is merged.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(self, module, device_mesh, {"weight": Shard(0), "bias": Shard(0)}, "out")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _apply(self, ColwiseParallel, module, device_mesh)


class RowwiseLoRA(RowwiseParallel):
    """y = Σ_p (x_p W_pᵀ + s · (drop(x_p) A_pᵀ ⊙ g) Bᵀ) + b: W and A are split by in features.

    ``RowwiseParallel`` for a :class:`LoRALinear`; any other module is handed to it as it is. B is whole on
    every process, its gradient the sum over them; each drops elements of its own part of x. The arguments are
    those of ``RowwiseParallel``: by default x comes as each process's local part and y leaves whole.

    Raises:
        TypeError: an adapter of a method that does not split.
        RuntimeError: the layer is merged.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _split(self, module, device_mesh, {"weight": Shard(1), "bias": Replicate()}, "in")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _apply(self, RowwiseParallel, module, device_mesh)


def _apply(
    style: ColwiseLoRA | RowwiseLoRA,
    stock: type[ColwiseParallel] | type[RowwiseParallel],
    module: nn.Module,
    device_mesh: DeviceMesh,
) -> nn.Module:
    """Splits a module, and the versions of its weight that others keep."""
    with owned.set_apart(module) as versions:
        if isinstance(module, LoRALinear):
            _check(module)
            stock._apply(style, module, device_mesh)  # type: ignore[arg-type]
        else:
            _stock(stock, style)._apply(module, device_mesh)
    for version in versions:
        _split_like(version, module, style.src_data_rank)
    return module


def _stock(cls: type[ParallelStyle], style: ParallelStyle) -> ParallelStyle:
    """The style of torch with the same options."""
    plain = cls.__new__(cls)
    plain.__dict__.update(vars(style))
    return plain


def _split_like(version: nn.Module, module: nn.Module, rank: int | None) -> None:
    """Splits the tensors of a version that does not act as those are that act now."""
    for name, parameter in list(version.named_parameters()):
        acting = getattr(module, name)
        if isinstance(acting, DTensor):
            value = distribute_tensor(
                parameter.data, acting.device_mesh, acting.placements, src_data_rank=rank
            )
            setattr(version, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _check(layer: LoRALinear) -> None:
    layer._must_be_unmerged("split the layer")
    for name, adapter in layer.adapters.items():
        if not adapter.splits:
            known = ", ".join(sorted(key for key, cls in METHODS.items() if cls.splits))
            raise TypeError(f"adapter {name!r}: expected a method among {known}, got {adapter.method!r}")


def _split(
    style: ParallelStyle, module: nn.Module, mesh: DeviceMesh, places: dict[str, Placement], side: str
) -> None:
    """Splits the module's own parameters, an adapter's along the features of ``side``; others stay whole."""
    if not isinstance(module, (LoRALinear, Adapter)):
        return
    if isinstance(module, Adapter):
        places = {name: Shard(dim) for name, (along, dim) in module.splits.items() if along == side}
    for name, parameter in list(module.named_parameters(recurse=False)):
        place = places.get(name, Replicate())
        value = distribute_tensor(parameter.data, mesh, [place], src_data_rank=style.src_data_rank)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
