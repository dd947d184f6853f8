"""``import lora_kernels`` needs torch alone, and is quick."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPTIONAL = ("triton", "numpy", "peft", "transformers", "safetensors", "rich", "matplotlib")
LIMIT_S = 0.3

BARE = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
import warnings
warnings.simplefilter("ignore")
import torch
import lora_kernels
x = torch.ones(2, 4, requires_grad=True)
y = lora_kernels.lora_linear(x, torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), dropout_p=0.0)
y.sum().backward()
assert y.tolist() == [[8.0] * 3] * 2, y
assert x.grad.tolist() == [[6.0] * 4] * 2, x.grad  # dy W + dy B A
"""
TIMED = f"""
import sys, time
had = set(sys.modules)
start = time.process_time()
import lora_kernels
seconds = time.process_time() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - had}}
print(seconds, *sorted(new & set({OPTIONAL!r})))
"""


def python(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_KERNELS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("skip_extension", ("0", "1"))
def test_torch_is_enough(skip_extension):
    python(BARE, LORA_KERNELS_SKIP_EXTENSION=skip_extension)


def test_import_is_quick_and_brings_nothing_optional(after_torch):
    runs = [after_torch(TIMED).stdout.split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), f"imported: {runs[0][1:]}"
    assert min(float(run[0]) for run in runs) < LIMIT_S


def test_a_call_on_the_cpu_does_not_import_triton(after_torch):
    done = after_torch(
        "import sys, torch, lora_kernels as lk\n"
        "lk.lora_linear(torch.ones(2, 4), None, torch.ones(1, 4), torch.ones(3, 1), dropout_p=0.1)\n"
        "assert 'lora_kernels.kernels' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr
