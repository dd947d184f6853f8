"""Benchmarks of lora-kernels; ``python -m benchmarks`` runs them. See ``benchmarks/README.md``."""

import os
import sys

# Threads stay on their cores and wait awake: where a scheduler packs two on one, times double at random.
STEADY = {"OMP_PROC_BIND": "true", "OMP_WAIT_POLICY": "active"}

# What `python -m benchmarks…` has there while it looks for its module: a program that imports this keeps its
# threads. OpenMP reads them once, when torch loads it.
if sys.argv[:1] == ["-m"] and "torch" not in sys.modules:
    for name, value in STEADY.items():
        os.environ.setdefault(name, value)
