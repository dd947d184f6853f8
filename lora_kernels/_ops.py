"""Every op's schema, and with its fake kernel its definition: the machine surface of the package.

``lora_kernels::<op>`` is opaque to tracers; which backend computes it is decided when it runs.
``lora_kernels::cpp_<op>`` and ``lora_kernels::cuda_<op>`` have the same schema and are implemented in
``csrc/``.

Shapes: M rows (tokens), K in features, N out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._fakes import FAKES, in_place

NAMESPACE = "lora_kernels"

# Slots of one adapter that one tile of a plan has.
TILE_SLOTS = 16
# What `multi_lora_linear_add` knows of each linear in its table: the addresses of A's and B's pages, of
# pages, spans and scalings; the row strides of A's and B's pages; N; the first column in y.
TABLE_WIDTH = 9

# The gradients that `lora_linear_backward` can return; its `needs` has one flag for each.
GRADS = ("x", "lora_a", "lora_b", "gate", "x_lora")

# GELU by the error function, and by tanh.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

SCHEMAS = {
    # One int64 drawn from torch's generator of the device of `like`.
    "dropout_seed": "(Tensor like) -> Tensor",
    # Packed keep bits, uint8 [rows, ceil(cols/8)]: bit k%8 of byte k//8 is column k.
    "dropout_mask": "(Tensor seed, SymInt rows, SymInt cols, float dropout_p) -> Tensor",
    # y [M,N], h = drop(x_lora or x) Aᵀ [M,R], and the keep bits ([0] without dropout). x_lora and A have a
    # width of their own.
    "lora_linear": (
        "(Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? gate,"
        " Tensor? x_lora, Tensor? seed, float scaling, float dropout_p)"
        " -> (Tensor y, Tensor h, Tensor mask)"
    ),
    # The gradients that `needs` asks for, in the order of GRADS. `x` is the input of the branch.
    # `separate`: the branch has an input of its own, so its gradient is `x_lora`'s, not `x`'s.
    "lora_linear_backward": (
        "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? h,"
        " Tensor? gate, Tensor? mask, float scaling, float dropout_p, bool separate, bool[5] needs)"
        " -> Tensor[]"
    ),
    # The keep bits where each row has its own probability, float32 [rows].
    "row_dropout_mask": "(Tensor seed, Tensor dropout_ps, SymInt cols) -> Tensor",
    # The delta [M,N] of rows that use different adapters, and h [S, max_rank], [0, max_rank] where it is
    # not kept. S slots, S/M of them a row; `order` and `offsets` say which slots are whose, `pages` and
    # `spans` which pages.
    "multi_lora_linear": (
        "(Tensor x, Tensor a_pages, Tensor b_pages, Tensor pages, Tensor spans, Tensor coef,"
        " Tensor order, Tensor offsets, Tensor tiles, Tensor? mask, Tensor? keep_scale,"
        " SymInt max_rank, bool keep_h) -> (Tensor delta, Tensor h)"
    ),
    # The gradients of x, a_pages, b_pages and coef that `needs` asks for.
    "multi_lora_linear_backward": (
        "(Tensor dy, Tensor? x, Tensor a_pages, Tensor b_pages, Tensor pages, Tensor spans,"
        " Tensor coef, Tensor order, Tensor offsets, Tensor tiles, Tensor? h, Tensor? mask,"
        " Tensor? keep_scale, SymInt max_rank, bool[4] needs) -> Tensor[]"
    ),
    # y [M,N] and h [M,R] of rows in the order of their experts: those of e from offsets[e] on. weight
    # [E,N,K], A [E,R,K], B [E,N,R], bias [E,N], offsets [E+1].
    "grouped_lora_linear": (
        "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor offsets,"
        " float scaling) -> (Tensor y, Tensor h)"
    ),
    # The gradients of x, weight, A, B and bias that `needs` asks for.
    "grouped_lora_linear_backward": (
        "(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? h, Tensor offsets,"
        " float scaling, bool[5] needs) -> Tensor[]"
    ),
    # ‖w_n + s b_n A‖ for each row n of weight [N,K]: float32, or float64 for float64.
    "low_rank_norm": "(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor",
    # y [M,N], z = drop(x) (W + s B A)ᵀ ([0,N] where it is not kept), h = drop(x) Aᵀ and the keep bits;
    # y = x Wᵀ + b + z ⊙ scale - drop(x) Wᵀ, which without dropout is z ⊙ scale + b.
    "dora_linear": (
        "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, Tensor? bias, Tensor? seed,"
        " float scaling, float dropout_p, bool keep_z) -> (Tensor y, Tensor z, Tensor h, Tensor mask)"
    ),
    # The gradients of x, lora_a, lora_b and scale that `needs` asks for.
    "dora_linear_backward": (
        "(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, Tensor? z,"
        " Tensor? h, Tensor? mask, float scaling, float dropout_p, bool[4] needs) -> Tensor[]"
    ),
    # y = x Wᵀ whose rows do not depend, bit for bit, on the other rows.
    "invariant_linear": "(Tensor x, Tensor weight) -> Tensor",
    # G linears that read one x: y of each, h of each, and the keep bits of those that drop, in order.
    # `seeds` [D]: one for each of the D members whose probability is not zero. A weight that is `None` is
    # quantised: x Wᵀ, and dY W in the backward pass, are added by `quantized_linear`.
    "lora_linear_group": (
        "(Tensor x, Tensor?[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] biases,"
        " Tensor?[] gates, Tensor? seeds, float[] scalings, float[] dropout_ps) -> Tensor[]"
    ),
    # The gradients that `needs` asks for: of x, and then of A, B and g of each member. All members
    # have a dy: one without is left out by the caller.
    "lora_linear_group_backward": (
        "(Tensor[] dys, Tensor? x, Tensor?[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] hs,"
        " Tensor?[] gates, Tensor?[] masks, float[] scalings, float[] dropout_ps, bool[] needs)"
        " -> Tensor[]"
    ),
    # A quantised weight W [rows, cols] is `codes`, `scales`, `nested`, `format` and `block`: see
    # `quant.QuantizedWeight`. W in `dtype`.
    "dequantize": (
        "(Tensor codes, Tensor scales, Tensor? nested, str format, SymInt rows, SymInt cols,"
        " SymInt block, ScalarType dtype) -> Tensor"
    ),
    # out += x Wᵀ, or out += x W with `transpose`.
    "quantized_linear": (
        "(Tensor(a!) out, Tensor x, Tensor codes, Tensor scales, Tensor? nested, str format,"
        " SymInt rows, SymInt cols, SymInt block, bool transpose) -> ()"
    ),
    # As `lora_linear`, over a quantised weight.
    "quantized_lora_linear": (
        "(Tensor x, Tensor codes, Tensor scales, Tensor? nested, Tensor lora_a, Tensor lora_b,"
        " Tensor? bias, Tensor? gate, Tensor? x_lora, Tensor? seed, str format, SymInt block,"
        " float scaling, float dropout_p) -> (Tensor y, Tensor h, Tensor mask)"
    ),
    # act(gate) ⊙ up, all [M,N] of one dtype; `activation` is one of ACTIVATIONS.
    "glu": "(Tensor gate, Tensor up, str activation) -> Tensor",
    "glu_backward": (
        "(Tensor dproduct, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)"
    ),
    # out (+)= (T_G ... T_1) x for gates on the pairs of axes of x [M, *dims]; both padded or cut to Πdims.
    "gate_chain": "(Tensor(a!) out, Tensor x, Tensor[] gates, int[] dims, bool add) -> ()",
    # Fills the gates' gradients, all but those of no elements; x's is added to dx, or written there.
    "gate_chain_backward": (
        "(Tensor dy, Tensor x, Tensor[] gates, int[] dims, Tensor(a!)? dx, bool add, Tensor(b!)[] grads)"
        " -> ()"
    ),
}
# Ops that write into their arguments; csrc/ implements them too.
IN_PLACE = {
    # Adds the deltas of one or several linears that share x into y [M, ΣN], their columns side by side, in
    # two launches for all, or one. Entry i of each list is linear i's; `weights` [S] is one factor a slot;
    # `table` int64 [linears, TABLE_WIDTH] has the addresses and sizes of the lists, where there are several;
    # with `batch_invariant` the kernels are those that a batch of any size gets.
    "multi_lora_linear_add": (
        "(Tensor(a!) y, Tensor x, Tensor[] a_pages, Tensor[] b_pages, Tensor[] pages, Tensor[] spans,"
        " Tensor[] scalings, Tensor? weights, Tensor order, Tensor offsets, Tensor tiles, Tensor? table,"
        " SymInt max_rank, bool batch_invariant) -> ()"
    ),
    # Fills the buffers of a BatchPlan: ids int64 [S], order [S], offsets [adapters + 2], tiles [*, 2].
    "batch_plan": (
        "(Tensor adapter_ids, SymInt adapters, Tensor(a!) ids, Tensor(b!) order, Tensor(c!) offsets,"
        " Tensor(d!) tiles) -> ()"
    ),
    # The others work on a server's stacks [adapters, *, *], one a slice. Segment i is the rows
    # `order[starts[i]:starts[i] + counts[i]]` of adapter `ids[i]`, none where that is negative.
    # h [slices, M, max_rank]; `mapping` [M] is negative for a row without an adapter, whose h is zero.
    "stacked_lora_shrink": (
        "(Tensor x, Tensor[] lora_a, Tensor order, Tensor starts, Tensor counts, Tensor ids,"
        " Tensor mapping, float scaling, Tensor(a!) h) -> ()"
    ),
    # The slices' columns of y from `offset` on are set, or added to; other rows and columns stay.
    "stacked_lora_expand": (
        "(Tensor h, Tensor[] lora_b, Tensor order, Tensor starts, Tensor counts, Tensor ids,"
        " SymInt offset, bool add, Tensor(a!) y) -> ()"
    ),
    # Both. With `ranks` there is one `lora_a`, which has the slices one after the other by that rank.
    "stacked_lora_linear": (
        "(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor? order, Tensor starts, Tensor counts,"
        " Tensor ids, Tensor? ranks, Tensor? scalings, float scaling, SymInt offset, bool add,"
        " Tensor(a!) y) -> ()"
    ),
}
# Ops that csrc/ implements too, under the name `cpp_<op>`.
CPP_OPS = (
    "dora_linear",
    "dora_linear_backward",
    "low_rank_norm",
    "dropout_mask",
    "lora_linear",
    "lora_linear_backward",
    "row_dropout_mask",
    "multi_lora_linear",
    "multi_lora_linear_backward",
    "invariant_linear",
    "lora_linear_group",
    "lora_linear_group_backward",
    "dequantize",
    "quantized_linear",
    "quantized_lora_linear",
    "gate_chain",
    "gate_chain_backward",
)
# Elementwise ops that PyTorch's own vectorised kernels do as well on a CPU.
LEFT_TO_TORCH = ("glu", "glu_backward")
# Ops that are a product of PyTorch's for each expert on every device.
COMPOSED = ("grouped_lora_linear", "grouped_lora_linear_backward")
# Ops that csrc/cuda implements, under the name `cuda_<op>`.
CUDA_OPS = ("multi_lora_linear", "multi_lora_linear_add")
# With the base product in the same launch: what an eager call on a card runs for a few rows.
CUDA_FUSED = (
    "cuda_multi_lora_linear_fused(Tensor x, Tensor weight, Tensor? bias, Tensor a_pages, Tensor b_pages,"
    " Tensor pages, Tensor spans, Tensor scalings, Tensor? weights, Tensor order, Tensor offsets,"
    " Tensor tiles, SymInt max_rank) -> Tensor"
)
# Differentiable in C++: what eager calls on the CPU run. They decompose, so they have no fakes.
CPP_AUTOGRAD = (
    "cpp_lora_linear_autograd(Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? bias,"
    " Tensor? gate, Tensor? x_lora, float scaling, float dropout_p) -> Tensor",
    "cpp_lora_linear_group_autograd(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs,"
    " Tensor?[] biases, Tensor?[] gates, float[] scalings, float[] dropout_ps) -> Tensor[]",
    "cpp_cored_linear_autograd(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor core,"
    " Tensor lora_b, float scaling) -> Tensor",
    "cpp_folded_linear_autograd(Tensor x, Tensor? weight, Tensor? bias, Tensor columns) -> Tensor",
    # Of act(gate) * up.
    "cpp_lora_glu_linear_autograd(Tensor gate, Tensor up, Tensor weight, Tensor lora_a, Tensor lora_b,"
    " Tensor? bias, float scaling, float dropout_p, str activation) -> Tensor",
)
# Flora's step of one float32 matrix; `momentum` [out,r] or [r,in] and `projection` where it is a sketch.
CPP_FLORA = (
    "cpp_flora_step(Tensor(a!) weight, Tensor gradient, Tensor(b!) rows, Tensor(c!) cols,"
    " Tensor(d!)? momentum, Tensor? projection, float lr, float beta1, float beta2, float[2] eps,"
    " float clip, float decay) -> ()"
)

_library = torch.library.Library(NAMESPACE, "DEF")


def register(op: str, function: Callable[..., object]) -> None:
    """Makes ``function`` the kernel of ``lora_kernels::<op>`` on every device."""
    _library.impl(op, function, "CompositeExplicitAutograd")


def _define(op: str, schema: str, fake: Callable[..., object]) -> None:
    random = op == "dropout_seed"
    tags = (torch.Tag.nondeterministic_seeded,) if random else (torch.Tag.pt2_compliant_tag,)
    _library.define(op + schema, tags=tags)
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)


for _op, _schema in SCHEMAS.items():
    _define(_op, _schema, FAKES[_op])
for _op in CPP_OPS:
    _define(f"cpp_{_op}", SCHEMAS[_op], FAKES[_op])
for _op, _schema in IN_PLACE.items():
    _define(_op, _schema, in_place)
    _define(f"cpp_{_op}", _schema, in_place)
for _schema in CPP_AUTOGRAD:
    _library.define(_schema)
_library.define(CPP_FLORA)
for _op in CUDA_OPS:
    _define(f"cuda_{_op}", (SCHEMAS | IN_PLACE)[_op], FAKES.get(_op, in_place))
_library.define(CUDA_FUSED)
