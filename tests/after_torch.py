"""Programs that start where ``import torch`` has been done, each in a process of its own.

Importing torch takes seconds, and what such a program asks is of what is imported after it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# Forks for each program that it reads of, and writes how it ended.
FORKING = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, environment, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(environment)
        status = 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class AfterTorch:
    """``AfterTorch(folder)(code, NAME=value)`` runs ``code``, in an environment without our variables."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_KERNELS_", "TRITON_"))}
        command, pipe = [sys.executable, "-c", FORKING], subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        self.process.stdin.write(json.dumps([code, environment, str(out), str(err)]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
