"""QA-LoRA's pooled branch, and PEFT's form of it in both directions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import IN, OUT, WIDE, R, agrees, linear, refuses, shaken, trained
from peft import LoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from lora_kernels import LoRAConfig, apply_lora, load_adapter, save_adapter


@pytest.mark.parametrize(("pool", "factor"), [("sum", 1), ("mean", 1 / 3), ("peft", 4 / 3)])
def test_values_and_gradients(pool, factor):
    layer = linear("qalora", group_size=3, pool=pool)
    assert trained(layer) == R * (IN // 3 + OUT)

    def want(adapter, x):
        pooled = x.unflatten(-1, (IN // 3, 3)).sum(-1)
        branch = pooled @ adapter.lora_A.T @ adapter.lora_B.T
        return F.linear(x, layer.weight, layer.bias) + 6 / R * factor * branch

    agrees(layer, torch.randn(2, 5, IN, dtype=WIDE), want)
    one = layer.adapters["default"]
    torch.testing.assert_close(one.delta(), one.by_group().repeat_interleave(3, 1))


def peft_forward(adapter, x, base):
    """PEFT's own lines, which it runs over GPTQ layers alone."""
    name = "default"
    module = SimpleNamespace(
        lora_A={name: SimpleNamespace(weight=adapter.lora_A)},
        lora_B={name: SimpleNamespace(weight=adapter.lora_B)},
        lora_dropout={name: nn.Identity()},
        scaling={name: adapter.lora_alpha / adapter.r},
        qalora_group_size={name: adapter.group},
        training=False,
        in_features=adapter.in_features,
    )
    return QALoraLinearVariant.forward(module, name, x, base)


def test_is_peft_forward_and_its_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=WIDE))
    options = {"pool": "peft", "group_size": 4}
    config = LoRAConfig(r=R, method="qalora", target_modules=["0"], method_options=options)
    x = torch.randn(5, IN, dtype=WIDE)
    shaken(apply_lora(model, config))
    adapter = model[0].adapters["default"]
    want = peft_forward(adapter, x, F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    save_adapter(model, tmp_path)
    theirs = LoraConfig.from_pretrained(tmp_path)
    assert theirs.use_qalora and theirs.qalora_group_size == 4
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "lora_kernels" not in values  # PEFT's fields say it all
    torch.manual_seed(0)
    other = load_adapter(nn.Sequential(nn.Linear(IN, OUT, dtype=WIDE)), tmp_path)
    torch.testing.assert_close(other(x), want, rtol=1e-12, atol=1e-12)


def test_other_pools_are_no_file_of_peft(tmp_path):
    config = LoRAConfig(r=R, method="qalora", target_modules=["0"], method_options={"group_size": 4})
    save_adapter(apply_lora(nn.Sequential(nn.Linear(IN, OUT)), config), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_KERNELS"


def test_bad_options():
    refuses("group_size: qalora expects a divisor of in_features = 12, got 32", method="qalora")
    refuses("pool: expected one of", method="qalora", method_options={"group_size": 4, "pool": "max"})
