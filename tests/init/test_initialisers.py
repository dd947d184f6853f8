"""Every initialiser against PEFT, factor by factor up to sign, and against what its paper says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

from lora_kernels import LoRAConfig
from lora_kernels.adapters import Site
from lora_kernels.init import INITIALISERS, draw, find
from lora_kernels.init.eva import rank_pattern
from lora_kernels.stats import calibrate

R, ALPHA = 4, 6
SHAPES = {"tall": (24, 16), "wide": (16, 24), "square": (16, 16)}


class Net(nn.Module):
    """Three linears of other shapes, whose inputs are far from white."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.square = nn.Linear(16, 16)
        self.tall = nn.Linear(16, 24)
        self.wide = nn.Linear(24, 16)

    def forward(self, x):
        return self.wide(torch.tanh(self.tall(torch.relu(self.square(x)))))


NAMES = ("square", "tall", "wide")


def samples(count=6):
    generator = torch.Generator().manual_seed(4)
    scale = torch.linspace(0.2, 2, 16)
    return [torch.randn(1, 30, 16, generator=generator) * scale + 0.3 for _ in range(count)]


def site_of(weight, init, statistics=None, name="layer", **options):
    fields = {"r": R, "lora_alpha": ALPHA} | options
    config = LoRAConfig(target_modules=["x"], init_lora_weights=init, **fields)
    out, cols = weight.shape
    given = statistics or {}
    return Site(name, cols, out, config, weight, weight.device, weight.dtype, given, tensors={})


def of_peft(config, before=None):
    """A, B and W_res of each layer."""
    model = Net()
    if before is not None:
        before(model, config)
    torch.manual_seed(9)
    model = peft.get_peft_model(model, config)
    layers = {name: model.base_model.model.get_submodule(name) for name in NAMES}
    return {
        name: (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
            layer.base_layer.weight.detach(),
        )
        for name, layer in layers.items()
    }


def config_of_peft(init, **fields):
    return peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=list(NAMES), init_lora_weights=init, **fields
    )


