"""A configuration of each PEFT tuner that has fused layers: what the tests of ``accelerate`` go over."""

from typing import NamedTuple

import peft

from lora_kernels.integrations.peft import TAKEOVERS
from lora_kernels.testing.peft_tuners import CASES as TUNERS


class Case(NamedTuple):
    # Of `lora_kernels.testing.peft_tuners`, which says what its config is called.
    tuner: str
    # Of the config.
    options: dict
    # The option that is its dropout's probability, or None.
    dropout: str | None = None
    # The layers it goes on.
    kinds: tuple[str, ...] = ("Linear", "Conv1D")
    # Whether its dropout's bits are torch's, not those of our kernels.
    torch_dropout: bool = False
    # Whether PEFT computes in float32 where the model is in float64.
    half_exact: bool = False
    # Whether torch.compile traces PEFT's part of it.
    compiles: bool = True
    # Whether it draws noise by ``torch.randn_like``.
    draws: bool = False
    # Whether PEFT can take it out of a weight again.
    unmerges: bool = True
    # Whether several adapters are in PEFT's forward what they are merged.
    adds_up: bool = True

    @property
    def config(self):
        """Makes the PEFT config with the test's options."""
        return getattr(peft, TUNERS[self.tuner].config)

    @property
    def fused(self):
        """The class that takes over PEFT's linear."""
        layers = self.config.__module__.replace(".config", ".layer")
        kinds = (kind for kind in TAKEOVERS if kind.__module__ == layers and kind.__name__.endswith("Linear"))
        return TAKEOVERS[next(kinds)].fused


ONLY_LINEAR = ("Linear",)

CASES = {
    "adalora": Case("adalora", {"init_r": 4, "target_r": 3, "total_step": 100}, "lora_dropout"),
    "fourierft": Case("fourierft", {"n_frequency": 9, "scaling": 20.0}, half_exact=True),
    "peanut": Case("peanut", {"r": 3}, kinds=("Linear",)),
    "waveft": Case("waveft", {"n_frequency": 9, "scaling": 3.0}, compiles=False),
    "hra": Case("hra", {"r": 4}, kinds=("Linear",)),
    "hira": Case("hira", {"r": 3}, "hira_dropout", torch_dropout=True),
    "loha": Case("loha", {"r": 3}, kinds=ONLY_LINEAR),
    "loha of rank 1": Case("loha", {"r": 1}, kinds=ONLY_LINEAR),
    "lokr": Case("lokr", {"r": 1, "decompose_both": True}, kinds=ONLY_LINEAR),
    "lokr whole": Case("lokr", {"r": 6}, kinds=ONLY_LINEAR),
    "vera": Case("vera", {"r": 5, "projection_prng_key": 1}, "vera_dropout"),
    "vblora": Case("vblora", {"r": 3, "num_vectors": 6, "vector_length": 4}, "vblora_dropout"),
    "delora": Case("delora", {"r": 5}, "module_dropout", ONLY_LINEAR),
    "tinylora": Case("tinylora", {"r": 5, "u": 3}, "tinylora_dropout"),
    "unilora": Case("unilora", {"r": 5, "theta_d_length": 9}, "unilora_dropout"),
    "psoft": Case("psoft", {"r": 5}, "psoft_dropout", ONLY_LINEAR),
    "glora": Case("glora", {"r": 3, "init_weights": False}, kinds=ONLY_LINEAR),
    "glora vector": Case(
        "glora", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, kinds=ONLY_LINEAR
    ),
    "adamss": Case("adamss", {"r": 4, "num_subspaces": 3, "subspace_rank": 2}, kinds=ONLY_LINEAR),
    "deft": Case("deft", {"r": 3, "alpha": 5}, "deft_dropout", torch_dropout=True, half_exact=True),
    "deft qr": Case("deft", {"r": 3, "decomposition_method": "qr"}, half_exact=True),
    "frod": Case(
        "frod", {"sparse_rate": 0.2, "progressbar": False}, "frod_dropout", torch_dropout=True, compiles=False
    ),
    "miss": Case("miss", {"r": 4}, "miss_dropout", ONLY_LINEAR),
    "miss_uneven": Case("miss", {"r": 5}, None, ONLY_LINEAR),
    "miss_mini": Case("miss", {"r": 4, "mini_r": 2, "init_weights": "mini"}, "miss_dropout", ONLY_LINEAR),
    "miss_bat": Case("miss", {"r": 4, "init_weights": "bat"}, None, ONLY_LINEAR),
    "gralora": Case("gralora", {"r": 4, "alpha": 8}, "gralora_dropout", torch_dropout=True),
    "pvera": Case("pvera", {"r": 5}, "pvera_dropout", draws=True),
    "randlora": Case("randlora", {"r": 3, "randlora_alpha": 3}, "randlora_dropout"),
    "c3a": Case("c3a", {"block_size": 4}, kinds=ONLY_LINEAR, half_exact=True, adds_up=False),
    "boft": Case("boft", {"boft_block_size": 2}, kinds=ONLY_LINEAR),
    "osf": Case("osf", {"effective_rank": 3}, kinds=ONLY_LINEAR, unmerges=False),
}
