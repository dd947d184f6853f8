from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned):
    """Every op test runs on poisoned memory: a kernel that leaves an element unwritten shows."""
