"""What to adapt and how, with PEFT's field names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..init import find as find_initialiser
from .base import method as find_method

BIAS_MODES = ("none", "all", "lora_only")


@dataclass
class LoRAConfig:
    """ΔW = s · B A with s = lora_alpha / r, or lora_alpha / √r for ``use_rslora``.

    Args:
        r: rank.
        lora_alpha: numerator of s.
        target_modules: which linears: a list of names (each matches itself and every dotted name that
            ends in it), a regular expression that matches the whole dotted name, or ``"all-linear"``.
        exclude_modules: names or an expression, matched likewise, to leave out.
        lora_dropout: probability in [0, 1) on the branch's input.
        bias: which biases train: ``"none"``, ``"all"`` or ``"lora_only"`` (those of adapted linears).
        use_rslora: rsLoRA's scaling.
        modules_to_save: ends of the names of further modules to train and save whole.
        lora_bias: whether a bias trains beside B; on linears and convolutions with ``method="lora"``.
        alora_invocation_tokens: Activated LoRA: the adapter acts from where these token numbers last begin,
            on linears of a model whose forward takes ``input_ids``.
        target_parameters: ends of the names of parameters that hold the matrices of all experts of a mixture
            (``"experts.gate_up_proj"``), for Transformers' expert modules with ``method="lora"`` and no
            dropout; with them ``target_modules`` may be ``None`` or empty.
        trainable_token_indices: token numbers whose rows of the input embedding train, or the end of an
            embedding's name -> such numbers; the output head's rows too where the model ties it.
        ensure_weight_tying: whether what shares a weight with one of these goes on sharing it.
        init_lora_weights: ``True`` (Kaiming-uniform A, zero B), ``False`` (both random), or a name in
            ``lora_kernels.init.INITIALISERS``, PEFT's among them; that one's options go into
            ``method_options``, and the statistics that some need into :func:`apply_lora`.
        rank_pattern: expression for the end of a dotted name -> r.
        alpha_pattern: expression for the end of a dotted name -> lora_alpha.
        layers_to_transform: the numbers of the blocks whose linears are adapted, with a list of
            ``target_modules``; by default all. A linear outside numbered blocks is then none of them.
        layers_pattern: names of the list of blocks (``"layers"``), where the first number in a dotted name
            is not the block's.
        use_dora: DoRA, the same as ``method="dora"``.
        method: which parametrisation of A and B; see ``lora_kernels.adapters.METHODS``.
        method_options: options of that method, and of the initialiser.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range; the message names it.

    Examples:
        >>> config = LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        >>> config.method
        'lora'
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    alora_invocation_tokens: list[int] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    method: str = "lora"
    method_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_rank("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected 0 <= lora_dropout < 1, got {self.lora_dropout}")
        _check_choice("bias", self.bias, BIAS_MODES)
        if not isinstance(self.init_lora_weights, (bool, str)):
            kind = type(self.init_lora_weights).__name__
            raise TypeError(f"init_lora_weights: expected a bool or a str, got {kind}")
        find_initialiser(self.init_lora_weights)
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save: expected a list of names, got the str {self.modules_to_save!r}"
            )
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)  # type: ignore[assignment]
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters: expected a list, got the str {self.target_parameters!r}")
        self.target_parameters = _names("target_parameters", self.target_parameters)  # type: ignore[assignment]
        _check_pattern("rank_pattern", self.rank_pattern, _check_rank)
        _check_pattern("alpha_pattern", self.alpha_pattern, _check_number)
        if self.trainable_token_indices is not None:
            self.trainable_token_indices = _token_rows(self.trainable_token_indices)
        self._check_layers()
        self._settle_method()
        self._check_variant()
        self._check_options()

    def _check_layers(self) -> None:
        """Numbers and names of blocks, which narrow a list of names and nothing else."""
        numbers = self.layers_to_transform
        if isinstance(numbers, Iterable) and not isinstance(numbers, str):
            self.layers_to_transform = numbers = list(numbers)
        for number in numbers if isinstance(numbers, list) else [0 if numbers is None else numbers]:
            _check_index("layers_to_transform", number)
        if isinstance(self.layers_pattern, str):
            self.layers_pattern = [self.layers_pattern]
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        for name in self.layers_pattern or ():
            _check_expression("layers_pattern", name)
        if self.layers_pattern and numbers is None:
            raise ValueError("layers_pattern: expected it with layers_to_transform, got it alone")
        if numbers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: expected None beside the target_modules"
                f" {self.target_modules!r}, which say themselves which blocks are meant, got {numbers}"
            )

    def _settle_method(self) -> None:
        """``use_dora`` and ``method`` say the same."""
        if self.use_dora and self.method not in ("lora", "dora"):
            raise ValueError(f"use_dora: expected False for the method {self.method!r}, got True")
        self.method = "dora" if self.use_dora else self.method
        self.use_dora = self.method == "dora"

    def _check_variant(self) -> None:
        """What only LoRA itself has, one at a time."""
        if not isinstance(self.lora_bias, bool):
            raise TypeError(f"lora_bias: expected a bool, got {type(self.lora_bias).__name__}")
        if self.alora_invocation_tokens is not None:
            self.alora_invocation_tokens = _token_numbers(
                "alora_invocation_tokens", self.alora_invocation_tokens
            )
        for name in ("lora_bias", "alora_invocation_tokens", "target_parameters"):
            if getattr(self, name) and self.method != "lora":
                raise ValueError(f"{name}: expected it with the method 'lora', got {self.method!r}")
        if self.target_parameters:
            self._check_target_parameters()
        if self.lora_bias and self.alora_invocation_tokens:
            raise ValueError("lora_bias: expected False beside alora_invocation_tokens, got True")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            init = self.init_lora_weights
            raise ValueError(f"lora_bias: expected init_lora_weights=True or False with it, got {init!r}")

    def _check_target_parameters(self) -> None:
        for name in ("lora_dropout", "lora_bias", "alora_invocation_tokens"):
            value = getattr(self, name)
            if value:
                raise ValueError(f"target_parameters: expected no {name} with it, got {value!r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            init = self.init_lora_weights
            raise ValueError(
                f"target_parameters: expected init_lora_weights True, False or 'gaussian', got {init!r}"
            )

    def _check_options(self) -> None:
        known = find_method(self.method).options | find_initialiser(self.init_lora_weights).options
        for key in self.method_options:
            if key not in known:
                want = ", ".join(sorted(known)) or "none"
                raise ValueError(f"method_options: {self.method} takes {want}, got {key!r}")

    def for_module(self, name: str) -> LoRAConfig:
        """The same config with the rank and the alpha that the patterns give the module ``name``."""
        r = _lookup(self.rank_pattern, name, self.r)
        alpha = _lookup(self.alpha_pattern, name, self.lora_alpha)
        if r == self.r and alpha == self.lora_alpha:
            return self
        return dataclasses.replace(self, r=r, lora_alpha=alpha)


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a rank of at least 1, got {value}")


def _check_index(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected numbers of blocks, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected numbers of at least 0, got {value}")


def _token_rows(value: Any) -> list[int] | dict[str, list[int]]:
    """Token numbers, each once; by the end of a name where that is given."""
    name = "trainable_token_indices"
    named = value if isinstance(value, dict) else {"": value}
    found = {}
    for key, tokens in named.items():
        if not isinstance(key, str):
            raise TypeError(f"{name}: expected names of embeddings, got {key!r}")
        found[key] = _token_numbers(name, tokens)
        if len(set(found[key])) < len(found[key]):
            raise ValueError(f"{name}: expected each token number once, got {found[key]}")
    return found if isinstance(value, dict) else found[""]


def _token_numbers(name: str, value: Any) -> list[int]:
    """A list of token numbers, at least one."""
    if isinstance(value, (str, dict)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of token numbers, got {type(value).__name__}")
    numbers = list(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name}: expected token numbers, got {number!r}")
        if number < 0:
            raise ValueError(f"{name}: expected token numbers of at least 0, got {number}")
    if not numbers:
        raise ValueError(f"{name}: expected at least one token number, got none")
    return numbers


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_expression(name: str, expression: Any) -> None:
    if not isinstance(expression, str):
        raise TypeError(f"{name}: expected str, got {type(expression).__name__}")
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}: {expression!r} is not a regular expression ({error})") from None


def _check_pattern(name: str, pattern: Any, check: Any) -> None:
    if not isinstance(pattern, dict):
        raise TypeError(f"{name}: expected a dict, got {type(pattern).__name__}")
    for key, value in pattern.items():
        _check_expression(name, key)
        check(f"{name}[{key!r}]", value)


def _names(name: str, value: Any) -> list[str] | str | None:
    """``value`` as a list of names, or the expression or ``None`` that it is."""
    if value is None:
        return None
    if isinstance(value, str):
        _check_expression(name, value)
        return value
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of names or a str, got {type(value).__name__}")
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    for item in names:
        if not isinstance(item, str):
            raise TypeError(f"{name}: expected names, got {item!r}")
    return names


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the whole of ``name`` or what follows one of its dots."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
