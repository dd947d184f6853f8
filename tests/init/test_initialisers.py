"""Every initialiser against what its paper says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.adapters import Site
from lora_kernels.init import INITIALISERS, draw, find

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
