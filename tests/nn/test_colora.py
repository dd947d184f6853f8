"""CoLoRA's layers and net."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.nn.methods.colora import CoLoRALinear, CoLoRANet, Periodic, evolve_gates

WIDE = torch.float64


def shake(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_the_layer_and_its_gradients():
    torch.manual_seed(0)
    layer, x = CoLoRALinear(5, 4, 3, dtype=WIDE), torch.randn(2, 6, 5, dtype=WIDE, requires_grad=True)
    assert sum(p.numel() for p in layer.parameters()) == 5 * 4 + 4 + 3 * (5 + 4)
    start = layer(x, torch.randn(2, 1, 3, dtype=WIDE))
    torch.testing.assert_close(start, F.linear(x, layer.weight, layer.bias))
    shake(layer)
    for width in (1, 3):
        gate = torch.randn(2, 1, width, dtype=WIDE, requires_grad=True)
        y = layer(x, gate)
        want = torch.stack(
            [
                F.linear(one, layer.weight + layer.lora_B * g[0] @ layer.lora_A, layer.bias)
                for one, g in zip(x, gate, strict=True)
            ]
        )
        torch.testing.assert_close(y, want)
        leaves, dy = [x, gate, *layer.parameters()], torch.randn_like(y)
        for one, other in zip(
            torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
        ):
            torch.testing.assert_close(one, other)
    zero, one, two = (layer(x, torch.full((1, 1, 1), float(g), dtype=WIDE)) for g in (0, 1, 2))
    torch.testing.assert_close(zero, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(two - one, one - zero)  # affine in the gate


def test_the_periodic_layer():
    layer = shake(Periodic(2, 3, 1.5, dtype=WIDE))
    x = torch.randn(4, 2, dtype=WIDE)
    waves = torch.cos(2 * math.pi / 1.5 * x[:, None] + layer.phase)
    torch.testing.assert_close(layer(x), (layer.amplitude * waves).mean(-1) + layer.bias)
    torch.testing.assert_close(layer(x + 1.5), layer(x))


def test_the_net():
    torch.manual_seed(0)
    for full in (False, True):
        net = CoLoRANet(1, 2, width=5, depth=3, r=2, full=full, period=1.0, dtype=WIDE)
        x, mu_t = torch.rand(4, 7, 1, dtype=WIDE), torch.randn(4, 2, dtype=WIDE)
        same = net(x, mu_t)
        torch.testing.assert_close(same, net(x, mu_t + 1))  # B = 0: the start knows no gate
        shake(net)
        u = net(x, mu_t)
        assert u.shape == (4, 7, 1) and not torch.allclose(u, net(x, mu_t + 1))
        gates = net.hyper(mu_t).unflatten(-1, net.gates)
        assert gates.shape == (4, 3, 2 if full else 1)
        torch.testing.assert_close(net.at(x, gates), u)


def test_gates_that_follow_an_equation():
    """One layer is linear in its gates: where u falls towards the base net's, they fall to zero alike."""
    torch.manual_seed(0)
    net = shake(CoLoRANet(1, 2, width=5, depth=1, r=3, full=True, period=1.0, dtype=WIDE))
    x, start, zero = (
        torch.randn(20, 1, dtype=WIDE),
        torch.randn(1, 3, dtype=WIDE),
        torch.zeros(1, 3, dtype=WIDE),
    )

    def rate(u, points):
        return -2 * (u(points) - net.at(points, zero))

    times = torch.linspace(0, 1, 21, dtype=WIDE)
    found = evolve_gates(net, start, rate, x, times.tolist())
    want = start * torch.exp(-2 * times)[:, None, None]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"gates: expected shape \(1, 3\), got \(2, 2\)"):
        evolve_gates(net, torch.ones(2, 2), rate, x, [0.0, 1.0])
    with pytest.raises(ValueError, match="rate: expected the shape of u"):
        evolve_gates(net, start, lambda u, points: u(points)[:3], x, [0.0, 1.0])
