"""The suite ``starts``: ours and PEFT's agree, and a start of other factors is found out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks.bench_starts import BENCHMARK, PEFT, Case, check
from benchmarks.suites import Provider, Runner
from lora_kernels.nn import lora_pairs


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", ["corda", "eva", "lora_ga"])
def test_ours_is_that_of_peft(start):
    if start == "corda":
        pytest.importorskip("attr")  # PEFT's CorDA imports it
    assert all(check(provider, Case(start)) is None for provider in BENCHMARK.providers)


def test_other_factors_are_found_out():
    right = BENCHMARK.providers[0]
    assert right.name == PEFT and check(right, Case("lora_ga")) is None

    def build(problem):
        def start(model):
            model = right.build(problem).call(model)
            with torch.no_grad():
                for pair in lora_pairs(model):
                    pair.lora_a.normal_()
                    pair.lora_b.zero_()
                    pair.base.weight.copy_(
                        problem.model.get_submodule(pair.name.split("model.", 2)[-1]).weight
                    )
            return model

        return Runner(start)

    assert "the rows of A are alike by" in check(Provider("wrong", build), Case("lora_ga"))
