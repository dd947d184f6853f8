"""What is made of several adapters: the rules of federated aggregation, and a simulated round."""

from __future__ import annotations

from .feddecomp import FedDecompClient, split_state
from .flasc import FLASC, topk_mask
from .replication import ReplicationServer, aggregate_lora, truncate_lora
from .rounds import Server, Traffic, Upload, fed_average, payload_bytes, run_round

__all__ = [
    "FLASC",
    "FedDecompClient",
    "ReplicationServer",
    "Server",
    "Traffic",
    "Upload",
    "aggregate_lora",
    "fed_average",
    "payload_bytes",
    "run_round",
    "split_state",
    "topk_mask",
    "truncate_lora",
]
