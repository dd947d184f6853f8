"""Run by ``make wheel`` where only the wheel and torch are installed: it imports, has its extension, runs."""

import sysconfig
from pathlib import Path

import torch

import lora_kernels
from lora_kernels import _extension, lora_linear, use_backend

where = Path(lora_kernels.__file__).resolve()
assert where.is_relative_to(Path(sysconfig.get_path("purelib")).resolve()), f"imported from {where}"
assert (reason := _extension.load()) is None, reason

grads = {}
for backend in ("reference", "cpp"):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape) for shape in ((9, 40), (24, 40), (5, 40), (24, 5)))
    a.requires_grad_(), b.requires_grad_()
    with use_backend(backend):
        y = lora_linear(x, weight, a, b, dropout_p=0.25)
        y.square().mean().backward()
    grads[backend] = (y.detach(), a.grad, b.grad)
torch.testing.assert_close(grads["cpp"], grads["reference"])
print(f"wheel: lora_kernels {lora_kernels.__version__} runs on its C++ extension")
