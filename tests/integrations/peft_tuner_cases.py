"""A configuration of each PEFT tuner that has fused layers: what the tests of ``accelerate`` go over."""

from typing import NamedTuple

from peft import (
    AdaLoraConfig,
    DeloraConfig,
    FourierFTConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OSFConfig,
    PeanutConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    WaveFTConfig,
)

from lora_kernels.integrations.tuners import (
    adalora,
    delora,
    fourierft,
    gralora,
    hira,
    hra,
    loha,
    lokr,
    miss,
    osf,
    peanut,
    psoft,
    pvera,
    randlora,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)


class Case(NamedTuple):
    # Makes the PEFT config with the test's options.
    config: type
    # The class that takes over.
    fused: type
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


ONLY_LINEAR = ("Linear",)

CASES = {
    "adalora": Case(
        AdaLoraConfig, adalora.FusedAdaLora, {"init_r": 4, "target_r": 3, "total_step": 100}, "lora_dropout"
    ),
    "fourierft": Case(
        FourierFTConfig, fourierft.FusedFourierFT, {"n_frequency": 9, "scaling": 20.0}, half_exact=True
    ),
    "peanut": Case(PeanutConfig, peanut.FusedPeanut, {"r": 3}, kinds=("Linear",)),
    "waveft": Case(WaveFTConfig, waveft.FusedWaveFT, {"n_frequency": 9, "scaling": 3.0}, compiles=False),
    "hra": Case(HRAConfig, hra.FusedHra, {"r": 4}, kinds=("Linear",)),
    "hira": Case(HiraConfig, hira.FusedHira, {"r": 3}, "hira_dropout", torch_dropout=True),
    "loha": Case(LoHaConfig, loha.FusedLoHa, {"r": 3}, kinds=ONLY_LINEAR),
    "loha of rank 1": Case(LoHaConfig, loha.FusedLoHa, {"r": 1}, kinds=ONLY_LINEAR),
    "lokr": Case(LoKrConfig, lokr.FusedLoKr, {"r": 1, "decompose_both": True}, kinds=ONLY_LINEAR),
    "lokr whole": Case(LoKrConfig, lokr.FusedLoKr, {"r": 6}, kinds=ONLY_LINEAR),
    "vera": Case(VeraConfig, vera.FusedVera, {"r": 5, "projection_prng_key": 1}, "vera_dropout"),
    "vblora": Case(
        VBLoRAConfig, vblora.FusedVBLora, {"r": 3, "num_vectors": 6, "vector_length": 4}, "vblora_dropout"
    ),
    "delora": Case(DeloraConfig, delora.FusedDelora, {"r": 5}, "module_dropout", ONLY_LINEAR),
    "tinylora": Case(TinyLoraConfig, tinylora.FusedTinyLora, {"r": 5, "u": 3}, "tinylora_dropout"),
    "unilora": Case(UniLoraConfig, unilora.FusedUniLora, {"r": 5, "theta_d_length": 9}, "unilora_dropout"),
    "psoft": Case(PsoftConfig, psoft.FusedPsoft, {"r": 5}, "psoft_dropout", ONLY_LINEAR),
    "miss": Case(MissConfig, miss.FusedMiss, {"r": 4}, "miss_dropout", ONLY_LINEAR),
    "miss_uneven": Case(MissConfig, miss.FusedMiss, {"r": 5}, None, ONLY_LINEAR),
    "miss_mini": Case(
        MissConfig, miss.FusedMiss, {"r": 4, "mini_r": 2, "init_weights": "mini"}, "miss_dropout", ONLY_LINEAR
    ),
    "miss_bat": Case(MissConfig, miss.FusedMiss, {"r": 4, "init_weights": "bat"}, None, ONLY_LINEAR),
    "gralora": Case(
        GraloraConfig, gralora.FusedGraLora, {"r": 4, "alpha": 8}, "gralora_dropout", torch_dropout=True
    ),
    "pvera": Case(PveraConfig, pvera.FusedPvera, {"r": 5}, "pvera_dropout", draws=True),
    "randlora": Case(
        RandLoraConfig, randlora.FusedRandLora, {"r": 3, "randlora_alpha": 3}, "randlora_dropout"
    ),
    "osf": Case(OSFConfig, osf.FusedOsf, {"effective_rank": 3}, kinds=ONLY_LINEAR, unmerges=False),
}
