"""What is made of several adapters: one merged of them, and the rules of federated aggregation."""

from __future__ import annotations

from .feddecomp import FedDecompClient, split_state
from .flasc import FLASC, topk_mask
from .merging import Merging, combine, merge_factors
from .replication import ReplicationServer, aggregate_lora, truncate_lora
from .rounds import Server, Traffic, Upload, fed_average, payload_bytes, run_round
from .weighted import add_weighted_adapter

__all__ = [
    "FLASC",
    "FedDecompClient",
    "Merging",
    "ReplicationServer",
    "Server",
    "Traffic",
    "Upload",
    "add_weighted_adapter",
    "aggregate_lora",
    "combine",
    "fed_average",
    "merge_factors",
    "payload_bytes",
    "run_round",
    "split_state",
    "topk_mask",
    "truncate_lora",
]
