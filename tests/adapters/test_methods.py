"""What each method promises by itself; the invariants of all are in ``test_invariants.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import IN, OUT, RANK, new_layer, shake
from torch import nn

from lora_kernels.adapters import LoRAConfig, make
from lora_kernels.nn import LoRALinear


def test_unknown_method_lists_those_there_are():
    with pytest.raises(ValueError, match=r"method: expected one of .*dora, .*lora, lora_fa, .*'nope'"):
        LoRAConfig(method="nope")


def test_rslora_scale():
    assert new_layer("lora").adapters["default"].scaling == 6 / RANK
    assert new_layer("lora", use_rslora=True).adapters["default"].scaling == 6 / math.sqrt(RANK)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_initialisations(init):
    torch.manual_seed(0)
    adapter = make(256, 64, LoRAConfig(r=16, init_lora_weights=init))
    a, b = adapter.lora_A.detach(), adapter.lora_B.detach()
    assert (b.abs().max() > 0) == (init is False)
    if init == "gaussian":
        assert a.std() == pytest.approx(1 / 16, rel=0.1)
    else:  # U(-1/√in, 1/√in)
        assert a.abs().max() <= 1 / 16
        assert a.std() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.1)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """The shapes of what autograd saves while it is entered."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor


@pytest.mark.parametrize("method,saves_x", [("lora_fa", False), ("lora", True)])
def test_a_frozen_down_projection_saves_no_input(method, saves_x):
    rows = 37
    layer = new_layer(method)
    x = torch.randn(rows, IN, dtype=torch.float64, requires_grad=True)
    with SavedTensors() as saved:
        y = layer(x)
    assert ((rows, IN) in saved.shapes) == saves_x
    assert (rows, RANK) in saved.shapes
    y.sum().backward()
    assert layer.adapters["default"].lora_B.grad is not None


def test_dora_scales_rows_of_the_sum():
    layer = shake(new_layer("dora"))
    adapter = layer.adapters["default"]
    total = layer.weight + adapter.delta()
    want = adapter.lora_magnitude_vector[:, None] * total / total.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.merged_weight(), want)
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), adapter.lora_magnitude_vector.abs())


def test_dora_by_either_name():
    for config in (LoRAConfig(use_dora=True), LoRAConfig(method="dora")):
        assert config.method == "dora" and config.use_dora
    assert not LoRAConfig().use_dora
    with pytest.raises(ValueError, match="use_dora: expected False for the method 'sora'"):
        LoRAConfig(use_dora=True, method="sora")


@pytest.mark.parametrize("init", [True, False])
def test_dora_magnitude_starts_at_the_norms(init):
    layer = new_layer("dora", init_lora_weights=init)
    adapter = layer.adapters["default"]
    norms = (layer.weight + adapter.delta()).norm(dim=1)
    torch.testing.assert_close(adapter.lora_magnitude_vector, norms)
    assert torch.equal(make(3, 2, LoRAConfig(r=1, use_dora=True)).lora_magnitude_vector, torch.ones(2))


@pytest.mark.parametrize("training", [False, True])
def test_two_dora_adapters_scale_one_after_the_other(training):
    """PEFT's way; with the first one's dropout on, what it does adds to the base."""
    layer = new_layer("dora", lora_dropout=0.0)
    layer.add_adapter("second", LoRAConfig(r=3, use_dora=True, lora_dropout=0.3))
    layer.set_adapter(["default", "second"])
    shake(layer).train(training)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.manual_seed(3)
    y = layer(x)
    if not training:
        torch.testing.assert_close(y, F.linear(x, layer.merged_weight(), layer.bias))
        return
    torch.manual_seed(3)
    d, base, (first, second) = F.dropout(x, 0.3), layer.weight, layer.adapters.values()
    low = first.merged(base, base)
    want = F.linear(x, low, layer.bias) + F.linear(d, second.merged(base, base) - base)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("width", [(12, 10), (24, 20)])
def test_lora_xs_trains_only_its_core(width):
    layer = LoRALinear(*width, r=RANK, method="lora_xs")
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == RANK**2


def test_lora_xs_moves_in_the_leading_singular_subspaces():
    layer = shake(new_layer("lora_xs"))
    u, _, vh = torch.linalg.svd(layer.weight.detach())
    u, v = u[:, :RANK], vh[:RANK].T
    delta = layer.adapters["default"].delta()
    torch.testing.assert_close(u @ u.T @ delta @ v @ v.T, delta, rtol=1e-10, atol=1e-10)
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.lora_R.copy_(torch.eye(RANK, dtype=torch.float64) / adapter.scaling)
    best = u @ (u.T @ layer.weight)  # with the identity as core: the best approximation of rank r
    torch.testing.assert_close(layer.adapters["default"].delta(), best, rtol=1e-10, atol=1e-10)


def test_lora_xs_refuses_a_rank_beyond_the_weight():
    with pytest.raises(ValueError, match="r: lora_xs expects at most"):
        LoRALinear(4, 3, r=4, method="lora_xs")


def test_sora_prox_minimises_its_objective():
    gate = shake(new_layer("sora")).adapters["default"]
    z, xi = gate.gate.detach().clone(), 0.5
    gate.prox_(xi)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)[:, None]
    best = grid[(0.5 * (z - grid) ** 2 + xi * grid.abs()).argmin(0), 0]
    torch.testing.assert_close(gate.gate.detach(), best, rtol=0, atol=2e-4)
    assert gate.gate.requires_grad


