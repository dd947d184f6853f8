"""Every registered structure in mixed batches and over quantised bases, or a refusal that names it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import IN, OUT, new_layer, options, run, shake
from torch import nn

from lora_kernels import multi_lora_linear, save_adapter, stack_adapters
from lora_kernels.adapters import METHODS, LoRAConfig
from lora_kernels.adapters.lowered import low_rank_of
from lora_kernels.integrations.pool import load_into_pool
from lora_kernels.nn import LoRALinear, QuantizedLinear, apply_lora, remove_lora
from lora_kernels.serving.lowered import lower_adapter
from lora_kernels.serving.modules import apply_multi_lora, pool_linears, use_adapters
from lora_kernels.serving.pool import AdapterPool

# What comes down to no A, B and s, and why.
UNSERVED = {
    "dora": "a magnitude",
    "rst_lora": "a scale for each token",
    "lorpman": "a preference for each call",
    "ta_lora": "a core for each task",
    "vlora": "an A for each sample",
    "loretta_adp": "an activation",
    "lofit": "the base's input",
    "mora": "a square of full rank",
    "quanta": "a chain of gates",
    "fourierft": "as many terms as those of its case",
    "lokr": "a Kronecker product",
    "smt": "blocks of W",
    "neft": "rows of W",
    **dict.fromkeys(("mixlora", "loramoe", "sira", "arrow", "ramole"), "weights of each row"),
    **dict.fromkeys(("moa", "saml", "xlora"), "weights of each sample"),
}
every_method = pytest.mark.parametrize("method", sorted(METHODS))
served = pytest.mark.parametrize("method", sorted(set(METHODS) - set(UNSERVED)))


class Block(nn.Module):
    """Two linears of different shapes, one below a name with a dot."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"q_proj": nn.Linear(IN, OUT)})
        self.back = nn.Linear(OUT, IN)

    def forward(self, x):
        return self.back(torch.tanh(self.inner["q_proj"](x)))


def new_model():
    torch.manual_seed(0)
    return Block()


@every_method
def test_multi_lora_linear_computes_it_or_it_is_refused_by_name(method):
    layer = shake(new_layer(method))
    adapter, x = layer.adapters["default"], torch.randn(5, IN, dtype=torch.float64)
    if method in UNSERVED:
        with pytest.raises(ValueError, match=f"method: {method} has no A, B and s"):
            low_rank_of(adapter)
        return
    lora_a, lora_b, scaling = low_rank_of(adapter)
    assert not (lora_a.requires_grad or lora_b.requires_grad)
    other = torch.randn(3, IN, dtype=torch.float64), torch.randn(OUT, 3, dtype=torch.float64)
    stack = stack_adapters([other[0], lora_a], [other[1], lora_b], [0.5, scaling])
    y = multi_lora_linear(x, layer.weight, stack, torch.tensor([1, -1, 0, 1, 1]), bias=layer.bias)
    rows = [0, 3, 4]
    torch.testing.assert_close(y[rows], run(layer, x[rows], method), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y[1], F.linear(x[1], layer.weight, layer.bias))


@served
def test_a_pool_serves_it_from_the_model_and_from_its_file(method, tmp_path):
    model = new_model()
    config = LoRAConfig(target_modules=["q_proj", "back"], **options(method))
    shake(apply_lora(model, config))
    x = torch.randn(2, 3, IN)
    want = model(x)
    factors, scalings = lower_adapter(model)
    save_adapter(model, tmp_path)
    plain = new_model()
    pool = AdapterPool(pool_linears(plain, ["q_proj", "back"]), pages=256, max_rank=96)
    pool.register("lowered", factors, scalings)
    load_into_pool(pool, tmp_path, "loaded")
    bare = plain(x)
    apply_multi_lora(plain, pool)
    for name in ("lowered", "loaded"):
        with use_adapters(plain, [name, "__base__"]):
            y = plain(x)
        torch.testing.assert_close(y[0], want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[1], bare[1])
    remove_lora(model)


@pytest.mark.parametrize("method", sorted(set(UNSERVED) & set(METHODS)))
def test_a_pool_refuses_the_file_by_name_and_stays_as_it_was(method, tmp_path):
    model = new_model()
    try:
        apply_lora(model, LoRAConfig(target_modules=["q_proj", "back"], **options(method)))
    except ValueError:
        pytest.skip("its options fit one layer alone")
    save_adapter(model, tmp_path)
    pool = AdapterPool(pool_linears(new_model(), ["q_proj", "back"]))
    with pytest.raises(ValueError, match=method):
        load_into_pool(pool, tmp_path, "one")
    assert len(pool) == 0


@every_method
@pytest.mark.parametrize("format", ["nf4", "int8", "fp8"])
def test_over_every_quantised_base_or_a_refusal_by_name(method, format):
    torch.manual_seed(0)
    base = QuantizedLinear.from_linear(nn.Linear(IN, OUT), format)
    config = LoRAConfig(**options(method))
    if not METHODS[method].over_quantized:
        with pytest.raises(ValueError, match=f"(?i){method}"):
            LoRALinear.from_linear(base, config)
        return
    layer = shake(LoRALinear.from_linear(base, config))
    x = torch.randn(4, IN, requires_grad=True)
    y = run(layer, x, method)
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
    if METHODS[method].mergeable:
        want = F.linear(x, layer.merged_weight(), layer.bias)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    if method not in UNSERVED:
        lora_a, lora_b, scaling = low_rank_of(layer.adapters["default"])
        delta = multi_lora_linear(x, None, stack_adapters([lora_a], [lora_b], scaling), torch.zeros(4).long())
        torch.testing.assert_close(base(x) + delta, y, rtol=1e-4, atol=1e-4)
