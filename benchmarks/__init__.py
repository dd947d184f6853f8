"""Benchmarks of lora-kernels; ``python -m benchmarks`` runs them. See ``benchmarks/README.md``."""

import os
import sys

# Threads stay on their cores and wait awake: where a scheduler packs two on one, times double at random.
STEADY = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"}

if "torch" not in sys.modules:  # OpenMP reads them once, when torch loads it
    for name, value in STEADY.items():
        os.environ.setdefault(name, value)
