"""kohya's, LyCORIS' and diffusers' files against LyCORIS' layers where it is installed, and dense sums."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.nn import lora_configs, lora_layers

WIDE = torch.float64


class Unet(nn.Module):
    """Names as a diffusion model has them: dots, numbers and underscores."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        block = self.down_blocks[0]
        block.attn1 = nn.Module()
        block.attn1.to_q, block.attn1.to_out = nn.Linear(12, 18), nn.ModuleList([nn.Linear(18, 12)])
        block.conv_in, block.proj_in = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)


PLACES = {name: f"down_blocks.0.{name}" for name in ("attn1.to_q", "attn1.to_out.0", "conv_in", "proj_in")}


def unet():
    torch.manual_seed(0)
    return Unet().to(WIDE)


def inputs(layer):
    torch.manual_seed(2)
    shape = (2, layer.in_channels, 5, 5) if isinstance(layer, nn.Conv2d) else (3, layer.in_features)
    return torch.randn(shape, dtype=WIDE)


def kohya(tensors, prefix="lora_unet_"):
    """Tensors by place and end, under kohya's keys."""
    found = {}
    for (place, end), tensor in tensors.items():
        found[f"{prefix}{PLACES[place].replace('.', '_')}.{end}"] = torch.as_tensor(tensor).contiguous()
    return found


def normal(*shape):
    return torch.randn(shape, dtype=WIDE)


def written(tensors, folder, metadata=None):
    path = folder / "adapter.safetensors"
    save_file(tensors, path, metadata)
    return path


def pair(place, r=2):
    """A down and an up of the place's layer."""
    weight = unet().get_submodule(PLACES[place]).weight
    return normal(r, *weight.shape[1:]), normal(len(weight), r, *[1] * (weight.dim() - 2))


def change(model, place):
    layer = lora_layers(model)[PLACES[place]]
    return layer.merged_weight() - layer.weight


def test_kohyas_lora_of_linears_and_convolutions_with_alphas_and_ranks_of_their_own(tmp_path):
    torch.manual_seed(1)
    alphas, tensors, want = {"attn1.to_q": 1.0, "conv_in": 3.0, "proj_in": None}, {}, {}
    for r, (place, alpha) in zip((2, 3, 2), alphas.items(), strict=True):
        down, up = pair(place, r)
        tensors |= {(place, "lora_down.weight"): down, (place, "lora_up.weight"): up}
        if alpha is not None:
            tensors[place, "alpha"] = torch.tensor(alpha)
        delta = (up.flatten(1) @ down.flatten(1)) * ((alpha or r) / r)
        want[place] = delta.view_as(unet().get_submodule(PLACES[place]).weight)
    model = load_adapter(unet(), written(kohya(tensors), tmp_path), layout="kohya")
    for place, delta in want.items():
        torch.testing.assert_close(change(model, place), delta)
    assert set(lora_layers(model)) == {PLACES[place] for place in alphas}
    save_adapter(model, tmp_path / "peft")  # and on in PEFT's format
    again = load_adapter(unet(), tmp_path / "peft")
    for place, delta in want.items():
        torch.testing.assert_close(change(again, place), delta)


