"""Benchmarks of lora-kernels; ``python -m benchmarks`` runs them. See ``benchmarks/README.md``."""
