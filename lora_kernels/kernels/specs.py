"""Which kernels there are to compile: each at one shape bucket, with the types of its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import _ops
from . import (
    batch_plan,
    dequantize,
    dora_linear,
    dropout,
    gate_chain,
    gather,
    glu,
    invariant_linear,
    kext,
    lora_linear_group,
    low_rank_norm,
    passes,
    quantized_linear,
    single,
    stacked_lora,
)
from .config import (
    DY_PASS_MAX_RANK,
    Tile,
    chain_fits,
    chain_groups,
    chain_tile,
    dy_tile,
    forward_tile,
    group_forward_tile,
    group_x_tile,
    invariant_tile,
    kext_tile,
    norm_tile,
    padded_rank,
    page_tile,
    quantized_tile,
    single_tile,
    x_tile,
)

RANKS = (16, 64, 128, 256, 512)
# Left out where each kernel is compiled once: another variant of the same kernel does more.
_LESSER = {"plain", "sliced", "padded", "nf4", "int8", "fp8", "silu", "gelu", "16-8-8-4"}
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_POINTERS = (
    *("a_ptr", "b_ptr", "c_ptr", "w_ptr", "bias_ptr", "branch_ptr"),
    *("x_ptr", "h_ptr", "y_ptr", "out_ptr", "dy_ptr", "dh_ptr", "dx_ptr"),
)


@dataclass(frozen=True)
class Spec:
    """One kernel at one shape bucket: the types of its pointers, its constants and its tile."""

    kernel: str
    variant: str
    dtype: str
    rank: int
    fn: Any
    constants: dict[str, Any]
    tile: Tile | None
    pointers: dict[str, str]

    def at(self, card: str) -> Spec:
        """The spec for one card, where its tile or its operands depend on it."""
        return self


class DySpec(Spec):
    """The pass over dY, whose strips are narrower on AMD."""

    def at(self, card: str) -> Spec:
        lean = self.variant == "scaled" or card.startswith("gfx")
        tile = dy_tile(8192, 4096, self.rank, _ITEMSIZE[self.dtype], lean)
        return dataclasses.replace(self, tile=tile)


class ChainSpec(Spec):
    """The gradients of a chain's gates: of more gates at once from sm_90 on, with fewer warps on AMD."""

    def at(self, card: str) -> Spec:
        dims = tuple(map(int, self.variant.split("-")))
        sizes = [j * i for _, j, _, i, _ in gate_chain.views(dims, 1)]
        groups = chain_groups(sizes, [True] * len(sizes), card in ("sm_90", "sm_100"))
        first, last = groups[len(groups) // 2]
        tile = chain_tile(8192, dims, _ITEMSIZE[self.dtype], True, card.startswith("gfx"))
        constants = {**self.constants, "FIRST": first, "LAST": last}
        return dataclasses.replace(self, tile=tile, constants=constants)


class GemmSpec(Spec):
    """The persistent GEMM: descriptors in place of the large operands' pointers on cards that have them."""

    def at(self, card: str) -> Spec:
        tile = kext_tile(8192, self.rank, _ITEMSIZE[self.dtype], card)
        described = card.startswith("sm_") and int(card[3:]) >= 90
        along_k = self.variant == "forward"
        constants = {**self.constants, "DESCRIPTORS": described, "ROWS_ALONG_K": along_k}
        constants |= {name: 1 for name in (("stride_cr",) if along_k else ("stride_wn", "stride_cn"))}
        types = dict(self.pointers)
        if described:
            w_block = (tile.block_c, tile.block_k) if along_k else (tile.block_k, tile.block_c)
            blocks = {
                "a_ptr": (tile.block_m, tile.block_k),
                "w_ptr": w_block,
                "out_ptr": (tile.block_m, tile.block_c),
            }
            types |= {n: f"tensordesc<{self.dtype}[{m},{c}]>" for n, (m, c) in blocks.items()}
        return dataclasses.replace(self, constants=constants, tile=tile, pointers=types)


def specs(
    dtypes: tuple[str, ...] = ("bf16",), ranks: tuple[int, ...] = RANKS, once: bool = False
) -> Iterator[Spec]:
    """Every kernel in the variants that carry most: bias and dropout, all gradients; and the gate.

    ``once``: without those that another one of the same kernel outdoes.
    """
    for spec in _all_specs(dtypes, ranks):
        if not (once and spec.variant in _LESSER):
            yield spec


def _all_specs(dtypes: tuple[str, ...], ranks: tuple[int, ...]) -> Iterator[Spec]:
    for dtype in dtypes:
        for rank in ranks:
            yield from _linear_specs(dtype, rank)
            yield from _strategy_specs(dtype, rank)
            yield from _multi_specs(dtype, rank)
            yield from _group_specs(dtype, rank)
            yield from _dora_specs(dtype, rank)
            yield from _stacked_specs(dtype, rank)
            yield from _quantized_specs(dtype, rank)
        yield from _elementwise_specs(dtype)
        yield from _batch_specs(dtype)
        yield from _chain_specs(dtype)
    yield Spec(
        "sum_parts", "", "fp32", 0, passes.sum_parts_kernel, {"BLOCK": 1024}, None, {"out_ptr": "*bf16"}
    )
    pointers = {"mask_ptr": "*u8", "seed_ptr": "*i64", "limit_ptr": "*i64"}
    for variant in ("", "rows"):
        constants = {"PER_ROW": variant == "rows", "BLOCK_M": 16, "BLOCK_C": 128}
        yield Spec("dropout_mask", variant, "u8", 0, dropout.dropout_mask_kernel, constants, None, pointers)


def _linear_specs(dtype: str, rank: int) -> Iterator[Spec]:
    itemsize = _ITEMSIZE[dtype]
    element = f"*{dtype}"
    forward = forward_tile(8192, rank, itemsize)
    precision = {"PRECISION": "tf32"}
    pointers = {"seed_ptr": "*i64", "mask_ptr": "*u8", "gate_ptr": "*fp32"}
    partials = {"u_part_ptr": "*fp32", "db_part_ptr": "*fp32", "da_part_ptr": "*fp32"}
    types = {**dict.fromkeys(_POINTERS, element), **pointers, **partials}
    for variant, dropout_on, gate in (
        ("plain", False, False),
        ("dropout", True, False),
        ("gate", False, True),
    ):
        flags = {"HAS_BIAS": True, "HAS_GATE": gate, "DROPOUT": dropout_on, "EXPAND": True, **precision}
        yield Spec("forward", variant, dtype, rank, passes.lora_forward_kernel, flags, forward, types)
    for variant, gate in (("plain", False), ("gate", True)):
        flags = {"HAS_GATE": gate, "NEED_DB": True, **precision}
        if rank <= DY_PASS_MAX_RANK:
            yield DySpec("dy_pass", variant, dtype, rank, passes.dy_pass_kernel, flags, None, types)
    for variant, dropout_on in (("plain", False), ("dropout", True)):
        flags = {"DROPOUT": dropout_on, "NEED_DX": True, "NEED_DA": True, **precision}
        yield Spec("x_pass", variant, dtype, rank, passes.x_pass_kernel, flags, x_tile(rank, itemsize), types)


def _dora_types(dtype: str) -> dict[str, str]:
    names = (*_POINTERS, "w_ptr", "z_ptr", "scaled_ptr", "dropped_ptr", "rest_ptr", "sum_ptr")
    wide = dict.fromkeys(("out_ptr", "gate_ptr", "factor_ptr", "scale_ptr", "dscale_part_ptr"), "*fp32")
    return {**dict.fromkeys(names, f"*{dtype}"), **wide, "mask_ptr": "*u8"}


def _dora_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """The row norms, and the pass over dY with all that an output scale asks for."""
    itemsize, types = _ITEMSIZE[dtype], _dora_types(dtype)
    flags = {"PRECISION": "tf32", "stride_wk": 1}
    tile = norm_tile(rank, itemsize)
    yield Spec("low_rank_norm", "", dtype, rank, low_rank_norm.low_rank_norm_kernel, flags, tile, types)
    flags = {"HAS_GATE": False, "NEED_DB": True, "SCALED": True, "NEED_DSCALE": True, "PRECISION": "tf32"}
    yield DySpec("dy_pass", "scaled", dtype, rank, passes.dy_pass_kernel, flags, None, types)


def _elementwise_specs(dtype: str) -> Iterator[Spec]:
    """DoRA's passes that know no rank."""
    block = {"ROWS": dora_linear._ROWS, "COLS": dora_linear._COLS}
    for kernel, fn, constants in (
        ("scale", dora_linear.scale_kernel, {**block, "HAS_BIAS": True}),
        ("split", dora_linear.split_kernel, block),
        ("add_kept", dora_linear.add_kept_kernel, block),
    ):
        yield Spec(kernel, "", dtype, 0, fn, constants, None, _dora_types(dtype))
    yield from _glu_specs(dtype)


def _glu_specs(dtype: str) -> Iterator[Spec]:
    names = ("dy_ptr", "gate_ptr", "up_ptr", "out_ptr", "dgate_ptr", "dup_ptr")
    types = dict.fromkeys(names, f"*{dtype}")
    for activation in _ops.ACTIVATIONS:
        constants = {"ACTIVATION": activation, "BLOCK": glu._BLOCK}
        for kernel, fn in (("glu", glu.glu_kernel), ("glu_backward", glu.glu_backward_kernel)):
            yield Spec(kernel, activation, dtype, 0, fn, constants, None, types)


def _strategy_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """kext's GEMM in both directions, and single. Wider ranks are further turns of kext's loop over
    ranks, and no work for single.
    """
    if rank > 128:
        return
    types = {**dict.fromkeys(_POINTERS, f"*{dtype}"), "mask_ptr": "*u8"}
    types |= {"gate_ptr": "*fp32", "seed_ptr": "*i64"}
    for variant, backward in (("forward", False), ("backward", True)) if rank <= 64 else ():
        flags = {"HAS_BIAS": not backward, "HAS_GATE": False, "DROPOUT": backward, "PRECISION": "tf32"}
        yield GemmSpec("kext", variant, dtype, rank, kext.kext_kernel, flags, None, types)
    flags = {"SEPARATE": False, "HAS_BIAS": True, "HAS_GATE": False, "PRECISION": "tf32"}
    for variant, dropout_on in (("plain", False), ("dropout", True)):
        tile = single_tile(16, rank, _ITEMSIZE[dtype])
        constants = {**flags, "DROPOUT": dropout_on}
        yield Spec("single", variant, dtype, rank, single.single_kernel, constants, tile, types)


def _multi_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """The multi-adapter kernels; their tile stops growing at rank 32, and so do these."""
    if rank > 64:
        return
    element = f"*{dtype}"
    integers = dict.fromkeys(("pages_ptr", "spans_ptr", "order_ptr", "offsets_ptr", "tiles_ptr"), "*i32")
    data = dict.fromkeys(("x_ptr", "page_ptr", "h_ptr", "out_ptr", "vector_ptr"), element)
    types = {**integers, **data, "mask_ptr": "*u8"}
    for variant, masked in (("plain", False), ("dropout", True)):
        tile = page_tile(4096, rank, _ITEMSIZE[dtype], masked)
        flags = {"HAS_MASK": masked, "PRECISION": "tf32"}
        table = {"SLICED": False, "ALIGNED": False}
        expand = {**flags, **table, "HAS_COEF": True, "HAS_SCALE": masked, "ADD": False, "WRITE_H": True}
        for kernel, fn, constants in (
            ("gather_shrink", gather.gather_shrink_kernel, {**flags, **table}),
            ("gather_expand", gather.gather_expand_kernel, expand),
            ("page_grad", gather.page_grad_kernel, flags),
        ):
            yield Spec(kernel, variant, dtype, rank, fn, constants, tile, types)
    yield from _sliced_specs(dtype, rank, types)


def _sliced_specs(dtype: str, rank: int, types: dict[str, str]) -> Iterator[Spec]:
    """The kernels of decode, for several linears in one launch."""
    tile, types = page_tile(4096, rank, _ITEMSIZE[dtype]), {**types, "table_ptr": "*i64"}
    flags = {"HAS_MASK": False, "PRECISION": "tf32", "SLICED": True, "ALIGNED": True}
    expand = {**flags, "HAS_COEF": False, "HAS_SCALE": False, "ADD": True, "WRITE_H": False}
    shrink_fn, expand_fn = gather.gather_shrink_kernel, gather.gather_expand_kernel
    yield Spec("gather_shrink", "sliced", dtype, rank, shrink_fn, flags, tile, types)
    yield Spec("gather_expand", "sliced", dtype, rank, expand_fn, expand, tile, types)


def _batch_specs(dtype: str) -> Iterator[Spec]:
    """The base product that no batch changes, and the plan of the largest batch."""
    tile, element = invariant_tile(_ITEMSIZE[dtype]), f"*{dtype}"
    types = {"x_ptr": element, "w_ptr": element, "y_ptr": element}
    kernel, flags = invariant_linear.invariant_linear_kernel, {"PRECISION": "tf32"}
    yield Spec("invariant_linear", "", dtype, 0, kernel, flags, tile, types)
    integers = dict.fromkeys(("order_ptr", "offsets_ptr", "tiles_ptr"), "*i32")
    types = {**integers, "given_ptr": "*i64", "ids_ptr": "*i64"}
    most = batch_plan.sizes(batch_plan.MAX_SLOTS, batch_plan.MAX_ADAPTERS - 2)
    yield Spec("batch_plan", "", dtype, 0, batch_plan.batch_plan_kernel, most, None, types)


def _chain_specs(dtype: str) -> Iterator[Spec]:
    """A chain of gates on tokens of 4096 places, and a launch for gradients of its gates."""
    types = dict.fromkeys(("x_ptr", "dy_ptr", "out_ptr", "gate_ptrs"), f"*{dtype}") | {"part_ptr": "*fp32"}
    itemsize = _ITEMSIZE[dtype]
    for dims in ((8, 8, 8, 8), (16, 8, 8, 4)):
        if not chain_fits(dims, itemsize):
            continue
        name, tile = "-".join(map(str, dims)), chain_tile(8192, dims, itemsize)
        flags = {**gate_chain.constants(dims, tile, torch.bfloat16), "TRANSPOSE": False, "ADD": True}
        yield Spec("gate_chain", name, dtype, 0, gate_chain.gate_chain_kernel, flags, tile, types)
        flags = gate_chain.constants(dims, chain_tile(8192, dims, itemsize, backward=True), torch.bfloat16)
        yield ChainSpec("gate_grads", name, dtype, 0, gate_chain.gate_grads_kernel, flags, None, types)


def _group_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """The kernels of three linears that share x, up to the width that one launch serves."""
    members, itemsize = 3, _ITEMSIZE[dtype]
    if members * padded_rank(rank) > lora_linear_group.MAX_WIDTH:
        return
    types = {"seed_ptr": "*i64", "mask_ptrs": "*u8", "gate_ptrs": "*fp32", "da_part_ptrs": "*fp32"}
    names = ("x_ptr", "a_ptrs", "b_ptrs", "bias_ptrs", "h_ptrs", "y_ptrs", "dh_ptrs", "dx_ptr")
    types |= dict.fromkeys(names, f"*{dtype}")
    common = {"MEMBERS": members, "PRECISION": "tf32"}
    for variant, drops in (("plain", False), ("dropout", True)):
        flags = {**common, "HAS_BIAS": True, "HAS_GATE": False, "DROPOUT": drops}
        tile = group_forward_tile(8192, members, rank, itemsize, drops)
        fn = lora_linear_group.group_forward_kernel
        yield Spec("group_forward", variant, dtype, rank, fn, flags, tile, types)
        flags = {**common, "DROPOUT": drops, "NEED_DX": True, "NEED_DA": True}
        tile = group_x_tile(members, rank, itemsize, drops)
        fn = lora_linear_group.group_x_pass_kernel
        yield Spec("group_x_pass", variant, dtype, rank, fn, flags, tile, types)


def _stacked_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """A server's stacks: vLLM's with several slices, SGLang's with each adapter's own rank."""
    if rank > 64:
        return
    integers = dict.fromkeys(("order_ptr", "starts_ptr", "counts_ptr", "ids_ptr", "ranks_ptr"), "*i32")
    data = dict.fromkeys(("x_ptr", "stack_ptr", "out_ptr"), f"*{dtype}")
    types = {**integers, **data, "places_ptr": "*i64", "mapping_ptr": "*i32"}
    tile = page_tile(4096, rank, _ITEMSIZE[dtype])
    for variant, own in (("padded", False), ("ranks", True)):
        flags = {"HAS_ORDER": True, "HAS_RANKS": own, "ALIGN": 8, "SEGMENTS": 64, "PRECISION": "tf32"}
        expand = {**flags, "HAS_SCALINGS": own, "ADD": True, "EIGHTS": own}
        yield Spec(
            "stacked_shrink", variant, dtype, rank, stacked_lora.stacked_shrink_kernel, flags, tile, types
        )
        yield Spec(
            "stacked_expand", variant, dtype, rank, stacked_lora.stacked_expand_kernel, expand, tile, types
        )
    yield Spec(
        "stacked_sum",
        "",
        dtype,
        rank,
        stacked_lora.stacked_sum_kernel,
        {"BLOCK": rank},
        None,
        types | {"out_ptr": "*fp32"},
    )


# Format, whether its scales are quantised, and the types of codes and scales.
_QUANTIZED = {
    "nf4": ("nf4", False, "*u8", "*fp32"),
    "nf4-double": ("nf4", True, "*u8", "*u8"),
    "int8": ("int8", False, "*i8", "*fp32"),
    "fp8": ("fp8", False, "*u8", "*fp32"),
}


def _quantized_specs(dtype: str, rank: int) -> Iterator[Spec]:
    """Decoding a weight, and the linear that decodes it in the tile, up to the rank that it takes."""
    element = f"*{dtype}"
    for variant, (format, nested, codes, scales) in _QUANTIZED.items():
        types = dict.fromkeys((*_POINTERS, "out_ptr"), element) | {"codes_ptr": codes, "scales_ptr": scales}
        weight = {"FORMAT": format, "SCALE_BLOCK": 64, "NESTED": nested, "PAIRED": True}
        if rank == RANKS[0] or (rank == 64 and nested):  # the widest branch with what takes most registers
            tile = quantized_tile(16, rank, _ITEMSIZE[dtype])
            flags = {"BRANCH": True, "HAS_BIAS": True, "HAS_GATE": False, "ADD": False, "PRECISION": "tf32"}
            fused = quantized_linear.quantized_linear_kernel
            constants = {**weight, **flags, "BLOCK_N": tile.block_n}
            yield Spec("quantized", variant, dtype, rank, fused, constants, tile, types)
        if rank == RANKS[0]:
            constants = {**weight, "BLOCK_N": dequantize.DEQUANTIZE_ROWS}
            constants["BLOCK_C"] = dequantize.DEQUANTIZE_COLS
            yield Spec("dequantize", variant, dtype, 0, dequantize.dequantize_kernel, constants, None, types)
