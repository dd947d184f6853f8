"""Every registered method through the same invariants, then what each promises by itself."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_kernels.adapters as adapters
from lora_kernels.adapters import METHODS, LoRAConfig, make
from lora_kernels.nn import LoRALinear

IN, OUT, RANK = 12, 10, 4
every_method = pytest.mark.parametrize("method", sorted(METHODS))


def new_layer(method: str, *, dtype=torch.float64, bias=True, **options) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(IN, OUT, r=RANK, lora_alpha=6, method=method, bias=bias, dtype=dtype, **options)


def shake(layer: LoRALinear) -> LoRALinear:
    """Random values for all that trains, as after some steps: zeros would hide errors."""
    with torch.no_grad():
        for adapter in layer.adapters.values():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    return layer


def dense(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    for adapter in layer.adapters.values():
        weight = adapter.merged(weight, layer.weight)
    return F.linear(x, weight, layer.bias)


@every_method
def test_starts_at_the_base(method):
    layer = new_layer(method)
    x = torch.randn(3, IN, dtype=torch.float64)
    base = F.linear(x, layer.weight, layer.bias)
    error = (layer(x) - base).abs().max()
    if METHODS[method].zero_start:
        assert error == 0
    else:
        assert 0 < error < 1e-2


@every_method
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_is_the_dense_layer(method, use_rslora):
    layer = shake(new_layer(method, use_rslora=use_rslora))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)


@every_method
def test_gradients_are_those_of_the_dense_layer(method):
    layer = shake(new_layer(method))
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, OUT, dtype=torch.float64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained
    ours = torch.autograd.grad(layer(x), [x, *trained], dy)
    theirs = torch.autograd.grad(dense(layer, x), [x, *trained], dy)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert any(grad.abs().max() > 0 for grad in ours[1:])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_equals_forward_and_unmerge_is_exact(method, dtype):
    layer = shake(new_layer(method, dtype=dtype))
    x = torch.randn(4, IN, dtype=dtype)
    weight, before, y = layer.weight, layer.weight.clone(), layer(x)
    layer.merge()
    assert layer.weight is not weight
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    assert layer.weight is weight
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)


@every_method
def test_state_dict_round_trip(method):
    layer = shake(new_layer(method))
    torch.manual_seed(1)
    other = LoRALinear(IN, OUT, r=RANK, lora_alpha=6, method=method, dtype=torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@every_method
def test_a_step_moves_what_trains_and_nothing_else(method):
    layer = shake(new_layer(method))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer(torch.randn(4, IN, dtype=torch.float64)).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    frozen = METHODS[method].frozen
    for name, parameter in layer.named_parameters():
        trains = name.startswith("adapters.") and name.rpartition(".")[2] not in frozen
        assert parameter.requires_grad == trains
        assert torch.equal(parameter, before[name]) != trains, name


@every_method
def test_deepcopy_is_apart(method):
    layer = shake(new_layer(method))
    x = torch.randn(4, IN, dtype=torch.float64)
    other, y = copy.deepcopy(layer), layer(x)
    assert torch.equal(other(x), y)
    other.set_adapter([])
    assert torch.equal(layer(x), y)


@every_method
def test_stacks_with_lora(method):
    layer = new_layer(method)
    layer.add_adapter("second", LoRAConfig(r=3, lora_alpha=1))
    layer.set_adapter(["default", "second"])
    shake(layer)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, x), rtol=1e-12, atol=1e-12)


@every_method
def test_trains_in_full_float32_on_a_half_precision_base(method):
    layer = new_layer(method, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    layer(torch.randn(4, IN, dtype=torch.bfloat16)).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.adapters.parameters() if p.requires_grad)


@every_method
def test_a_method_is_one_short_file(method):
    folder = Path(adapters.__file__).parent
    assert len((folder / f"{method}.py").read_text().splitlines()) <= 60


def test_unknown_method_lists_those_there_are():
    with pytest.raises(ValueError, match=r"method: expected one of dora, dylora, lora, .*'nope'"):
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


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_each_active_adapter_lowers_once_a_call(method, dropout, count, monkeypatch):
    """What a method computes from its parameters may be dear, and may be drawn at random."""
    layer = LoRALinear(6, 5, r=2, method=method, lora_dropout=dropout)
    layer.add_adapter("other", LoRAConfig(r=2, method=method, lora_dropout=dropout))
    layer.set_adapter(["default", "other"][:count])
    calls, kind = [], type(layer.adapters["default"])
    real = kind.lower
    monkeypatch.setattr(kind, "lower", lambda self: (calls.append(self), real(self))[1])
    for run in (lambda: layer(torch.randn(3, 6)), layer.merged_weight):
        calls.clear()
        run()
        assert len(calls) == len(set(calls)) == count
