"""A configuration of every tuner that PEFT has, for layers of any width."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Options = Callable[[int, int], dict[str, Any]]


def _rank(r: int, width: int) -> dict[str, Any]:
    return {"r": r}


def _lora(**more: Any) -> Options:
    return lambda r, width: {"r": r, "lora_alpha": 2 * r, **more}


def _alike(**options: Any) -> Options:
    return lambda r, width: options


class DenseBlocks:
    """What PEFT's C3A should differentiate: its own backward pass gives x the gradient of the transpose."""

    @staticmethod
    def apply(x: Any, kernel: Any) -> Any:
        """Its forward pass, by the dense matrix of the blocks."""
        from peft.tuners.c3a.utils import get_circulant_fast

        return x @ get_circulant_fast(kernel).T


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inside the ``with`` block PEFT's layers give the gradients of their forward pass, in any dtype.

    AdaMSS casts x to the dtype that W had when the layer was made, and fails where the model was moved since.
    """
    layer: Any = importlib.import_module("peft.tuners.c3a.layer")
    adamss: Any = importlib.import_module("peft.tuners.adamss.layer").Linear
    before = layer.BlockCircularConvolution
    layer.BlockCircularConvolution = DenseBlocks
    adamss.dtype = property(lambda self: self.base_layer.weight.dtype, lambda self, dtype: None)
    try:
        yield
    finally:
        layer.BlockCircularConvolution = before
        del adamss.dtype


@dataclass(frozen=True)
class TunerCase:
    """How one tuner is made.

    ``config``: the name of its class in ``peft``. ``options``: (rank, width that its blocks divide) -> its
    fields. ``low_rank``: whether ΔW is a product of factors of that rank. ``dense``: whether it is a whole
    matrix of another kind made at each step. ``call``: what a call of the layers takes beside x, by samples.
    """

    config: str
    options: Options = _rank
    low_rank: bool = False
    dense: bool = False
    call: Callable[[int], dict[str, Any]] = lambda samples: {}

    def made(self, r: int, width: int, **common: Any) -> Any:
        """PEFT's config."""
        import peft

        return getattr(peft, self.config)(**self.options(r, width), **common)


def _bdlora(r: int, width: int) -> dict[str, Any]:
    import peft

    into, out = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
    blocks = peft.BdLoraConfig(target_modules_bd_b=into, target_modules_bd_a=out, nblocks=2)
    return {"r": r, "lora_alpha": 2 * r, "use_bdlora": blocks}


def _of_lora(name: str, field: str, **given: Any) -> Options:
    """LoRA with the sub-configuration ``name``."""

    def options(r: int, width: int) -> dict[str, Any]:
        import peft.tuners.lora.config as configs

        return {"r": r, "lora_alpha": 2 * r, field: getattr(configs, name)(**given)}

    return options


def _task(samples: int) -> dict[str, Any]:
    import torch

    return {"task_ids": torch.zeros(samples, dtype=torch.long)}


