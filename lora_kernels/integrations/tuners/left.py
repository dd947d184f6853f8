"""Why layers of PEFT's tuners stay PEFT's: measured, or by the form of what they compute."""

from __future__ import annotations

# The package of a tuner below `peft.tuners` -> why the layers of it that nothing takes over stay PEFT's.
# Measured: a step of 512 rows through a linear of 1024 by 1024, r=32, float32, on a CPU.
LEFT: dict[str, str] = {
    "beft": "a bias is added, which is one pass over y",
    "ia3": "measured: a frozen linear takes 0.91 x its step, and the passes over y or x that are above that"
    " are any form's",
    "lily": "measured: 0.97 x PEFT's with what is fused; its time is in the base product and the router",
    "ln_tuning": "it trains the norm's own weight, which is no linear",
    "oft": "measured: 1.03 x PEFT's with x turned in one product and a shorter Cayley transform",
    "poly": "measured: 0.98 to 1.02 x PEFT's; its time is in mixing the factors of each sample",
    "road": "measured: 0.97 x PEFT's, on a block 1.0, with three passes over y and seven back",
    "shira": "W and a sparse matrix are one product, in PEFT too",
    "supertuning": "W and a sparse matrix are one product, in PEFT too",
    "trainable_tokens": "rows of an embedding replaced: no linear",
}

# Of the libraries that quantise a base layer, the module of PEFT's layers -> the library's name.
QUANTIZED = {
    "aqlm": "AQLM",
    "awq": "AWQ",
    "bnb": "bitsandbytes",
    "eetq": "EETQ",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "inc": "Intel Neural Compressor",
    "te": "Transformer Engine",
    "torchao": "torchao",
}


def why_class_left(kind: type) -> str:
    """Why layers of PEFT's class ``kind``, which nothing takes over, stay PEFT's."""
    _, _, tuner, *rest = kind.__module__.split(".")
    if rest and rest[-1] in QUANTIZED:
        return f"its base layer is one of {QUANTIZED[rest[-1]]}, which no fused form of {tuner} reads"
    return LEFT.get(tuner, f"{kind.__module__}.{kind.__name__} has no fused form")
