"""Every start that PEFT has too, factor by factor up to sign."""

from __future__ import annotations

import pytest
import torch
from test_initialisers import ALPHA, NAMES, Net, R, samples, site_of

from lora_kernels.init import draw
from lora_kernels.init.eva import rank_pattern
from lora_kernels.stats import calibrate

peft = pytest.importorskip("peft")


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
