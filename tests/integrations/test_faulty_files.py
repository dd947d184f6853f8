"""Files with faults, of every structure and layout: an error that names the file, and the model bit-equal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

from cases import IN, OUT, options, shake
from safetensors.torch import load_file, save_file

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter
from lora_kernels.adapters import METHODS
from lora_kernels.integrations.checkpoint import WEIGHTS
from lora_kernels.integrations.checkpoint_config import CONFIG

# Whose r says nothing of a shape, at these sizes.
WITHOUT_RANK = {"compacter", "fourierft", "lofit", "lokr", "neft", "quanta", "smt", "vblora"}


def state_of(model):
    parameters = [(name, id(one), one.requires_grad) for name, one in model.named_parameters()]
    return {name: one.clone() for name, one in model.state_dict().items()}, parameters, repr(model)


def assert_refused(model, path, **how):
    """An error that names the file; nothing of the model has changed."""
    tensors, *rest = state_of(model)
    with pytest.raises(ValueError) as raised:
        load_adapter(model, path, **how)
    assert str(path) in str(raised.value)
    after, *others = state_of(model)
    assert others == rest and after.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in after.items())


def doubled(tensor):
    return torch.cat((tensor, tensor), -1)


# What becomes of one tensor; None: it is gone.
TENSOR_FAULTS = {
    "missing": lambda one: None,
    "wide": doubled,
    "a dimension more": lambda one: one[None, None, None, None],
    "scalar": lambda one: torch.zeros((), dtype=one.dtype),
    "empty": lambda one: one.flatten()[:0],
    "complex": lambda one: one.to(torch.complex64),
    "whole numbers": lambda one: one.to(torch.int16),
}


def with_fault(tensors, key, fault):
    value = fault(tensors[key])
    rest = {name: one for name, one in tensors.items() if name != key}
    return rest if value is None else {**rest, key: value.contiguous()}


def with_config(**values):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return change


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def with_extra(key):
    def add(folder):
        save_file({**load_file(folder / WEIGHTS), key: torch.zeros(2, 2)}, folder / WEIGHTS)

    return add


FOLDER_FAULTS = {
    "weights cut": cut(WEIGHTS, -7),
    "weights all but gone": cut(WEIGHTS, 5),
    "config cut": cut(CONFIG, -9),
    "a key of the layer": with_extra("base_model.model.0.nope"),
    "a key of another layer": with_extra("base_model.model.9.lora_A.weight"),
    "a key of nobody": with_extra("zzz"),
    "no object": with_config(lora_kernels="x"),
    "no rank": with_config(r="four", init_lora_weights=3),
}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, dtype=torch.float64))


def adapted(method):
    return apply_lora(base(), LoRAConfig(target_modules=["0"], **options(method)))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_structure(method, tmp_path):
    def models():
        return base(), adapted(method)

    save_adapter(shake(adapted(method)), tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    tensors = load_file(tmp_path / WEIGHTS)
    for fault in TENSOR_FAULTS.values():
        for key in tensors:
            save_file(with_fault(tensors, key, fault), tmp_path / WEIGHTS)
            for model in models():
                assert_refused(model, tmp_path)
    rank = {} if method in WITHOUT_RANK else {"another rank": with_config(r=3, rank_pattern={"0": 7})}
    for fault in (FOLDER_FAULTS | rank).values():
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        fault(tmp_path)
        for model in models():
            assert_refused(model, tmp_path)


def random(**shapes):
    return {key.replace("__", "."): torch.randn(*shape) for key, shape in shapes.items()}


# The start of the keys, the layout, and one layer's tensors.
LAYOUTS = {
    "kohya": (
        "lora_unet_q.",
        "kohya",
        random(lora_down__weight=(2, 12), lora_up__weight=(10, 2), alpha=(1,)),
    ),
    "kohya, a core": (
        "lora_unet_c.",
        "kohya",
        random(lora_down__weight=(2, 3, 1, 1), lora_mid__weight=(2, 2, 3, 3), lora_up__weight=(4, 2, 1, 1)),
    ),
    "lycoris, dora": (
        "lycoris_q.",
        "kohya",
        random(lora_down__weight=(2, 12), lora_up__weight=(10, 2), dora_scale=(10, 1)),
    ),
    "lycoris, loha": (
        "lycoris_q.",
        "kohya",
        random(hada_w1_a=(10, 2), hada_w1_b=(2, 12), hada_w2_a=(10, 2), hada_w2_b=(2, 12)),
    ),
    "lycoris, loha, a core": (
        "lycoris_c.",
        "kohya",
        random(hada_w1_a=(2, 4), hada_w1_b=(2, 3), hada_w2_a=(2, 4), hada_w2_b=(2, 3))
        | random(hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3)),
    ),
    "lycoris, lokr": ("lycoris_q.", "kohya", random(lokr_w1=(2, 3), lokr_w2_a=(5, 2), lokr_w2_b=(2, 4))),
    "lycoris, lokr, whole": ("lycoris_q.", "kohya", random(lokr_w1=(2, 3), lokr_w2=(5, 4))),
    "lycoris, lokr, a core": (
        "lycoris_c.",
        "kohya",
        random(lokr_w1=(1, 1), lokr_w2_a=(1, 4), lokr_w2_b=(1, 3), lokr_t2=(1, 1, 3, 3)),
    ),
    "diffusers": ("unet.q.", "diffusers", random(lora_A__weight=(2, 12), lora_B__weight=(10, 2))),
    "diffusers, older": (
        "unet.q.",
        "diffusers",
        random(lora__down__weight=(2, 12), lora__up__weight=(10, 2)),
    ),
}
METADATA = ("x", "[]", "3", '{"unet.peft_type": "IA3"}', '{"unet.r": "two"}')


def two():
    torch.manual_seed(0)
    return nn.ModuleDict({"q": nn.Linear(12, 10), "c": nn.Conv2d(3, 4, 3)})


# What is a number all the same, or another structure.
HARMLESS = {
    "alpha": ("missing", "a dimension more", "scalar", "whole numbers"),
    "dora_scale": ("missing",),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout(kind, tmp_path):
    start, layout, own = LAYOUTS[kind]
    path, tensors = tmp_path / "file.safetensors", {start + key: one for key, one in own.items()}
    save_file(tensors, path)
    load_adapter(two(), path, layout=layout)
    for name, fault in TENSOR_FAULTS.items():
        for key in tensors:
            if name in HARMLESS.get(key.removeprefix(start), ()):
                continue
            save_file(with_fault(tensors, key, fault), path)
            assert_refused(two(), path, layout=layout)
    for key in ("zzz", start + "nope"):
        save_file({**tensors, key: torch.zeros(2, 2)}, path)
        assert_refused(two(), path, layout=layout)
    for metadata in METADATA:
        save_file(tensors, path, metadata={"lora_adapter_metadata": metadata})
        assert_refused(two(), path, layout=layout)
    save_file(tensors, path)
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        assert_refused(two(), path, layout=layout)