CASES: dict[str, TunerCase] = {
    "lora": TunerCase("LoraConfig", _lora(), low_rank=True),
    "lora_bias": TunerCase("LoraConfig", _lora(lora_bias=True), low_rank=True),
    "dora": TunerCase("LoraConfig", _lora(use_dora=True)),
    "bdlora": TunerCase("LoraConfig", _bdlora, low_rank=True),
    "kasa": TunerCase("LoraConfig", _of_lora("KasaConfig", "kasa_config"), low_rank=True),
    "velora": TunerCase("LoraConfig", _of_lora("VeloraConfig", "velora_config", num_groups=8), low_rank=True),
    "monteclora": TunerCase("LoraConfig", _of_lora("MontecloraConfig", "monteclora_config")),
    "adalora": TunerCase(
        "AdaLoraConfig", lambda r, width: {"init_r": r, "target_r": r, "total_step": 1000}, low_rank=True
    ),
    "adamss": TunerCase("AdamssConfig"),
    "beft": TunerCase("BeftConfig", _alike()),
    "boft": TunerCase("BOFTConfig", _alike(boft_block_size=4)),
    "c3a": TunerCase("C3AConfig", lambda r, width: {"block_size": width}),
    "deft": TunerCase("DeftConfig"),
    "delora": TunerCase("DeloraConfig", low_rank=True),
    "fourierft": TunerCase("FourierFTConfig", lambda r, width: {"n_frequency": 16 * width, "scaling": 1.0}),
    "frod": TunerCase("FrodConfig", _alike(progressbar=False)),
    "glora": TunerCase("GloraConfig"),
    "gralora": TunerCase("GraloraConfig", lambda r, width: {"r": r, "alpha": 2 * r, "gralora_k": 2}),
    "hira": TunerCase("HiraConfig", dense=True),
    "hra": TunerCase("HRAConfig"),
    "ia3": TunerCase("IA3Config", _alike(feedforward_modules=["down_proj"])),
    "lily": TunerCase("LilyConfig", lambda r, width: {"r": r, "stride_A": 1, "num_B": 2}, low_rank=True),
    "loha": TunerCase("LoHaConfig", lambda r, width: {"r": r, "alpha": r}, dense=True),
    "lokr": TunerCase("LoKrConfig", lambda r, width: {"r": r, "alpha": r}, dense=True),
    "miss": TunerCase("MissConfig", low_rank=True),
    "oft": TunerCase("OFTConfig", _alike(oft_block_size=32)),
    "osf": TunerCase("OSFConfig", lambda r, width: {"effective_rank": width - r}),
    "peanut": TunerCase("PeanutConfig"),
    "poly": TunerCase("PolyConfig", lambda r, width: {"r": r, "n_tasks": 1, "n_skills": 2}, call=_task),
    "psoft": TunerCase("PsoftConfig", lambda r, width: {"r": r, "psoft_alpha": r}, low_rank=True),
    "pvera": TunerCase("PveraConfig", low_rank=True),
    "randlora": TunerCase("RandLoraConfig", lambda r, width: {"r": r, "randlora_alpha": r}),
    "road": TunerCase("RoadConfig", lambda r, width: {"group_size": min(64, width)}),
    "shira": TunerCase("ShiraConfig"),
    "supertuning": TunerCase("SupertuningConfig", _alike()),
    "tinylora": TunerCase("TinyLoraConfig", _rank, low_rank=True),
    "unilora": TunerCase("UniLoraConfig", _rank, low_rank=True),
    "vblora": TunerCase(
        "VBLoRAConfig", lambda r, width: {"r": r, "num_vectors": 64, "vector_length": width}, low_rank=True
    ),
    "vera": TunerCase("VeraConfig", low_rank=True),
    "waveft": TunerCase("WaveFTConfig", lambda r, width: {"n_frequency": 16 * width, "scaling": 1.0}),
}

# What has no step of its own on the linears of a block, and why.
WITHOUT_A_STEP: dict[str, str] = {
    "adaption_prompt": "tokens in front of the attention's keys; no linear of the block has an update",
    "alora": "LoRA whose rows begin at tokens of the prompt: the model's own forward says where",
    "arrow": "a mixture of trained adapters, loaded from files; ours is in the suite routing",
    "cartridge": "a cache of keys and values in front of the tokens; no linear has an update",
    "cpt": "tokens in front of the input; no linear has an update",
    "ln_tuning": "it trains the norms; no linear has an update",
    "multitask_prompt_tuning": "tokens in front of the input; no linear has an update",
    "p_tuning": "tokens in front of the input; no linear has an update",
    "prefix_tuning": "keys and values in front of the tokens; no linear has an update",
    "prompt_tuning": "tokens in front of the input; no linear has an update",
    "qalora": "only over a GPTQ base",
    "shadow": "a smaller model beside the whole one; no linear has an update",
    "target_parameters": "3-D parameters of a mixture's experts: the suite moe",
    "trainable_tokens": "rows of the embedding; no linear has an update",
    "xlora": "a mixture of trained adapters, loaded from files; ours is in the suite routing",
}
