"""VB-LoRA: factors put together from a bank of vectors that all layers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Adapter, register
from ..call import Call
from ..config import LoRAConfig
from ..peft_form import PeftForm
from ..site import Site, Start
from ..update import LowRank

_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def _decode(tensors: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Logits log w of the chosen vectors, and -∞ of the others, where PEFT wrote k - 1 of the w alone."""
    found = {key: value for key, value in tensors.items() if not key.endswith((_INDICES, _WEIGHTS))}
    for key, chosen in tensors.items():
        given = tensors.get(key.removesuffix(_INDICES) + _WEIGHTS)
        if key.endswith(_INDICES) and given is not None:
            weights = torch.cat([given, 1 - given.sum(-1, keepdim=True)], -1)
            count = config.method_options.get("num_vectors", 256)
            logits = weights.new_full((*weights.shape[:-1], count), -torch.inf)
            found[key.removesuffix(_INDICES)] = logits.scatter(-1, chosen.long(), weights.log())
    return found


@register("vblora")
class VBLoRA(Adapter):
    """ΔW = B A, each run of b elements of a row of A or a column of B being Σ_k softmax(top-k(l))_k · V_k

    VB-LoRA (Li et al., 2024, arXiv 2405.15179). The bank V ``[h, b]``, one for all layers, and the logits
    ``vblora_logits_A`` ``[r, in/b, h]`` and ``vblora_logits_B`` ``[out/b, r, h]`` train; there is no α.
    Options, PEFT's: ``num_vectors`` h (256), ``vector_length`` b (256), which divides in and out, ``topk`` k
    (2), ``init_vector_bank_bound`` (0.02), ``init_logits_std`` (0.1). ΔW starts near zero, not at it. Of a
    file that has the k chosen weights alone (``save_only_topk_weights``) the choice stays what it is.
    """

    options = frozenset(("num_vectors", "vector_length", "topk", "init_vector_bank_bound", "init_logits_std"))
    zero_start = False
    peft_form = PeftForm(
        "VBLORA",
        {"vblora_dropout": "lora_dropout"},
        {name: name for name in sorted(options)},
        unread=frozenset({"save_only_topk_weights"}),
        shared=frozenset({"vblora_vector_bank"}),
        decode=_decode,
    )

    def build(self, site: Site) -> Start:
        """Normal logits, and the bank where this layer is the first."""
        count, length = site.whole_option("num_vectors", 256), site.whole_option("vector_length", 256)
        self.topk = site.whole_option("topk", 2)
        if self.topk > count:
            raise ValueError(f"method_options: topk: expected at most num_vectors = {count}, got {self.topk}")
        site.must_divide("vector_length", length, "in_features", "out_features")
        bound, std = site.option("init_vector_bank_bound", 0.02), site.option("init_logits_std", 0.1)
        bank = site.shared("vblora_vector_bank", lambda: site.empty(count, length).uniform_(-bound, bound))
        logits_a = site.normal(self.r, site.in_features // length, count, std=std)
        logits_b = site.normal(site.out_features // length, self.r, count, std=std)
        return Start({"vblora_logits_A": logits_a, "vblora_logits_B": logits_b, "vblora_vector_bank": bank})

    def lower(self, x: Tensor | None = None, call: Call | None = None) -> LowRank:
        """Composes A and B."""
        return LowRank(
            *composed(self.vblora_logits_A, self.vblora_logits_B, self.vblora_vector_bank, self.topk)
        )


def composed(logits_a: Tensor, logits_b: Tensor, bank: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of logits ``[r, in/b, h]`` and ``[out/b, r, h]`` for a bank."""
    lora_a = _vectors(logits_a, bank, topk).flatten(1)
    return lora_a, _vectors(logits_b, bank, topk).transpose(1, 2).flatten(0, 1)


def _vectors(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """The sub-vectors ``[..., b]`` that logits ``[..., h]`` stand for."""
    chosen, indices = logits.topk(topk, -1)
    # A product of the two and `bank[indices]` take a third longer, most of it in the gradients.
    return (chosen.softmax(-1)[..., None] * F.embedding(indices, bank)).sum(-2)
