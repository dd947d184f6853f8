"""Structures that are not of low rank: each a branch of its own beside the linear, and no ΔW in memory."""
