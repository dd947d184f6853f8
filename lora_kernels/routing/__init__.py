"""Which adapters a row uses: one protocol, and the mixtures of the literature on the multi-adapter op."""

from __future__ import annotations

from .arrow import Arrow
from .balance import balance_loss
from .base import Experts, Router, Routes, Seen, seen
from .lora_retriever import AdapterIndex, Retrieved
from .loramoe import LoRAMoE, localized_balance_loss
from .mixlora import MixLoRA
from .moa import MoA, domain_loss, majority
from .ramole import RAMoLE
from .saml import SAML, UtteranceRouter, XLoRA, train_by_turns
from .sira import SiRA

__all__ = [
    "SAML",
    "AdapterIndex",
    "Arrow",
    "Experts",
    "LoRAMoE",
    "MixLoRA",
    "MoA",
    "RAMoLE",
    "Retrieved",
    "Router",
    "Routes",
    "Seen",
    "SiRA",
    "UtteranceRouter",
    "XLoRA",
    "balance_loss",
    "domain_loss",
    "localized_balance_loss",
    "majority",
    "seen",
    "train_by_turns",
]
