"""A schedule under the Transformers Trainer, and whatever is built on it (TRL)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn.pairs import lora_pairs
from ..nn.wrappers import unwrapped
from .base import Schedule

if TYPE_CHECKING:
    from transformers import TrainerCallback

FILE = "lora_kernels_schedule.pt"
# Set on a model of ours while the Trainer leaves its frozen weights out of checkpoints.
BASE_LEFT_OUT = "_lora_base_left_out"


def as_callback(schedule: Schedule, *, resume_from: str | Path | None = None) -> TrainerCallback:
    """``Trainer(..., callbacks=[as_callback(schedule)])``

    Steps after each of the optimiser's, while the gradients are still there, with the Trainer's optimiser
    where the schedule has none. Each checkpoint of the Trainer gets a file with the schedule's state, which
    a resumed run reads; a Trainer with several schedules has one file for each key.

    Args:
        schedule: any.
        resume_from: the folder of the checkpoint to go on from, where it is not ``checkpoint-N`` in
            ``output_dir`` nor ``args.resume_from_checkpoint``.

    Raises:
        TypeError: no schedule.
        ImportError: Transformers is not there.
        ValueError: later on, where a resumed run finds no state of this schedule.

    Examples:
        >>> model = apply_lora(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2, target_modules="all-linear"))
        >>> callbacks = [as_callback(ReLoRA(model, torch.optim.AdamW(model.parameters()), every=100))]
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: expected a Schedule, got {type(schedule).__name__}")
    from transformers import TrainerCallback

    name = f"{schedule.key}_{FILE}"

    class Callback(TrainerCallback):
        """Steps the schedule; see :func:`as_callback`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if schedule.optimizer is None:
                schedule.optimizer = kwargs.get("optimizer")
            if state.global_step:
                path = checkpoint(args, state, resume_from) / name
                if not path.exists():
                    raise ValueError(f"resume_from: expected a checkpoint with {name}, got none at {path}")
                saved = torch.load(path, weights_only=True)
                schedule.load_state_dict(saved["state"])
                _load_base(schedule, saved["base"])

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            schedule.step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                saved = {"state": schedule.state_dict(), "base": _base(schedule)}
                torch.save(saved, checkpoint(args, state, None) / name)

    return Callback()


def _base(schedule: Schedule) -> dict[str, Tensor]:
    """The base weights that the schedule changes, where the Trainer saves adapters alone."""
    alone = hasattr(schedule.model, "peft_config") or vars(unwrapped(schedule.model)).get(BASE_LEFT_OUT)
    if not schedule.moves_base or not alone:
        return {}
    return {pair.name: pair.weight for pair in lora_pairs(schedule.model) if pair.weight is not None}


@torch.no_grad()
def _load_base(schedule: Schedule, weights: dict[str, Tensor]) -> None:
    for name, weight in _base(schedule).items():
        weight.copy_(weights[name])


def checkpoint(args: Any, state: Any, given: str | Path | None) -> Path:
    """The folder of the checkpoint at the state's step, or where the run was told to resume from."""
    own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    resumed = args.resume_from_checkpoint
    if given is not None:
        return Path(given)
    return Path(resumed) if not own.exists() and isinstance(resumed, str) else own
