from __future__ import annotations

import sys
from pathlib import Path

import pytest

# `benchmarks` is no part of the installed package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import report


@pytest.fixture(autouse=True)
def _held_to_nothing(monkeypatch):
    """Files are named as on a processor that shows all that it has, which `make test-avx2` does not."""
    monkeypatch.setattr(report, "limited", lambda: None)
