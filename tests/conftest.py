from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Before triton or lora_kernels are imported: Triton decides at import whether it interprets.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest


def pytest_addoption(parser):
    parser.addoption("--peft-tests", metavar="DIR", help="PEFT's tests, for tests/peft_suite")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """What `spread` leaves out is exhaustive: the rest has each value of every parameter that it names,
    as a diagonal of their product, and not each with each. A value's place is the one at which it came
    first: pytest's own indices may count the items, and a sum of those is no diagonal."""
    seen = {}
    for item in items:
        spread = item.get_closest_marker("spread")
        if spread is None:
            continue
        test, places = item.nodeid.partition("[")[0], []
        for name in spread.args:
            found = seen.setdefault((test, name), {})
            places.append(found.setdefault(id(item.callspec.params[name]), len(found)))
        if sum(places) % spread.kwargs["of"]:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``made_once(name, make)``: a folder that ``make(folder)`` filled, by one process of the run for all.

    What a fixture compiles would be compiled by each worker that a test of it falls to.
    """
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder_of(name, make):
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                unfinished.mkdir(exist_ok=True)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def after_torch(tmp_path_factory):
    """``after_torch(code, NAME=value)`` runs a program where ``import torch`` has been done."""
    from after_torch import AfterTorch

    runner = AfterTorch(tmp_path_factory.mktemp("after_torch"))
    yield runner
    runner.close()


@pytest.fixture
def poisoned():
    """New memory comes filled, floats with NaN and integers with their maximum.

    torch's own switch, so that what C++ and Triton launchers allocate is filled as well.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def any_backend():
    """Leaves the backend as it was, whatever the test did to it."""
    from lora_kernels import _backend

    before = _backend._active
    yield
    _backend._active = before


@pytest.fixture
def pretended_card(monkeypatch):
    """A card of compute capability 9.0 and its kernels: what is chosen can be asked on tensors of the CPU."""
    from lora_kernels import _backend
    from lora_kernels.ops import _decode

    def fits_but_for_the_device(device_type, dtype, rank):
        if dtype not in _backend.CUDA_DTYPES:
            return f"its kernels take float16 and bfloat16, not {dtype}"
        return None if 1 <= rank <= _backend.CUDA_MAX_RANK else f"its kernels take rank 1 to 256, not {rank}"

    monkeypatch.setattr(_backend, "_cuda_unavailable", fits_but_for_the_device)
    monkeypatch.setattr(_decode, "_card", lambda device: (227 * 1024, 9))
