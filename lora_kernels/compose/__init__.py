"""What is made of several adapters: one merged of them, one pass of all, PPO, federated rules."""

from __future__ import annotations

from .denoising import SwitchSchedule, composite_forward
from .feddecomp import FedDecompClient, split_state
from .flasc import FLASC, topk_mask
from .merging import Merging, combine, merge_factors
from .preference import draw_preference, orthogonal_penalty
from .psim import PSIM, psim_flag, reset_labels
from .regions import RegionLoRA, composer_loss, region_masks, region_row_index, region_self_attn_mask
from .replication import ReplicationServer, aggregate_lora, truncate_lora
from .rlhf import PENALTIES, Rollout, gae, kl_penalty, ppo_loss, token_rewards, whiten
from .rounds import Server, Traffic, Upload, fed_average, payload_bytes, run_round
from .together import forward_each
from .weighted import add_weighted_adapter

__all__ = [
    "FLASC",
    "PENALTIES",
    "PSIM",
    "FedDecompClient",
    "Merging",
    "RegionLoRA",
    "ReplicationServer",
    "Rollout",
    "Server",
    "SwitchSchedule",
    "Traffic",
    "Upload",
    "add_weighted_adapter",
    "aggregate_lora",
    "combine",
    "composer_loss",
    "composite_forward",
    "draw_preference",
    "fed_average",
    "forward_each",
    "gae",
    "kl_penalty",
    "merge_factors",
    "orthogonal_penalty",
    "payload_bytes",
    "ppo_loss",
    "psim_flag",
    "region_masks",
    "region_row_index",
    "region_self_attn_mask",
    "reset_labels",
    "run_round",
    "split_state",
    "token_rewards",
    "topk_mask",
    "truncate_lora",
    "whiten",
]
