"""What the `spread` mark of a matrix leaves to run always."""

from __future__ import annotations

import pytest


@pytest.mark.spread("a", "b", "c", of=3)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(3))
def test_a_diagonal_runs_always(a, b, c, request):
    left_out = request.node.get_closest_marker("exhaustive") is not None
    assert left_out == ((a + b + c) % 3 != 0)
