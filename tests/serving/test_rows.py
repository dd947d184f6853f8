"""Which rows of a layer's input are a sample's: known, said, or refused."""

import threading

import pytest
import torch
from torch import nn

from lora_kernels.nn.rows import trial
from lora_kernels.serving import modules
from lora_kernels.serving.modules import apply_multi_lora, remove_multi_lora, use_adapters
from lora_kernels.serving.pool import AdapterPool

NAMES = ["a", "__base__"]


def encoder(batch_first):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first).eval()


def served(model, site, sizes):
    pool, draw = AdapterPool({site: sizes}), torch.Generator().manual_seed(1)
    factors = torch.randn(4, sizes[0], generator=draw), torch.randn(sizes[1], 4, generator=draw)
    pool.register("a", {site: factors})
    return apply_multi_lora(model, pool), factors[1] @ factors[0]


@torch.no_grad()
@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_first_dimension_that_is_time_is_refused(steps):
    """Also where the samples' number divides it."""
    model, _ = served(encoder(False), "linear1", (8, 16))
    with pytest.raises(ValueError, match=rf"one for each of {steps} samples, got 2 \(at 'linear1'"):
        model(torch.randn(steps, 2, 8), adapter_names=NAMES)


@torch.no_grad()
def test_torchs_fast_path_does_not_pass_adapters_by():
    model, delta = served(encoder(True), "linear1", (8, 16))
    merged = encoder(True)
    merged.linear1.weight += delta
    x = torch.randn(2, 5, 8)
    y = model(x, adapter_names=NAMES)
    torch.testing.assert_close(y[:1], merged(x[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1:], encoder(True)(x[1:]), rtol=1e-4, atol=1e-5)
    remove_multi_lora(model)
    assert not model.linear1._forward_pre_hooks


class Flattening(nn.Module):
    """As OPT's decoder layers do it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(x.reshape(-1, 8)).view(*x.shape[:-1], 6)


@torch.no_grad()
def test_flattened_tokens_are_a_samples_where_that_is_said():
    model, delta = served(Flattening(), "fc", (8, 6))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"repeats="):
        model(x, adapter_names=NAMES)
    with use_adapters(model, NAMES, repeats=[3]):
        y = model(x)
    want = Flattening()(x)
    want[0] += x[0] @ delta.T
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_said_rows_are_the_only_ones():
    model, _ = served(Flattening(), "fc", (8, 6))
    with use_adapters(model, NAMES, repeats=[3]), pytest.raises(ValueError, match="each of 4 samples"):
        model(torch.randn(2, 2, 8))


class TimeFirst(Flattening):
    def forward(self, x):
        return self.fc(x.transpose(0, 1)).transpose(0, 1)


@torch.no_grad()
def test_a_second_thread_waits_for_what_the_first_one_finds_out(monkeypatch):
    model, delta = served(TimeFirst(), "fc", (8, 6))
    x, found, threads = torch.randn(2, 4, 8), [], []
    want = TimeFirst()(x)
    want[0] += x[0] @ delta.T

    @torch.no_grad()
    def call():
        found.append(model(x, adapter_names=NAMES))

    def finding_out(*args):
        threads.append(threading.Thread(target=call))
        threads[0].start()
        threads[0].join(0.2)
        return trial(*args)

    monkeypatch.setattr(modules, "trial", finding_out)
    call()
    threads[0].join()
    assert len(found) == 2 and len(threads) == 1
    for y in found:
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
