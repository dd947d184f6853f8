"""Every family of Transformers that builds in tiny form: merged or not, a model computes the same."""

from __future__ import annotations

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_models import SECONDS, families, inputs_of, limit, tiny_model  # noqa: E402

from lora_kernels import LoRAConfig, apply_lora  # noqa: E402
from lora_kernels.nn import lora_layers, merge_adapters, remove_lora  # noqa: E402
from lora_kernels.nn.sites import layer_types  # noqa: E402

# Routers choose by comparison, and codebooks by distance: a rounding error may choose another.
DISCRETE = ("gate", "router", "classifier", "quantizer", "wg", "q_proj_index")


def run(model, inputs):
    torch.manual_seed(0)  # some draw numbers as they run
    out = model(**inputs)
    tensors = (
        [out] if isinstance(out, torch.Tensor) else [v for v in dict(out).values() if torch.is_tensor(v)]
    )
    return [value for value in tensors if value.is_floating_point()]


def first_that_runs(model):
    reasons = []
    for inputs in inputs_of(model):
        try:
            return inputs, run(model, inputs)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
            reasons.append(f"{', '.join(inputs)}: {str(error)[:80]}")
    pytest.skip(f"takes other inputs: {reasons[0]}")


def built(family):
    try:
        return tiny_model(family)
    except Exception as error:  # whatever a configuration says to sizes that do not go together
        pytest.skip(f"not tiny by the names of its sizes: {' '.join(str(error).split())[:120]}")


def targets(model):
    """All that can have an adapter, and is no chooser."""
    names = []
    for name, module in model.named_modules():
        grouped = getattr(module, "groups", 1) != 1
        if (
            isinstance(module, tuple(layer_types()))
            and not grouped
            and module._parameters.get("weight") is not None
        ):
            names += [name] if not any(word in name.split(".")[-1] for word in DISCRETE) else []
    return names


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_merged_and_unmerged_are_the_same(family):
    with limit(3 * SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(family)
        inputs, base = first_that_runs(model)
        names = "|".join(name.replace(".", r"\.") for name in targets(model))
        apply_lora(model, LoRAConfig(r=2, target_modules=names))
        for layer in lora_layers(model).values():
            for parameter in layer.adapters.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        unmerged = run(model, inputs)
        merge_adapters(model)
        merged = run(model, inputs)
        remove_lora(model)
        again = run(model, inputs)
    assert any(not torch.equal(a, b) for a, b in zip(unmerged, base, strict=True))
    for low, high, plain, bare in zip(unmerged, merged, again, base, strict=True):
        scale = max(float(high.abs().max()), 1e-3)
        assert float((low - high).abs().max()) <= 1e-4 * scale
        assert float((plain - bare).abs().max()) <= 1e-5 * max(float(bare.abs().max()), 1e-3)
