"""The CUDA kernels compiled for each target with no card: no spill, and the instructions that were meant."""

import json

import pytest

pytest.importorskip("triton")

from lora_kernels.kernels import cuda_static

pytestmark = pytest.mark.skipif(cuda_static.missing() is not None, reason=str(cuda_static.missing()))
# Three thread blocks of 160 threads on a multiprocessor.
MOST_REGISTERS = 65536 // (3 * 160) // 8 * 8


@pytest.fixture(scope="module", params=cuda_static.TARGETS)
def reports(request):
    return request.param, list(cuda_static.inspect(request.param))


def test_every_kernel_is_there(reports):
    target, rows = reports
    two = {("decode_shrink", 16), ("decode_expand", 16)}
    one = {("decode_cluster", 16), ("decode_cluster", 8)} if target == "90a" else set()
    for dtype in ("bf16", "fp16"):
        assert {(r.kernel, r.rows) for r in rows if r.dtype == dtype} == two | one


def test_no_spill_and_few_registers(reports):
    for row in reports[1]:
        assert row.spills == 0, f"{row} spills"
        assert row.registers <= MOST_REGISTERS, f"{row}: fewer thread blocks fit than were meant"
        assert row.shared <= 1024, f"{row}: shared memory that the layout does not know of"


def test_the_instructions_that_were_meant(reports):
    for row in reports[1]:
        cluster = row.kernel == "decode_cluster"
        assert row.counts["mma"] > 0 and row.counts["matrix_loads"] > 0, row
        assert (row.counts["bulk_copies"] > 0) == cluster, row
        assert (row.counts["async_copies"] > 0) == (not cluster), row
        # The first arrive and wait, and the last, of both kinds of warps.
        assert (row.counts["cluster_barriers"] >= 6) == cluster, row
        assert row.counts["mbarriers"] > 0 or row.target == "sm_80", row


def test_the_table_names_what_it_counts(capsys, monkeypatch):
    report = cuda_static.Report("decode_cluster", "bf16", 16, "sm_90a", 99, 1024, 0, {"mma": 3})
    monkeypatch.setattr(cuda_static, "inspect", lambda target: [report])
    cuda_static.print_table([90], as_json=True)
    assert json.loads(capsys.readouterr().out)["mma"] == 3
    cuda_static.print_table(None, as_json=False)
    assert capsys.readouterr().out.splitlines()[0].split() == [
        *cuda_static.COLUMNS,
        *cuda_static.INSTRUCTIONS,
    ]