def test_a_tucker_core_and_a_linear_kept_as_a_convolution(tmp_path):
    torch.manual_seed(1)
    down, mid, up = normal(2, 4, 1, 1), normal(2, 2, 3, 3), normal(6, 2, 1, 1)
    flat, up_flat = normal(2, 12, 1, 1), normal(18, 2, 1, 1)
    tensors = {
        ("conv_in", "lora_down.weight"): down,
        ("conv_in", "lora_mid.weight"): mid,
        ("conv_in", "lora_up.weight"): up,
        ("attn1.to_q", "lora_down.weight"): flat,
        ("attn1.to_q", "lora_up.weight"): up_flat,
    }
    model = load_adapter(unet(), written(kohya(tensors), tmp_path))
    dense = torch.einsum("om,mnxy,ni->oixy", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(change(model, "conv_in"), dense)
    torch.testing.assert_close(change(model, "attn1.to_q"), up_flat.flatten(1) @ flat.flatten(1))


def hada(weight, r, tucker=False):
    out, cols = len(weight), weight[0].numel()
    if not tucker:
        ends = {"hada_w1_a": (out, r), "hada_w1_b": (r, cols), "hada_w2_a": (out, r), "hada_w2_b": (r, cols)}
    else:
        cols, taps = weight.shape[1], weight.shape[2:]
        ends = {f"hada_w{i}_{half}": (r, out if half == "a" else cols) for i in "12" for half in "ab"}
        ends |= {f"hada_t{i}": (r, r, *taps) for i in "12"}
    return {end: normal(*shape) for end, shape in ends.items()}


@pytest.mark.parametrize("tucker", [False, True])
def test_loha(tmp_path, tucker):
    torch.manual_seed(1)
    weight = unet().get_submodule(PLACES["conv_in"]).weight
    own = {**hada(weight, 2, tucker), "alpha": torch.tensor(1.0)}
    model = load_adapter(unet(), written(kohya({("conv_in", k): v for k, v in own.items()}), tmp_path))
    halves = []
    for i in "12":
        a, b = own[f"hada_w{i}_a"], own[f"hada_w{i}_b"]
        core = own.get(f"hada_t{i}")
        one = a @ b if core is None else torch.einsum("ijxy,io,jc->ocxy", core, a, b)
        halves.append(one.reshape(weight.shape))
    torch.testing.assert_close(change(model, "conv_in"), halves[0] * halves[1] / 2)
    assert lora_configs(model)["default"].method == "loha"


LOKR = {  # of to_q, [18, 12]; LyCORIS' own choice, one that is not, both factored, both whole
    "nearest": ({"lokr_w1": (3, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 4)}, 0.5),
    "unbalanced": ({"lokr_w1": (9, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 6)}, 0.5),
    "both": ({"lokr_w1_a": (3, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 4)}, 0.5),
    "whole": ({"lokr_w1": (3, 3), "lokr_w2": (6, 4)}, 1.0),
}


@pytest.mark.parametrize("form", LOKR)
def test_lokr(tmp_path, form):
    torch.manual_seed(1)
    shapes, scale = LOKR[form]
    own = {end: normal(*shape) for end, shape in shapes.items()}
    tensors = {("attn1.to_q", end): tensor for end, tensor in own.items()}
    path = written(kohya({**tensors, ("attn1.to_q", "alpha"): torch.tensor(0.5)}), tmp_path)
    model = load_adapter(unet(), path)
    parts = [
        own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    ]
    torch.testing.assert_close(change(model, "attn1.to_q"), scale * torch.kron(*parts))


def test_dora_of_lycoris(tmp_path):
    torch.manual_seed(1)
    tensors = {}
    for place in ("attn1.to_q", "conv_in"):
        down, up = pair(place)
        scale = normal(len(up), *[1] * (up.dim() - 1)).abs() + 1
        tensors |= {
            (place, "lora_down.weight"): down,
            (place, "lora_up.weight"): up,
            (place, "dora_scale"): scale,
        }
    model = load_adapter(unet(), written(kohya(tensors), tmp_path))
    for place in ("attn1.to_q", "conv_in"):
        layer = lora_layers(model)[PLACES[place]]
        down, up, scale = (
            tensors[place, end] for end in ("lora_down.weight", "lora_up.weight", "dora_scale")
        )
        moved = layer.weight.flatten(1) + up.flatten(1) @ down.flatten(1)
        want = (scale.flatten(1) * moved / moved.norm(dim=1, keepdim=True)).view_as(layer.weight)
        torch.testing.assert_close(layer.merged_weight(), want)
    tensors["attn1.to_q", "dora_scale"] = normal(1, 12)
    refused(written(kohya(tensors), tmp_path), r"attn1.to_q: expected a magnitude for each of 18 outputs")


DIFFUSERS = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "transformer": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "older": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "linear": ("unet.{}.lora_linear_layer.down.weight", "unet.{}.lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("form", DIFFUSERS)
def test_diffusers(tmp_path, form):
    torch.manual_seed(1)
    tensors, want = {}, {}
    for place in ("attn1.to_q", "attn1.to_out.0"):
        down, up = pair(place)
        tensors |= dict(zip((key.format(PLACES[place]) for key in DIFFUSERS[form]), (down, up), strict=True))
        want[place] = up @ down
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    for given in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        model = load_adapter(unet(), given)
        for place, delta in want.items():
            torch.testing.assert_close(change(model, place), delta)


def test_diffusers_attention_processors(tmp_path):
    torch.manual_seed(1)
    tensors, want = {}, {}
    for place, name in (("attn1.to_q", "to_q"), ("attn1.to_out.0", "to_out")):
        down, up = pair(place)
        at = f"unet.down_blocks.0.attn1.processor.{name}_lora"
        tensors |= {f"{at}.down.weight": down, f"{at}.up.weight": up}
        want[place] = up @ down
    model = load_adapter(unet(), written(tensors, tmp_path), layout="diffusers")
    for place, delta in want.items():
        torch.testing.assert_close(change(model, place), delta)


def test_diffusers_config_in_the_file(tmp_path):
    torch.manual_seed(1)
    (down, up), (out_down, out_up) = pair("attn1.to_q"), pair("attn1.to_out.0", 4)
    tensors = {
        f"unet.{PLACES['attn1.to_q']}.lora_A.weight": down,
        f"unet.{PLACES['attn1.to_q']}.lora_B.weight": up,
        f"unet.{PLACES['attn1.to_out.0']}.lora_A.weight": out_down,
        f"unet.{PLACES['attn1.to_out.0']}.lora_B.weight": out_up,
    }
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.rank_pattern": {"to_out.0": 4},
        "unet.use_rslora": True,
    }
    said = {"lora_adapter_metadata": json.dumps(config)}
    model = load_adapter(unet(), written(tensors, tmp_path, said))
    torch.testing.assert_close(change(model, "attn1.to_q"), 6 / 2**0.5 * (up @ down))
    torch.testing.assert_close(change(model, "attn1.to_out.0"), 3 * (out_up @ out_down))
    for option, value, why in (
        ("lora_bias", True, "lora_bias: expected it unset"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens: expected it unset"),
        ("use_qalora", True, "lora_adapter_metadata: expected the options of LoRA, got those of qalora"),
    ):
        said = {"lora_adapter_metadata": json.dumps({**config, f"unet.{option}": value})}
        refused(written(tensors, tmp_path, said), why)


def test_a_part_of_several_and_other_names(tmp_path):
    torch.manual_seed(1)
    down, up = pair("attn1.to_q")
    one = {("attn1.to_q", "lora_down.weight"): down, ("attn1.to_q", "lora_up.weight"): up}
    other = {end: 2 * tensor for end, tensor in one.items()}
    path = written({**kohya(one), **kohya(other, "lora_te_")}, tmp_path)
    refused(path, "part: expected one of those of .*, lora_te, lora_unet, got None")
    refused(path, "got 'lora_te2'", part="lora_te2")
    for part, factor in (("lora_unet", 1), ("lora_te", 4)):
        model = load_adapter(unet(), path, part=part)
        torch.testing.assert_close(change(model, "attn1.to_q"), factor * up @ down)
    moved = {key.replace("down_blocks_0", "input_blocks_1_1"): value for key, value in kohya(one).items()}
    path = written(moved, tmp_path)
    model = load_adapter(unet(), path, key_mapping={"^input_blocks_1_1": "down_blocks_0"})
    torch.testing.assert_close(change(model, "attn1.to_q"), up @ down)


def refused(path, match, error=ValueError, **options):
    """The model stays as it was, with an adapter or without."""
    for model in (unet(), apply_lora(unet(), LoRAConfig(target_modules=["to_q"]))):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(error, match=match):
            load_adapter(model, path, **options)
        assert [type(module) for module in model.modules()] == kinds
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_what_is_refused_by_name(tmp_path):
    torch.manual_seed(1)
    down, up = pair("attn1.to_q")
    good = kohya({("attn1.to_q", "lora_down.weight"): down, ("attn1.to_q", "lora_up.weight"): up})
    (first, _), (second, _) = good.items()
    bad = {
        r"1 unknown keys \['to_q.diff_b'\]": {**good, "lora_unet_to_q.diff_b": down + 0},
        r"1 unknown keys \['mid_block_to_q.alpha'\]": {
            **good,
            "lora_unet_mid_block_to_q.alpha": torch.ones(()),
        },
        r"to_q: expected the tensors of LoRA, LoHa or LoKr, got \['down'\]": {first: down},
        "expected layers of one structure, got loha, lora": {
            **good,
            **kohya({("conv_in", end): normal(2, 2) for end in hada(torch.zeros(2, 2), 2)}),
        },
        r"lora_A.weight: expected a floating tensor of shape \(2, 12\), got": {
            first: normal(2, 11),
            second: up,
        },
    }
    for match, tensors in bad.items():
        refused(written(tensors, tmp_path), match)
    path = written(good, tmp_path)
    refused(path, "layout: expected one of auto, peft, kohya, diffusers, got 'a1111'", layout="a1111")
    refused(path, "expected a folder with adapter_config.json", layout="peft")
    refused(tmp_path / "none.safetensors", "no such file", FileNotFoundError)
    path.write_bytes(b"x" * 40)
    refused(path, "got one that is damaged")


LYCORIS = {
    "locon": [{}, {"use_tucker": True}, {"weight_decompose": True}, {"rs_lora": True}, {"use_scalar": True}],
    "loha": [{}, {"use_tucker": True}, {"rs_lora": True}],
    "lokr": [{}, {"use_tucker": True}, {"factor": 2}, {"decompose_both": True}, {"full_matrix": True}],
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_against_lycoris_own_layers(tmp_path, kind):
    modules = pytest.importorskip("lycoris.modules")
    module = {"locon": "LoConModule", "loha": "LohaModule", "lokr": "LokrModule"}[kind]
    for options in LYCORIS[kind]:
        torch.manual_seed(1)
        theirs, tensors = {}, {}
        for place in ("attn1.to_q", "conv_in", "proj_in"):
            layer = unet().get_submodule(PLACES[place])
            name = f"lora_unet_{PLACES[place].replace('.', '_')}"
            one = getattr(modules, module)(name, layer, 1.0, 1, 0.5, **options).to(WIDE).eval()
            for parameter in one.parameters():
                nn.init.normal_(parameter)
            theirs[place] = one, layer
            tensors |= {f"{name}.{end}": t.detach().clone() for end, t in one.custom_state_dict().items()}
        model = load_adapter(unet(), written(tensors, tmp_path))
        for place, (one, layer) in theirs.items():
            x = inputs(layer)
            one.org_forward = layer.forward
            torch.testing.assert_close(
                lora_layers(model)[PLACES[place]](x), one(x).detach(), rtol=1e-6, atol=1e-6
            )


def test_a_layer_of_such_a_file_computes_what_its_weight_says(tmp_path):
    torch.manual_seed(1)
    down, up = pair("conv_in")
    tensors = kohya({("conv_in", "lora_down.weight"): down, ("conv_in", "lora_up.weight"): up})
    layer = load_adapter(unet(), written(tensors, tmp_path)).down_blocks[0].conv_in
    x = inputs(layer)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.merged_weight(), layer.bias, padding=1))
