"""Our rules under Flower's strategies, given the messages that its clients would answer with."""

from __future__ import annotations

import types

import pytest
import torch

from lora_kernels.compose import FLASC, Server
from lora_kernels.integrations.flower import first_arrays, flower_strategy


def reply(app, state, examples):
    """What the engine hands over; a message of its own can only be made inside a running federation."""
    arrays, metrics = (
        app.ArrayRecord(torch_state_dict=state),
        app.MetricRecord({"num-examples": examples, "loss": 2.0}),
    )
    content = app.RecordDict({"arrays": arrays, "metrics": metrics})
    return types.SimpleNamespace(content=content, has_error=lambda: False)


@pytest.fixture
def app():
    return pytest.importorskip("flwr.app")


def test_a_round_averages_by_examples(app):
    server = Server({"a": torch.zeros(2)})
    strategy = flower_strategy(server, fraction_train=0.5)
    assert strategy.fraction_train == 0.5
    replies = [reply(app, {"a": torch.full((2,), value)}, count) for value, count in ((1.0, 1), (4.0, 2))]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays.to_torch_state_dict()["a"].tolist() == [3.0, 3.0]
    assert metrics["loss"] == pytest.approx(2)
    assert strategy.aggregate_train(2, []) == (None, None)


def test_what_goes_down_is_as_sparse_as_the_server_says(app):
    server = FLASC({"a": torch.arange(1.0, 9)}, d_dl=0.25, d_ul=1.0, lr=0.1)
    assert first_arrays(server).to_torch_state_dict()["a"].count_nonzero() == 2
    arrays, _ = flower_strategy(server).aggregate_train(1, [reply(app, {"a": torch.ones(8)}, 1)])
    assert arrays.to_torch_state_dict()["a"].count_nonzero() == 2
    torch.testing.assert_close(server.state["a"], torch.arange(1.0, 9) - 0.1)


def test_a_server_is_expected():
    with pytest.raises(TypeError, match=r"server: expected a lora_kernels.compose.Server, got dict"):
        flower_strategy({})