def test_sora_sparsity_grows_with_xi_and_negative_is_refused():
    zeros = []
    for xi in (0.0, 0.3, 1.0, 100.0):
        adapter = shake(new_layer("sora")).adapters["default"]
        adapter.prox_(xi)
        zeros.append(int((adapter.gate == 0).sum()))
    assert zeros == sorted(zeros) and zeros[0] == 0 and zeros[-1] == RANK
    with pytest.raises(ValueError, match="xi"):
        adapter.prox_(-1.0)


@pytest.mark.parametrize("gate", [[0.5, 0.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_sora_compact_keeps_the_update(gate):
    adapter = shake(new_layer("sora")).adapters["default"]
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor(gate))
    small = adapter.compact()
    assert small.r == max(1, sum(g != 0 for g in gate))
    torch.testing.assert_close(small.delta(), adapter.delta(), rtol=1e-12, atol=1e-12)


def test_sora_closed_gates_stop_their_ranks():
    layer = shake(new_layer("sora"))
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.gate[1] = 0
    layer(torch.randn(4, IN, dtype=torch.float64)).square().sum().backward()
    assert adapter.lora_A.grad[1].abs().max() == 0 and adapter.lora_B.grad[:, 1].abs().max() == 0
    assert adapter.lora_A.grad[0].abs().max() > 0


@pytest.mark.parametrize("b", range(1, RANK + 1))
def test_dylora_rank_is_a_view(b):
    layer = shake(new_layer("dylora"))
    adapter = layer.adapters["default"]
    adapter.set_rank(b)
    factors = adapter.lower()
    assert factors.lora_a.data_ptr() == adapter.lora_A.data_ptr() and factors.lora_a.shape == (b, IN)
    assert factors.lora_b.data_ptr() == adapter.lora_B.data_ptr() and factors.lora_b.shape == (OUT, b)
    assert factors.scaling == 6 / b
    layer(torch.randn(4, IN, dtype=torch.float64)).square().sum().backward()
    assert adapter.lora_A.grad[b:].count_nonzero() == 0 and adapter.lora_B.grad[:, b:].count_nonzero() == 0
    assert adapter.lora_A.grad[:b].count_nonzero() == b * IN


@pytest.mark.parametrize("b", [1, 3])
def test_dylora_compact_keeps_the_update(b):
    adapter = shake(new_layer("dylora")).adapters["default"]
    adapter.set_rank(b)
    small = adapter.compact()
    assert small.method == "lora" and small.r == b and small.lora_A.shape == (b, IN)
    torch.testing.assert_close(small.delta(), adapter.delta())


def test_dylora_at_full_rank_is_lora():
    dylora, lora = shake(new_layer("dylora")), new_layer("lora")
    lora.load_state_dict(dylora.state_dict())
    x = torch.randn(4, IN, dtype=torch.float64)
    assert torch.equal(dylora(x), lora(x))


def test_dylora_frozen_trains_the_last_rank_alone():
    layer = shake(new_layer("dylora", method_options={"frozen": True}))
    adapter = layer.adapters["default"]
    adapter.set_rank(3)
    layer(torch.randn(4, IN, dtype=torch.float64)).square().sum().backward()
    assert adapter.lora_A.grad.abs().sum(1).nonzero().flatten().tolist() == [2]
    assert adapter.lora_B.grad.abs().sum(0).nonzero().flatten().tolist() == [2]


def test_dylora_ranks_are_uniform_and_checked():
    adapter = new_layer("dylora").adapters["default"]
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([adapter.sample_rank(generator) for _ in range(4000)]))
    assert counts[0] == 0 and len(counts) == RANK + 1
    assert (counts[1:] - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75)
    for bad in (0, RANK + 1):
        with pytest.raises(ValueError, match="b: expected"):
            adapter.set_rank(bad)


@pytest.mark.parametrize(
    "fields,error,words",
    [
        ({"r": 0}, ValueError, "r: expected a rank"),
        ({"r": 2.0}, TypeError, "r: expected an int"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
        ({"bias": "some"}, ValueError, "bias"),
        ({"init_lora_weights": "magic"}, ValueError, "init_lora_weights"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"target_modules": [3]}, TypeError, "target_modules"),
        ({"target_modules": "(q"}, ValueError, "target_modules"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save"),
        ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern"),
        ({"rank_pattern": {"(q": 1}}, ValueError, "rank_pattern"),
        ({"alpha_pattern": [1]}, TypeError, "alpha_pattern"),
        ({"target_modules": ["q"], "layers_to_transform": "1"}, TypeError, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": [-1]}, ValueError, "layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, ValueError, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_pattern": ["h"]}, ValueError, "layers_pattern"),
        ({"method_options": {"frozen": True}}, ValueError, "method_options: lora takes none"),
    ],
)
def test_config_names_the_field(fields, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        LoRAConfig(**fields)


def test_config_patterns_follow_peft():
    config = LoRAConfig(
        r=8, lora_alpha=16, rank_pattern={"q": 2, r"layers\.1\..*": 4}, alpha_pattern={"k": 3}
    )
    assert config.for_module("layers.0.q").r == 2
    assert config.for_module("layers.1.k").r == 4 and config.for_module("layers.1.k").lora_alpha == 3
    assert config.for_module("layers.0.seq").r == 8  # "q" matches whole parts of a name
    assert config.for_module("layers.0.v") is config


def test_adapters_are_modules_without_a_forward_of_their_own():
    with pytest.raises(NotImplementedError):
        make(3, 3, LoRAConfig(r=1))(torch.zeros(3))
    assert isinstance(make(3, 3, LoRAConfig(r=1)), nn.Module)
