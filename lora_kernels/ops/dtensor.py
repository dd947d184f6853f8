"""``lora_linear`` on DTensors: each process runs the one op on its shards.

Along each dimension of the device mesh the factors say what is split:

column   W, b and B by out features, A whole. x is whole; y is split by features. dX and dA are sums over
         the processes.
row      W and A by in features, B and b whole. x is split by features; so is h, as a sum, and y with it:
         y = Σ_p (x_p W_pᵀ + s · (drop(x_p) A_pᵀ ⊙ g) Bᵀ). dB is a sum over the processes.
whole    nothing is split but perhaps rows of x; then the gradients of all factors are sums.

Dropout: where processes hold the same x they must drop the same elements, so they take the seed of the
first of them (a broadcast of eight bytes); where each holds a part, its place goes into the seed. That
holds whether or not the processes were seeded alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .._arguments import LoraInputs
from . import _dispatch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# An odd number far from 0 in every byte, so that neighbouring places have unlike seeds.
_STEP = 0x9E3779B97F4A7C15
_TENSORS = ("x", "weight", "lora_a", "lora_b", "bias", "gate", "x_lora")
_WHOLE, _ROWS, _COLS = Replicate(), Shard(0), Shard(1)


class Layout(NamedTuple):
    """Along one dimension of the mesh: where each tensor lies, and its gradient, and y."""

    x: Placement
    dx: Placement
    weight: Placement
    lora_a: Placement
    d_lora_a: Placement
    lora_b: Placement
    d_lora_b: Placement
    bias: Placement
    d_bias: Placement
    d_gate: Placement
    y: Placement

    @property
    def d_weight(self) -> Placement:
        return self.d_bias if self.weight == _WHOLE else self.weight


def column(dims: int) -> Layout:
    """Split by out features; x has ``dims`` dimensions."""
    return Layout(
        *(_WHOLE, Partial(), _ROWS, _WHOLE, Partial(), _ROWS, _ROWS, _ROWS, _ROWS),
        *(Partial(), Shard(dims - 1)),
    )


def row(dims: int) -> Layout:
    """Split by in features."""
    last = Shard(dims - 1)
    return Layout(last, last, _COLS, _COLS, _COLS, _WHOLE, Partial(), _WHOLE, Partial(), Partial(), Partial())


def whole(x: Placement) -> Layout:
    """Nothing of the layer is split; x may be, by rows."""
    grad = Partial() if isinstance(x, Shard) else _WHOLE
    return Layout(x, x, _WHOLE, _WHOLE, grad, _WHOLE, grad, _WHOLE, grad, grad, x)


def checked(tensors: dict[str, Tensor | None]) -> dict[str, DTensor | None]:
    """The tensors, x first, all known to be DTensors on one mesh.

    Raises:
        TypeError: some are DTensors and others are not.
        ValueError: they are on different meshes.
    """
    found: dict[str, DTensor | None] = {}
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, DTensor):
            raise TypeError(f"{name}: expected a DTensor as other tensors are, got {type(tensor).__name__}")
        first = found.get("x")
        if tensor is not None and first is not None and tensor.device_mesh != first.device_mesh:
            raise ValueError(f"{name}: expected x's mesh {first.device_mesh}, got {tensor.device_mesh}")
        found[name] = tensor
    return found


def layouts(x: DTensor, weight: DTensor | None, lora_a: DTensor, lora_b: DTensor) -> list[Layout]:
    """The layout along each dimension of the mesh.

    Raises:
        ValueError: the layer is split in a way that is none of the three.
    """
    parts = [[None] * x.device_mesh.ndim if t is None else t.placements for t in (weight, lora_a, lora_b)]
    return [_layout(x, *along) for along in zip(x.placements, *parts, strict=True)]


def _layout(
    x: DTensor, place: Placement, weight: Placement | None, lora_a: Placement, lora_b: Placement
) -> Layout:
    if (lora_a, lora_b) == (_WHOLE, _ROWS) and weight in (None, _ROWS):
        return column(x.dim())
    if (lora_a, lora_b) == (_COLS, _WHOLE) and weight in (None, _COLS):
        return row(x.dim())
    if (lora_a, lora_b) == (_WHOLE, _WHOLE) and weight in (None, _WHOLE):
        by_rows = isinstance(place, Shard) and place.dim % x.dim() != x.dim() - 1
        return whole(place if by_rows else _WHOLE)
    raise ValueError(
        "weight: expected a layer split by out features (weight and lora_b Shard(0), lora_a Replicate()),"
        " by in features (weight and lora_a Shard(1), lora_b Replicate()) or not at all, got"
        f" weight {weight}, lora_a {lora_a}, lora_b {lora_b}"
    )


def on_shards(compute: Callable[[LoraInputs], Tensor], inputs: LoraInputs) -> DTensor:
    """y of ``lora_linear`` for DTensors; a sum over processes is left as ``Partial()``.

    ``compute``: ``lora_linear`` on the tensors of one process.
    """
    given = checked({name: getattr(inputs, name) for name in _TENSORS})
    x, a, b = given["x"], given["lora_a"], given["lora_b"]
    assert x is not None and a is not None and b is not None
    along = layouts(x, given["weight"], a, b)
    mesh = x.device_mesh

    def local(name: str, place: str, grad: str) -> Tensor | None:
        tensor = given[name]
        places, grads = ([getattr(one, key) for one in along] for key in (place, grad))
        return None if tensor is None else _local(tensor, places, grads)

    inner = local("x", "x", "dx")
    y = compute(
        inputs._replace(
            x=inner,
            weight=local("weight", "weight", "d_weight"),
            lora_a=local("lora_a", "lora_a", "d_lora_a"),
            lora_b=local("lora_b", "lora_b", "d_lora_b"),
            bias=_once(local("bias", "bias", "d_bias"), along, mesh),
            gate=_local_gate(given["gate"], along),
            x_lora=local("x_lora", "x", "dx"),
            seed=_seed(inner, along, mesh) if inputs.dropout_p > 0.0 else None,
        )
    )
    shape = torch.Size((*x.shape[:-1], b.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    places = [one.y for one in along]
    return DTensor.from_local(y, mesh, places, run_check=False, shape=shape, stride=stride)


def _local(tensor: DTensor, places: list[Placement], grads: list[Placement]) -> Tensor:
    """The own part, laid where it should lie; its gradient comes back as the parameter lies."""
    if list(tensor.placements) != places or grads != places:
        # Also without a move: its backward pass is what adds a gradient up over the processes.
        tensor = tensor.redistribute(placements=places)
    return tensor.to_local(grad_placements=grads)


def _local_gate(gate: DTensor | None, along: list[Layout]) -> Tensor | None:
    if gate is None:
        return None
    grads = [one.d_gate for one in along]
    if gate.dim() == 1:
        return _local(gate, [_WHOLE for _ in along], grads)
    places = [one.x if one.x == one.y else _WHOLE for one in along]
    return _local(
        gate, places, [p if isinstance(p, Shard) else g for p, g in zip(places, grads, strict=True)]
    )


def _once(bias: Tensor | None, along: list[Layout], mesh: DeviceMesh) -> Tensor | None:
    """Where y is a sum over processes, b is in it once; all keep their part in its gradient."""
    if bias is None:
        return None
    summed = [dim for dim, one in enumerate(along) if one.y.is_partial()]
    return bias if all(mesh.get_local_rank(dim) == 0 for dim in summed) else bias * 0


def _seed(x: Tensor, along: list[Layout], mesh: DeviceMesh) -> Tensor:
    """One seed where x is the same, another where it is another part."""
    seed = _dispatch.draw_seed(x)
    place = 0
    for dim, one in enumerate(along):
        if isinstance(one.x, Shard):
            place = place * mesh.size(dim) + mesh.get_local_rank(dim)
        else:
            seed = collectives.wait_tensor(collectives.broadcast(seed, 0, (mesh, dim)))
    step = (place * _STEP + 2**63) % 2**64 - 2**63
    return seed + step if place else seed
