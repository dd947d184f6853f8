"""Installing without a compiler: pure Python with one warning, or an error where a build is forced."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools")


def build(folder, **environment):
    """``setup.py build`` of a copy of the sources on a machine whose PATH holds no compiler."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "lora_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "build")]
    bare = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC") and not k.startswith("LORA_")}
    environment = {**bare, "PATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_install_is_pure_python(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("installed without its C++ extension: no C++ compiler") == 1
    assert list((tmp_path / "build").rglob("lora_kernels/__init__.py"))
    assert not list((tmp_path / "build").rglob("_C*.so"))


def test_a_forced_build_fails_without_a_compiler(tmp_path):
    done = build(tmp_path, LORA_KERNELS_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "LORA_KERNELS_FORCE_BUILD=1, and the extension was not built: no C++ compiler" in done.stderr


def test_the_build_can_be_skipped(tmp_path):
    done = build(tmp_path, LORA_KERNELS_SKIP_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert "without its C++ extension" not in done.stderr


def settings(code):
    """Runs ``code`` with the names of setup.py in ``s``, without a build."""
    start = "import runpy, setuptools\nsetuptools.setup = lambda **k: None\ns = runpy.run_path('setup.py')\n"
    bare = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=ROOT, env=bare, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_cuda_sources_are_compiled_with_cuda_alone():
    cpu, cuda = (settings(f"print(*s['sources']({flag}))") for flag in (False, True))
    assert "csrc/registration.cpp" in cpu and not any("cuda" in name for name in cpu)
    assert set(cuda) - set(cpu) == {name for name in cuda if name.startswith("csrc/cuda/")}
    assert {Path(name).suffix for name in cuda} == {".cpp", ".cu"}


@pytest.mark.parametrize(
    ("version", "nvcc", "reason"),
    [
        ("None", "True", "this torch was built without CUDA"),
        ("'13.0'", "None", "nvcc was not found"),
        ("'13.0'", "True", "None"),
    ],
)
def test_why_there_are_no_cuda_kernels(version, nvcc, reason):
    code = f"import torch; torch.version.cuda = {version}\n"
    code += f"f = s['cuda_missing']; f.__globals__['cuda_home'] = lambda: {nvcc}; print(f())"
    assert " ".join(settings(code)) == reason


def test_what_is_compiled_for_where_no_card_is_visible():
    code = "import os, torch; torch.cuda.is_available = lambda: False\n"
    code += "s['prepare_cuda'](); print(os.environ['TORCH_CUDA_ARCH_LIST'])\n"
    assert settings(code) == ["8.0;9.0+PTX"]
    assert settings("import os; os.environ['TORCH_CUDA_ARCH_LIST'] = '9.0a'\n" + code) == ["9.0a"]
