"""How PEFT writes the methods that it has besides LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .config import LoRAConfig

# Fields that all of PEFT's tuners of linears have under LoRA's names.
_COMMON = ("r", "target_modules", "exclude_modules", "bias", "modules_to_save")


class PeftForm(NamedTuple):
    """A method's ``adapter_config.json`` and the names of its tensors, as PEFT has them."""

    # Its peft_type.
    peft_type: str
    # PEFT's field -> a field of LoRAConfig.
    fields: Mapping[str, str] = {}
    # PEFT's field -> an option of the method, of the same default.
    options: Mapping[str, str] = {}
    # What the file's fields have to be for it to be of this method, and options that this stands for.
    constants: Mapping[str, Any] = {}
    implied: Mapping[str, Any] = {}
    # Fields of which nothing is needed here.
    unread: frozenset[str] = frozenset()
    # Tensors that all layers share, which are `base_model.<name>` in the file.
    shared: frozenset[str] = frozenset()
    # The tensors that the file's, by key, stand for.
    decode: Callable[[dict[str, Tensor], LoRAConfig], dict[str, Tensor]] | None = None

    def values(self, config: LoRAConfig) -> dict[str, Any] | None:
        """The file's fields, or ``None`` where PEFT's tuner has not what ``config`` says."""
        given = config.method_options
        patterns = config.rank_pattern or config.alpha_pattern
        undropped = config.lora_dropout and "lora_dropout" not in self.fields.values()
        rows = config.trainable_token_indices
        if self.peft_type != "LORA" and (patterns or rows or undropped or config.bias == "lora_only"):
            return None
        if any(given.get(name) != value for name, value in self.implied.items()):
            return None
        found = {name: getattr(config, name) for name in _COMMON}
        found |= {theirs: getattr(config, ours) for theirs, ours in self.fields.items()}
        found |= {theirs: given[ours] for theirs, ours in self.options.items() if ours in given}
        return {**found, **self.constants, "peft_type": self.peft_type}

    def reads(self, values: Mapping[str, Any]) -> bool:
        """Whether the file with these fields is of this method."""
        wanted = {**self.constants, "peft_type": self.peft_type}
        return all(values.get(name) == value for name, value in wanted.items())

    def known(self) -> set[str]:
        """The fields that a file may set."""
        return {*_COMMON, *self.fields, *self.options, *self.constants, *self.unread}

    def config_fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a LoRAConfig from the file's, but for those of the same name."""
        options = {ours: values[name] for name, ours in self.options.items() if values.get(name) is not None}
        found = {ours: values[name] for name, ours in self.fields.items() if values.get(name) is not None}
        return {**found, "method_options": {**options, **self.implied}}
