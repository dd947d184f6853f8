"""SaveAdapterCallback on two processes: one of them writes, and it writes what one process alone would."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "nn")]

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from processes import run  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_trainer import adapted, base, data, trainer  # noqa: E402

from lora_kernels import load_adapter  # noqa: E402
from lora_kernels.integrations import checkpoint as files  # noqa: E402
from lora_kernels.integrations.trainer import SaveAdapterCallback  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
OPTIONS = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa"},
    "owned": {"modules_to_save": ["lm_head"], "bias": "lora_only"},
}
BOTH = [files.WEIGHTS, files.CONFIG]


class Written:
    """The names of the files that this process writes."""

    def __enter__(self):
        self.write, found = files._replace, []
        files._replace = lambda target, how: (found.append(target.name), self.write(target, how))
        return found

    def __exit__(self, *error):
        files._replace = self.write


def under_ddp(rank, name, folder):
    """The Trainer's DDP, half of each batch in each process; then the run goes on from its checkpoint."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the group is there already
    for steps in (2, 4):
        sizes = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
        made = trainer(adapted(**OPTIONS[name]), folder, steps, [SaveAdapterCallback()], **sizes)
        with Written() as written:
            made.train(resume_from_checkpoint=steps == 4)
        assert type(made.model_wrapped).__name__ == "DistributedDataParallel"
        assert written == (BOTH if rank == 0 else []), written


def under_fsdp2(rank, name, folder):
    """Every process gathers, one writes; a split model takes the files again."""
    from torch.distributed.fsdp import fully_shard

    def split():
        model = adapted(**OPTIONS[name])
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    model, ids = split(), torch.stack([one["input_ids"] for one in data()])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    args = SimpleNamespace(output_dir=folder, resume_from_checkpoint=None, should_save=rank == 0)
    with Written() as written:
        SaveAdapterCallback().on_save(args, SimpleNamespace(global_step=2), None, model=model)
    assert written == (BOTH if rank == 0 else []), written
    dist.barrier()
    want = model(input_ids=ids).logits
    whole = load_adapter(base(), Path(folder) / "checkpoint-2")
    torch.testing.assert_close(whole(input_ids=ids).logits, want)
    again = load_adapter(split(), Path(folder) / "checkpoint-2")
    torch.testing.assert_close(again(input_ids=ids).logits, want)


def test_two_processes_write_what_one_does(tmp_path):
    (tmp_path / "logs").mkdir()
    cases = [(under_ddp, name, str(tmp_path / name)) for name in OPTIONS]
    cases += [(under_fsdp2, name, str(tmp_path / f"{name} split")) for name in OPTIONS]
    run(cases, 2, tmp_path / "logs")
    for name, options in OPTIONS.items():
        trainer(adapted(**options), tmp_path / "one" / name, 4, [SaveAdapterCallback()]).train()
        for step in (2, 4):
            folder = tmp_path / "one" / name / f"checkpoint-{step}"
            got = load_file(tmp_path / name / folder.name / files.WEIGHTS)
            want = load_file(folder / files.WEIGHTS)
            assert got.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {step} {key}")
