"""Triton kernels and their launchers; the same stems as ``reference/``. Imports triton."""