def assert_same_up_to_sign(got, want, tolerance=1e-4):
    (a, b, weight), (other_a, other_b, other_weight) = got, want
    signs = torch.where((a * other_a).sum(1) + (b * other_b).sum(0) < 0, -1.0, 1.0)
    torch.testing.assert_close(signs[:, None] * a, other_a, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(b * signs, other_b, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight, other_weight, rtol=tolerance, atol=tolerance)


def ours(init, statistics=None, **options):
    model, found = Net(), {}
    torch.manual_seed(9)
    for name in NAMES:
        weight = model.get_submodule(name).weight
        drawn = draw(site_of(weight, init, (statistics or {}).get(name), name, **options))
        rest = weight.detach() if drawn.weight is None else drawn.weight
        found[name] = (drawn.lora_a, drawn.lora_b, rest)
    return found


@pytest.mark.parametrize("init", ["olora", "pissa", "mica"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_against_peft(init, use_rslora):
    want = of_peft(config_of_peft(init, use_rslora=use_rslora))
    for name, got in ours(init, use_rslora=use_rslora).items():
        assert_same_up_to_sign(got, want[name])


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa_niter_4"])
def test_what_is_drawn_against_peft(init):
    """PEFT draws more numbers before; each layer by itself, from the same seed, gives the same."""
    model, layer = Net(), "tall"
    weight = model.tall.weight
    torch.manual_seed(1)
    drawn = draw(site_of(weight, init))
    wrapped = peft.tuners.lora.layer.Linear(
        model.tall, "default", config=config_of_peft(False), r=R, lora_alpha=ALPHA
    )
    torch.manual_seed(1)
    if init in ("orthogonal",):
        wrapped.orthogonal_init("default")
    elif str(init).startswith("pissa"):
        wrapped.pissa_init("default", init)
    elif init is False:
        wrapped.lora_A["default"].reset_parameters()
        wrapped.lora_B["default"].reset_parameters()
    else:
        wrapped.reset_lora_parameters("default", init)
    want = (wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight, wrapped.base_layer.weight)
    rest = Net().get_submodule(layer).weight if drawn.weight is None else drawn.weight
    assert_same_up_to_sign((drawn.lora_a, drawn.lora_b, rest), [t.detach() for t in want], 1e-5)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_against_peft(method):
    pytest.importorskip("attr")  # PEFT's CorDA imports it
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = config_of_peft("corda", corda_config=CordaConfig(corda_method=method))
    want = of_peft(config, lambda m, c: preprocess_corda(m, c, lambda: [m(x) for x in samples()]))
    statistics = calibrate(Net(), samples())
    got = ours("corda", statistics, method_options={"corda_method": method})
    for name in NAMES:
        # In the directions that W and the inputs hardly have, both are what float32 leaves of them.
        assert_same_up_to_sign(got[name], want[name], 2e-3)


@pytest.mark.parametrize("direction", ["ArB2r", "ArBr", "A2rBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale"])
def test_lora_ga_against_peft(direction, scale):
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    def train(model):
        for x in samples():
            model(x).square().mean().backward()

    options = {"direction": direction, "scale": scale}
    config = config_of_peft("lora_ga", lora_ga_config=LoraGAConfig(**options))
    want = of_peft(config, lambda m, c: preprocess_loraga(m, c, lambda: train(m)))
    statistics = calibrate(Net(), samples(), "gradient", forward=lambda m, x: m(x).square().mean())
    got = ours("lora_ga", statistics, method_options=options)
    for name in NAMES:
        (a, b, rest), (other_a, other_b, other_rest) = got[name], want[name]
        # Of a randomised norm of W both have what the few rounds leave.
        near = {"rtol": 1e-2, "atol": 1e-2} if scale == "weight_svd" else {"rtol": 1e-3, "atol": 1e-3}
        # They are of different triplets, and so have signs of their own.
        torch.testing.assert_close(
            a * (a * other_a).sum(1, keepdim=True).sign(), other_a, rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(b * (b * other_b).sum(0).sign(), other_b, **near)
        torch.testing.assert_close(rest + ALPHA / R * b @ a, other_rest + ALPHA / R * other_b @ other_a)


def eva_of_peft(rho, whiten=False):
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = config_of_peft("eva", eva_config=EvaConfig(rho=rho, whiten=whiten, tau=0.999))
    return get_eva_state_dict(
        Net(),
        [torch.cat(samples(), 1)],
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0].flatten(0, -2),
        show_progress_bar=False,
    )


@pytest.mark.parametrize("whiten", [False, True])
def test_eva_against_peft(whiten):
    statistics = calibrate(Net(), samples(), "activation_svd")
    got = ours("eva", statistics, method_options={"whiten": whiten})
    want = eva_of_peft(1.0, whiten)
    for name in NAMES:
        a, b, weight = got[name]
        assert b.count_nonzero() == 0 and torch.equal(weight, Net().get_submodule(name).weight)
        other = want[name].float()
        if whiten:  # the samples seen twice and more have longer singular vectors there
            a, other = a / a.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
        torch.testing.assert_close((a * other).sum(1).abs(), torch.ones(R), rtol=1e-3, atol=1e-3)


def test_ranks_of_eva_against_peft():
    statistics = calibrate(Net(), samples(), "activation_svd")
    got = rank_pattern(statistics, R, rho=2.0)
    assert got == {name: len(rows) for name, rows in eva_of_peft(2.0).items()}
    assert sum(got.values()) == R * 3 and len(set(got.values())) > 1
    assert rank_pattern(statistics, R, rho=1.0) == dict.fromkeys(NAMES, R)


def nf4(weight):
    bnb = pytest.importorskip("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    return bnb.functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_is_its_loop(rounds):
    """PEFT's runs on a card alone: its loop on bitsandbytes' NF4, with s in the factors."""
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    part = torch.zeros_like(weight)
    for _ in range(rounds):
        held = nf4(weight - part)
        u, s, vh = torch.linalg.svd(weight - held, full_matrices=False)
        part = (u[:, :R] * s[:R]) @ vh[:R]
    options = {"loftq_iter": rounds}
    a, b, rest, *_ = draw(site_of(weight, "loftq", method_options=options))
    torch.testing.assert_close(rest, held, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ALPHA / R * (b @ a), part, rtol=1e-3, atol=1e-4)
    assert (weight - rest - ALPHA / R * (b @ a)).norm() < (weight - nf4(weight)).norm()


TAKING = sorted(name for name, one in INITIALISERS.items() if one.takes)


def statistics_for(name, weight, dtype=torch.float32):
    out, cols = weight.shape
    torch.manual_seed(3)
    x = torch.randn(50, cols, dtype=dtype)
    return {
        "covariance": x.T @ x / 50,
        "gradient": torch.randn(out, cols, dtype=dtype),
        "activation_svd": x[:16],
    }


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rest_and_the_factors_are_w(name, shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    init = "pissa_niter_2" if name == "_niter" else name
    drawn = draw(
        site_of(weight, init, statistics_for(name, weight))._replace(
            dtype=torch.promote_types(dtype, torch.float32)
        )
    )
    a, b = drawn.lora_a.double(), drawn.lora_b.double()
    assert drawn.weight.dtype == dtype and a.shape == (R, shape[1]) and b.shape == (shape[0], R)
    got = drawn.weight.double() + ALPHA / R * (b @ a)
    eps = torch.finfo(dtype).eps
    largest = max(drawn.weight.abs().max().item(), weight.abs().max().item())
    bound = eps * largest + 16 * R * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (
        1 + (b.abs() @ a.abs()).max().item()
    )
    assert (got - weight.double()).abs().max() <= bound
    assert (b @ a).abs().max() > 1e-3


def test_milora_takes_what_w_does_least():
    torch.manual_seed(0)
    weight = torch.randn(24, 16, dtype=torch.float64)
    a, b, rest, *_ = draw(site_of(weight, "milora"))
    s, sizes = ALPHA / R, torch.linalg.svdvals(weight)
    torch.testing.assert_close((s * b @ a).square().sum(), sizes[-R:].square().sum())
    torch.testing.assert_close(a @ a.T, torch.diag(sizes[-R:] / s))
    torch.testing.assert_close(b.T @ b, torch.diag(sizes[-R:] / s))
    for product in (rest @ a.T, b.T @ rest):
        torch.testing.assert_close(product, torch.zeros_like(product))


def test_corda_of_white_inputs_is_pissa_and_milora():
    torch.manual_seed(0)
    weight = torch.randn(24, 16, dtype=torch.float64)
    for method, init in (("ipm", "pissa"), ("kpm", "milora")):
        eye = {"covariance": torch.eye(16, dtype=torch.float64)}
        a, b, *_ = draw(site_of(weight, "corda", eye, method_options={"corda_method": method}))
        other = draw(site_of(weight, init))
        torch.testing.assert_close(b @ a, other.lora_b @ other.lora_a)


def test_corda_loses_less_of_the_output_than_the_plain_decomposition():
    torch.manual_seed(0)
    weight = torch.randn(16, 24, dtype=torch.float64)
    x = torch.randn(400, 24, dtype=torch.float64) * torch.logspace(-1.5, 1, 24, dtype=torch.float64)
    statistics = {"covariance": x.T @ x / 400}
    losses = [
        (x @ (drawn.lora_b @ drawn.lora_a).T).norm() * ALPHA / R
        for drawn in (
            draw(site_of(weight, "corda", statistics, method_options={"corda_method": "kpm"})),
            draw(site_of(weight, "milora")),
        )
    ]
    assert losses[0] < 0.5 * losses[1]


@pytest.mark.parametrize("freeze", ["A", "B"])
@pytest.mark.parametrize("directions", ["orthonormal", "kaiming", "leading", "trailing"])
def test_asym_fixes_either_factor_in_any_direction(freeze, directions):
    weight = torch.randn(24, 16)
    options = {"freeze": freeze, "directions": directions}
    drawn = draw(site_of(weight, "asym", method_options=options))
    fixed, other = (drawn.lora_a, drawn.lora_b) if freeze == "A" else (drawn.lora_b.T, drawn.lora_a)
    r = len(fixed)
    assert drawn.frozen == {f"lora_{freeze}"} and other.count_nonzero() == 0
    assert drawn.lora_a.shape == (r, weight.shape[1]) and drawn.lora_b.shape == (weight.shape[0], r)
    if directions != "kaiming":
        torch.testing.assert_close(fixed @ fixed.T, torch.eye(r, dtype=fixed.dtype))
    if directions in ("leading", "trailing"):
        sizes = (weight @ fixed.T).norm(dim=0) if freeze == "A" else (fixed @ weight).norm(dim=1)
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(sizes, values[:r] if directions == "leading" else values[-r:])
    with pytest.raises(ValueError, match="freeze: expected one of"):
        draw(site_of(weight, "asym", method_options={"freeze": "C"}))


def test_asym_is_orthonormal_and_frozen():
    weight = torch.randn(24, 16)
    a, b, rest, frozen, _ = draw(site_of(weight, "asym"))
    torch.testing.assert_close(a @ a.T, torch.eye(R))
    assert b.count_nonzero() == 0 and rest is None and frozen == {"lora_A"}
    assert draw(site_of(weight, "asym", method_options={"train_a": True})).frozen == frozenset()


def test_lora_ga_at_random_takes_one_set_of_vectors():
    weight = torch.randn(24, 16)
    gradient = torch.randn(24, 16)
    options = {"direction": "random", "scale": "unit"}
    a, b, *_ = draw(site_of(weight, "lora_ga", {"gradient": gradient}, method_options=options))
    torch.testing.assert_close(a @ a.T, torch.eye(R), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient @ a.T, b, rtol=1e-3, atol=1e-3)


BAD = {
    "unknown": (
        "pisa",
        {},
        {},
        "init_lora_weights: expected one of True, False, pissa_niter_N, .*pissa.*got 'pisa'",
    ),
    "inner name": ("_true", {}, {}, "init_lora_weights: expected one of"),
    "no rounds": ("pissa_niter_0", {}, {}, "got 'pissa_niter_0'"),
    "odd": ("orthogonal", {"r": 3}, {}, "r: 'orthogonal' expects an even rank, got 3"),
    "rank": ("pissa", {"r": 17}, {}, "r: 'pissa' expects at most 16 of layer, got 17"),
    "rank of gradients": (
        "lora_ga",
        {"r": 9},
        {"gradient": torch.randn(24, 16)},
        "r: 'lora_ga' expects at most 8",
    ),
    "no covariance": (
        "corda",
        {},
        {},
        r"'corda' needs the statistic 'covariance' of layer; gather it by .*"
        r"calibrate\(model, batches, \('covariance',\)\)",
    ),
    "no gradient": (
        "lora_ga",
        {},
        {},
        r"needs the statistic 'gradient'.*calibrate\(model, batches, \('gradient',\)\)",
    ),
    "no components": (
        "eva",
        {},
        {},
        r"needs the statistic 'activation_svd'.*apply_lora\(model, config, statistics=statistics\)",
    ),
    "shape": (
        "corda",
        {},
        {"covariance": torch.eye(24)},
        r"layer: expected covariance of shape \[16, 16\], got \(24, 24\)",
    ),
    "not finite": (
        "corda",
        {},
        {"covariance": torch.full((16, 16), torch.nan)},
        "expected finite covariance",
    ),
    "zero": ("corda", {}, {"covariance": torch.zeros(16, 16)}, "inputs that are not all zero"),
    "components": (
        "eva",
        {},
        {"activation_svd": torch.randn(2, 16)},
        "r: 'eva' expects at most 2 of layer, got 4",
    ),
    "method": (
        "corda",
        {"method_options": {"corda_method": "x"}},
        {"covariance": torch.eye(16)},
        "corda_method: expected one of",
    ),
    "bits": ("loftq", {"method_options": {"loftq_bits": 2}}, {}, "loftq_bits: expected one of"),
    "rounds": (
        "loftq",
        {"method_options": {"loftq_iter": 0}},
        {},
        "loftq_iter: expected an int of at least 1",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, monkeypatch):
    init, fields, statistics, message = BAD[what]
    weight = torch.randn(24, 16)
    before = copy.deepcopy(weight)
    with pytest.raises(ValueError, match=message):
        draw(site_of(weight, init, statistics, **fields))
    assert torch.equal(weight, before)


def test_a_start_from_no_weight():
    with pytest.raises(ValueError, match="'pissa' starts from the base weight, and there is none"):
        draw(site_of(torch.randn(24, 16), "pissa")._replace(weight=None))


def test_names():
    assert find(True).name == "_true" and find("pissa_niter_16").name == "_niter"
    with pytest.raises(ValueError, match="init_lora_weights: expected one of"):
        find([])
