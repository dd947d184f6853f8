"""A rule of federated aggregation as a strategy of Flower, which runs real federations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..compose import Server, Upload


def flower_strategy(server: Server, **options: Any) -> Any:
    """A ``flwr.serverapp.strategy.FedAvg`` that aggregates by ``server`` and sends what it sends

    Flower (Beutel et al., 2020, arXiv 2007.14390) samples, sends and waits; our server holds the tensors.
    In a ``ServerApp``, with ``server = FLASC(lora_state_dict(model))``::

        strategy = flower_strategy(server, fraction_train=0.1)
        strategy.start(grid=grid, initial_arrays=first_arrays(server), num_rounds=200)

    A client answers with one record of arrays by the names that it got, and its count of examples, as for
    FedAvg. All clients get the same: one of a lower rank takes :func:`~lora_kernels.compose.truncate_lora`
    of it, and of FLASC's masks those without a client's number hold; its client does what ``server.client``
    does.

    Args:
        server: any :class:`~lora_kernels.compose.Server`.
        options: of Flower's ``FedAvg``.

    Raises:
        ImportError: Flower is not installed (``pip install flwr``).
        TypeError: ``server`` is none.
    """
    if not isinstance(server, Server):
        raise TypeError(f"server: expected a lora_kernels.compose.Server, got {type(server).__name__}")
    return _strategy_class()(server, **options)


def first_arrays(server: Server) -> Any:
    """What the first round sends, as Flower's ``ArrayRecord``."""
    from flwr.app import ArrayRecord

    return ArrayRecord(torch_state_dict=server.send())


def _strategy_class() -> type:
    from flwr.serverapp.strategy import FedAvg

    class ServedFedAvg(FedAvg):  # type: ignore[misc,unused-ignore]
        """FedAvg, but for the rule."""

        def __init__(self, server: Server, **options: Any) -> None:
            super().__init__(**options)
            self.server = server

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
            valid, _ = self._check_and_log_replies(replies, is_train=True)
            if not valid:
                return None, None
            contents = [message.content for message in valid]
            self.server.update([self._upload(content) for content in contents])
            return first_arrays(self.server), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

        def _upload(self, content: Any) -> Upload:
            arrays = next(iter(content.array_records.values()))
            metrics = next(iter(content.metric_records.values()))
            return Upload(arrays.to_torch_state_dict(), float(metrics[self.weighted_by_key]))

    return ServedFedAvg
