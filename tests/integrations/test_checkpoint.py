"""save_adapter and load_adapter against PEFT, and every way a checkpoint can be bad."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter

OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], "rank_pattern": {"query": 2}}


def output(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).last_hidden_state


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape)
    return model


def ours(bert, **options):
    return randomise(apply_lora(bert(), LoRAConfig(**{**OPTIONS, **options})).eval())


@pytest.fixture
def saved(bert, tmp_path):
    save_adapter(ours(bert), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"method": "lora_fa"}, {"use_dora": True}, {"layers_to_transform": [1]}],
    ids=str,
)
def test_peft_reads_what_we_write(bert, tokens, tmp_path, options):
    model = ours(bert, **options)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(output(peft, tokens), output(model, tokens), rtol=0, atol=1e-6)


KEYLESS = [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["LayerNorm"]}, {"lora_bias": True}]
KEYED = [{"method": "lora_fa"}, {"init_lora_weights": "pissa"}, {"method": "moslora"}]


@pytest.mark.parametrize("options", [*KEYLESS, *KEYED], ids=str)
def test_what_pefts_fields_say_is_said_by_them_alone(bert, tmp_path, options):
    """PEFT warns of a key that it does not know, and blames a newer version of itself."""
    save_adapter(ours(bert, **options), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ("lora_kernels" in config) == (options in KEYED)
    if options in KEYLESS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["LayerNorm"]},
        {"use_dora": True},
        {"layers_to_transform": 0, "layers_pattern": "layer"},
    ],
    ids=str,
)
def test_we_read_what_peft_writes(bert, tokens, tmp_path, options):
    peft = randomise(get_peft_model(bert(), LoraConfig(**OPTIONS, **options)).eval())
    peft.save_pretrained(tmp_path)
    model = load_adapter(bert().eval(), tmp_path)
    torch.testing.assert_close(output(model, tokens), output(peft, tokens), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "wte"]], ids=str)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gpt2_goes_both_ways(gpt2, tokens, tmp_path, use_dora, targets):
    options = {**OPTIONS, "rank_pattern": {"c_attn": 2}, "target_modules": targets, "use_dora": use_dora}
    peft = randomise_all(get_peft_model(gpt2(), LoraConfig(**options)).eval())
    peft.save_pretrained(tmp_path / "theirs")
    model = load_adapter(gpt2().eval(), tmp_path / "theirs")
    torch.testing.assert_close(output(model, tokens), output(peft, tokens), rtol=0, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    theirs = {key: value for key, value in files[1].items() if not key.endswith("base_layer.weight")}
    assert files[0].keys() == theirs.keys()
    assert all(torch.equal(files[0][key], theirs[key]) for key in theirs)
    configs = [
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    ]
    assert configs[0]["fan_in_fan_out"] is configs[1]["fan_in_fan_out"] is True
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, tokens), output(peft, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_embeddings_go_both_ways(bert, tokens, tmp_path, use_dora):
    options = {**OPTIONS, "target_modules": ["word_embeddings", "query"], "use_dora": use_dora}
    model = randomise_all(apply_lora(bert(), LoRAConfig(**options)).eval())
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(peft, tokens), output(model, tokens), rtol=0, atol=1e-5)

    theirs = randomise_all(get_peft_model(bert(), LoraConfig(**options)).eval())
    theirs.save_pretrained(tmp_path / "peft")
    loaded = load_adapter(bert().eval(), tmp_path / "peft")
    torch.testing.assert_close(output(loaded, tokens), output(theirs, tokens), rtol=0, atol=1e-5)


def convolutions():
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 6, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 1))
    return torch.nn.Sequential(*layers).eval()


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_go_both_ways(tmp_path, use_dora):
    x = torch.randn(2, 3, 8, 8)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "use_dora": use_dora}
    model = randomise_all(apply_lora(convolutions(), LoRAConfig(**options)))
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(convolutions(), tmp_path / "ours").eval()
    torch.testing.assert_close(peft(x), model(x), rtol=1e-4, atol=1e-4)

    theirs = randomise_all(get_peft_model(convolutions(), LoraConfig(**options)).eval())
    theirs.save_pretrained(tmp_path / "peft")
    loaded = load_adapter(convolutions(), tmp_path / "peft")
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-4, atol=1e-4)


def randomise_all(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return randomise(model)


def random_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_go_both_ways(bert, tokens, tmp_path, bias):
    model = random_biases(ours(bert, bias=bias))
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(peft, tokens), output(model, tokens), rtol=0, atol=1e-5)

    theirs = random_biases(randomise(get_peft_model(bert(), LoraConfig(**OPTIONS, bias=bias)).eval()))
    theirs.save_pretrained(tmp_path / "peft")
    for target in (bert().eval(), ours(bert, bias=bias)):
        load_adapter(target, tmp_path / "peft")
        torch.testing.assert_close(output(target, tokens), output(theirs, tokens), rtol=0, atol=1e-5)


def test_modules_saved_whole_go_to_peft(bert, tokens, tmp_path):
    model = ours(bert, modules_to_save=["LayerNorm"])
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(output(peft, tokens), output(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "lora_fa", "lora_xs", "sora", "dylora", "dora"])
def test_every_method_comes_back(bert, tokens, tmp_path, method):
    model = ours(bert, method=method, rank_pattern={})
    save_adapter(model, tmp_path)
    fresh = load_adapter(bert().eval(), tmp_path)
    again = load_adapter(ours(bert, method=method, rank_pattern={}), tmp_path)
    assert torch.equal(output(fresh, tokens), output(model, tokens))
    assert torch.equal(output(again, tokens), output(model, tokens))


def test_peft_refuses_methods_it_does_not_know(bert, tmp_path):
    save_adapter(ours(bert, method="sora"), tmp_path)
    with pytest.raises((ValueError, KeyError), match="LORA_KERNELS"):
        PeftModel.from_pretrained(bert(), tmp_path)


def state_of(model):
    classes = [(name, type(module)) for name, module in model.named_modules()]
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return classes, flags, {name: t.clone() for name, t in model.state_dict().items()}


def assert_refused(model, folder, error, match):
    classes, flags, tensors = state_of(model)
    with pytest.raises(error, match=match):
        load_adapter(model, folder)
    after_classes, after_flags, after = state_of(model)
    assert after_classes == classes and after_flags == flags
    assert after.keys() == tensors.keys() and all(torch.equal(after[k], tensors[k]) for k in tensors)


def _truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors at all")


def _pickle_only(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def _pickle_in_disguise(folder):
    torch.save({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def _edit_weights(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, path)

    return edit


def _edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


FAULTS = {
    "truncated": (_truncate, ValueError, "safetensors file"),
    "garbage": (_garbage, ValueError, "safetensors file"),
    "pickle only": (_pickle_only, ValueError, "never loaded"),
    "pickle in disguise": (_pickle_in_disguise, ValueError, "safetensors file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "weights"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config"),
    "missing key": (_edit_weights(lambda t, k: t.pop(k)), ValueError, "1 missing"),
    "unknown key": (_edit_weights(lambda t, k: t.update(extra=torch.ones(1))), ValueError, "1 unknown"),
    "wrong shape": (_edit_weights(lambda t, k: t.update({k: torch.ones(9, 9)})), ValueError, "shape"),
    "integers": (_edit_weights(lambda t, k: t.update({k: t[k].long()})), ValueError, "floating"),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "JSON"),
    "config a list": (lambda f: (f / "adapter_config.json").write_text("[]"), ValueError, "JSON object"),
    "another PEFT type": (_edit_config(peft_type="IA3"), ValueError, "peft_type"),
    "DoRA without magnitudes": (_edit_config(use_dora=True), ValueError, "missing"),
    "CorDA": (_edit_config(init_lora_weights="corda"), ValueError, "init_lora_weights"),
    "bias": (_edit_config(bias="some"), ValueError, "bias"),
    "biases absent": (_edit_config(bias="all"), ValueError, "missing"),
    "rank": (_edit_config(r=-1), ValueError, "r:"),
    "no such target": (_edit_config(target_modules=["absent"]), ValueError, "target_modules"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_bad_checkpoint_changes_nothing(bert, saved, fault, adapted):
    damage, error, match = FAULTS[fault]
    damage(saved)
    if adapted and fault in ("no such target", "biases absent", "DoRA without magnitudes"):
        pytest.skip("an adapted model knows its targets and what it trains")
    assert_refused(ours(bert) if adapted else bert(), saved, error, match)


def test_a_failed_save_leaves_the_old_files(bert, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    import lora_kernels.integrations.checkpoint as module

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(ours(bert), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saving_an_unknown_adapter(bert, tmp_path):
    with pytest.raises(ValueError, match="adapter_name: expected one of default"):
        save_adapter(ours(bert), tmp_path, "absent")
