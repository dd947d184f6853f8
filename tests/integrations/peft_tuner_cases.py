"""A configuration of each PEFT tuner that has fused layers: what the tests of ``accelerate`` go over."""

from typing import NamedTuple

from peft import VeraConfig

from lora_kernels.integrations.tuners import vera


class Case(NamedTuple):
    # Makes the PEFT config with the test's options.
    config: type
    # The class that takes over.
    fused: type
    # Of the config.
    options: dict
    # The option that is its dropout's probability, or None.
    dropout: str | None = None


CASES = {
    "vera": Case(VeraConfig, vera.FusedVera, {"r": 5, "projection_prng_key": 1}, "vera_dropout"),
}
