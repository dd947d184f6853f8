"""A PEFT model with adapters that act, run once: its output and gradients."""

from __future__ import annotations

import contextlib

import torch


def randomise(model):
    """B, which PEFT starts at zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def run(model, tokens, autocast=None):
    """The logits, or the last hidden state, and the gradient of every trainable parameter."""
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        output = model(input_ids=tokens)
    y = output.logits if hasattr(output, "logits") else output.last_hidden_state
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


def assert_same_when_checkpointed(model, tokens):
    """Dropout's bits too, which the backward pass draws again."""
    torch.manual_seed(5)
    plain = run(model, tokens)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    checkpointed = run(model, tokens)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])
