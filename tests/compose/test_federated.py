"""Federated rules against loops in fp64, and what each promises of a round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.compose import (
    FLASC,
    FedDecompClient,
    ReplicationServer,
    Server,
    Upload,
    aggregate_lora,
    fed_average,
    payload_bytes,
    run_round,
    split_state,
    topk_mask,
    truncate_lora,
)


def factors(rank, cols=5, out=4):
    return torch.randn(rank, cols, dtype=torch.float64), torch.randn(out, rank, dtype=torch.float64)


def slice_by_slice(clients, weights, pad):
    """The rule, one rank slice and one client at a time."""
    top, total = max(len(a) for a, _ in clients), sum(weights)
    a, b = [], []
    for j in range(top):
        own = [(w, one) for w, one in zip(weights, clients, strict=True) if len(one[0]) > j]
        over = total if pad == "zero" else sum(w for w, _ in own)
        a.append(sum(w * one[0][j] for w, one in own) / over)
        b.append(sum(w * one[1][:, j] for w, one in own) / over)
    return torch.stack(a), torch.stack(b, 1)


@pytest.mark.parametrize("pad", ["zero", "replicate"])
def test_aggregation_is_the_loop_over_slices(pad):
    torch.manual_seed(0)
    clients, weights = [factors(r) for r in (1, 4, 2, 4)], [1.0, 2.0, 0.5, 3.0]
    got, want = aggregate_lora(clients, weights, pad), slice_by_slice(clients, weights, pad)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert [tuple(t.shape) for t in truncate_lora(*got, 2)] == [(2, 5), (4, 2)]


def test_slices_of_one_client_are_its_own_and_equal_ranks_are_averaged():
    torch.manual_seed(0)
    short, tall = factors(2), factors(4)
    a, b = aggregate_lora([short, tall, short], [1, 1, 2])
    torch.testing.assert_close((a[2:], b[:, 2:]), (tall[0][2:], tall[1][:, 2:]))
    zero = aggregate_lora([short, tall, short], [1, 1, 2], "zero")
    torch.testing.assert_close(zero[0][2:], tall[0][2:] / 4)
    for pad in ("zero", "replicate"):
        one, other = factors(3), factors(3)
        torch.testing.assert_close(aggregate_lora([one, other], pad=pad)[0], (one[0] + other[0]) / 2)


def test_a_round_of_unequal_ranks_moves_their_bytes():
    state = dict(zip(("l.lora_A", "l.lora_B"), factors(4), strict=True)) | {"bias": torch.ones(3)}
    server = ReplicationServer(state, {0: 2, 1: 4})
    seen = {}

    def client(number):
        def train(state):
            seen[number] = {name: tuple(tensor.shape) for name, tensor in state.items()}
            return Upload({name: tensor + number for name, tensor in state.items()})

        return train

    traffic = run_round(server, {0: client(0), 1: client(1)})
    assert seen[0] == {"l.lora_A": (2, 5), "l.lora_B": (4, 2), "bias": (3,)}
    assert traffic.down == (2 + 4) * (5 + 4) * 8 + 2 * 3 * 4
    torch.testing.assert_close(server.state["l.lora_A"][:2], state["l.lora_A"][:2] + 0.5)
    torch.testing.assert_close(server.state["l.lora_A"][2:], state["l.lora_A"][2:] + 1)
    before = server.state["l.lora_A"].clone()
    run_round(server, {0: client(0)})  # nobody here owns the last slices
    assert torch.equal(server.state["l.lora_A"][2:], before[2:])


def test_average_counts_samples():
    states = [
        {"w": torch.tensor([1.0]), "n": torch.tensor(3)},
        {"w": torch.tensor([4.0]), "n": torch.tensor(9)},
    ]
    got = fed_average(states, [1, 2])
    assert got["w"].item() == 3.0 and got["n"].item() == 3


def models(count):
    made = []
    for seed in range(count):
        torch.manual_seed(7)
        base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        torch.manual_seed(seed)
        made.append(apply_lora(base, LoRAConfig(r=2, target_modules="all-linear")))
    return made


def fitter(log):
    def fit(model, parameters, epochs):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(epochs):
            optimizer.zero_grad()
            model(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        log.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})

    return fit


def test_feddecomp_trains_in_two_phases_and_keeps_adapters_at_home():
    log, members = [], models(3)
    clients = {i: FedDecompClient(model, fitter(log), personal_epochs=3) for i, model in enumerate(members)}
    server = Server(split_state(members[0])[0])
    traffic = run_round(server, clients)
    for personal, shared in zip(log[::2], log[1::2], strict=True):
        assert personal and all("adapters" in name for name in personal)
        assert shared and not any("adapters" in name for name in shared)
    assert not any("adapters" in name for name in server.state)
    assert traffic.up <= 3 * sum(t.nbytes for t in split_state(members[0])[0].values())
    run_round(server, clients)
    kept = [split_state(model)[1] for model in members]
    for client, model in clients.items():
        model.model.load_state_dict({**server.send(client), **kept[client]})
    a = [split_state(model)[0]["0.weight"] for model in members]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(*[next(iter(one.values())) for one in kept[:2]])


def shifted(state):
    return {
        name: tensor + torch.linspace(-1, 2, tensor.numel()).view_as(tensor) for name, tensor in state.items()
    }


def adapters():
    torch.manual_seed(0)
    return {"a": torch.randn(3, 7), "b": torch.randn(5, 4)}


def test_flasc_of_density_one_is_fed_adam():
    state = adapters()
    server = FLASC(state, d_dl=1.0, d_ul=1.0, lr=0.1)
    twin = [nn.Parameter(tensor.clone()) for tensor in state.values()]
    optimizer = torch.optim.AdamW(twin, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        run_round(server, {i: server.client(i, shifted) for i in range(4)})
        for parameter, after in zip(twin, shifted(dict(enumerate(twin))).values(), strict=True):
            parameter.grad = sum(parameter.detach() - after.detach() for _ in range(4)) / 4
        optimizer.step()
    for got, want in zip(server.state.values(), twin, strict=True):
        assert torch.equal(got, want)


def test_flasc_sends_what_its_densities_say():
    state, seen = adapters(), []
    count = sum(tensor.numel() for tensor in state.values())
    server = FLASC(state, d_dl=0.25, d_ul=lambda client: 0.5 if client else 0.1)

    def train(state):
        seen.append(sum(int(tensor.count_nonzero()) for tensor in state.values()))
        return shifted(state)

    traffic = run_round(server, {0: server.client(0, train), 1: server.client(1, train)})
    assert seen == [int(0.25 * count)] * 2
    assert traffic == (2 * int(0.25 * count) * 4, (int(0.1 * count) + int(0.5 * count)) * 4)
    assert topk_mask(torch.tensor([3.0, -5.0, 3.0, 1.0]), 0.5).tolist() == [True, True, False, False]


def test_flasc_clips_each_change_and_draws_its_noise_by_seed():
    server = FLASC(adapters(), d_dl=1.0, d_ul=1.0, clip=0.5)
    upload = server.client(0, shifted)(server.send(0))
    norm = torch.cat([tensor.flatten() for tensor in upload.state.values()]).norm()
    assert norm == pytest.approx(0.5, rel=1e-5)
    results = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        server = FLASC(adapters(), clip=0.5, noise=1.0, lr=0.1, generator=generator)
        run_round(server, {0: server.client(0, shifted)})
        results.append(server.state["a"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


A = torch.ones(2, 3)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: aggregate_lora([]), "states: expected those of at least one client"),
        (lambda: aggregate_lora([(A, A)]), r"clients: expected A \[r, in\] and B \[out, r\], got \(2, 3\)"),
        (lambda: aggregate_lora([(A, A.T)], pad="copy"), "pad: expected one of replicate, zero, got 'copy'"),
        (lambda: aggregate_lora([(A, A.T)], [0.0]), "weights: expected 1 of at least 0"),
        (lambda: truncate_lora(A, A.T, 3), "rank: expected 1 to 2, got 3"),
        (lambda: fed_average([{"a": A}, {"b": A}]), "states: expected the same names in all, got a in some"),
        (
            lambda: fed_average([{"a": A}, {"a": A.T}]),
            r"states: expected one shape of a, got \(2, 3\), \(3, 2\)",
        ),
        (lambda: Server({}), "state: expected at least one tensor"),
        (lambda: run_round(Server({"a": A}), {}), "clients: expected at least one"),
        (lambda: ReplicationServer({"a": A}, {}), "state: expected tensors named lora_A and lora_B"),
        (lambda: ReplicationServer({"lora_A": A}, {3: 5}), "ranks: expected 1 to 2, got 5 of client 3"),
        (lambda: FLASC({"a": A}, d_dl=2), "d_dl: expected 0 to 1, got 2"),
        (lambda: FLASC({"a": A}, clip=0), "clip: expected a number above 0"),
        (lambda: FLASC({"a": A}, noise=1), "noise: expected at least 0, and above 0 only with clip, got 1"),
        (lambda: split_state(nn.Linear(2, 2)), "model: expected one with adapters"),
        (lambda: FedDecompClient(models(1)[0], None, samples=-1), "samples: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_payload_counts_what_is_not_zero():
    assert payload_bytes({"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2, dtype=torch.float64)}) == 4 + 16
