"""Checkpoints of the Transformers Trainer that hold adapters of ``apply_lora`` alone, in PEFT's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..init import GIVEN
from ..nn.adapted import lora_configs, lora_layers, lora_state_dict
from ..nn.wrappers import unwrapped
from ..schedules.callback import BASE_LEFT_OUT, checkpoint
from .checkpoint import file_contents, write_files


class SaveAdapterCallback(TrainerCallback):
    """``Trainer(..., callbacks=[SaveAdapterCallback()])`` for a model of :func:`apply_lora`

    Each checkpoint gets ``adapter_config.json`` and ``adapter_model.safetensors``, which PEFT and
    :func:`load_adapter` read: of the adapter ``default`` in its own folder, of others in folders of their
    names, as PEFT does. Of several processes one writes. ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` work, on a model adapted anew by the same config. (The Trainer saves PEFT's
    models so by itself.)

    Args:
        whole_model: whether ``model.safetensors`` in a checkpoint has the frozen weights too. Without them it
            has what trains, and W where a start took a part of it (PiSSA, OLoRA, CorDA, …);
            ``trainer.save_model`` writes the whole model once training has ended.

    Raises:
        ValueError: later on, where the model has no adapters of :func:`apply_lora`.

    Examples:
        >>> from lora_kernels.integrations.trainer import SaveAdapterCallback
        >>> callbacks = [SaveAdapterCallback()]
    """

    def __init__(self, *, whole_model: bool = False) -> None:
        self.whole_model = whole_model
        self._ignored: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the Trainer loads a checkpoint, so that what is missing there is not warned of."""
        self._leave_out(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As before: an earlier run may have ended."""
        self._leave_out(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The files of each adapter, beside the Trainer's: every process gathers, those that save write."""
        for name, folder in _folders(kwargs["model"], checkpoint(args, state, None)):
            contents = file_contents(kwargs["model"], name)
            if args.should_save:
                write_files(folder, contents)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on the whole model is saved."""
        model: Any = unwrapped(kwargs["model"])
        if vars(model).pop(BASE_LEFT_OUT, False):
            model._keys_to_ignore_on_save = self._ignored

    def _leave_out(self, model: nn.Module) -> None:
        """Lets Transformers leave frozen weights out of what it saves."""
        inner: Any = unwrapped(model)
        if not lora_configs(inner):
            raise ValueError(
                f"model: expected adapters of apply_lora, got a {type(inner).__name__} without (the Trainer"
                " saves PEFT's models in this way by itself)"
            )
        if self.whole_model or vars(inner).get(BASE_LEFT_OUT) or not hasattr(inner, "save_pretrained"):
            return
        self._ignored = getattr(inner, "_keys_to_ignore_on_save", None)
        inner._keys_to_ignore_on_save = {*(self._ignored or ()), *_frozen(inner)}
        vars(inner)[BASE_LEFT_OUT] = True


def _frozen(model: nn.Module) -> Iterator[str]:
    """Keys of the parameters that training leaves as they were; buffers may change without gradients."""
    own, taken = lora_state_dict(model), _taken_from(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and name not in own and id(parameter) not in taken:
            yield name


def _taken_from(model: nn.Module) -> set[int]:
    """The weights that a start took a part of."""
    return {
        id(layer.base_weight)
        for layer in lora_layers(model).values()
        if any(hasattr(adapter, GIVEN[0]) for adapter in layer.adapters.values())
    }


def _folders(model: nn.Module, folder: Path) -> Iterator[tuple[str, Path]]:
    for name in lora_configs(model):
        yield name, folder if name == "default" else folder / name
