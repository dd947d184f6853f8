"""DSiRe: from an adapter's singular values alone, on about how many samples it was trained."""

import torch

from lora_kernels.analysis import DSiRe


def trained(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(samples, 16, generator=generator) for _ in range(2))
    lora_a = (torch.randn(4, 16, generator=generator) / 4).requires_grad_()
    lora_b = torch.zeros(16, 4, requires_grad=True)
    for _ in range(60):
        loss = (x @ lora_a.T @ lora_b.T - y).square().mean()
        grads = torch.autograd.grad(loss, (lora_a, lora_b))
        with torch.no_grad():
            for tensor, grad in zip((lora_a, lora_b), grads, strict=True):
                tensor -= 0.5 * grad
    return {"q_proj": (lora_a.detach(), lora_b.detach())}


sizes = [1, 16, 256] * 5
dsire = DSiRe().fit([trained(size, i) for i, size in enumerate(sizes)], sizes)
print({size: [dsire.predict(trained(size, seed)) for seed in range(100, 105)] for size in (1, 16, 256)})
