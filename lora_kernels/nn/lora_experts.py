"""The drop-in module: Transformers' experts with named adapters on their 3-D parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LoRAConfig, Site
from ..adapters.expert_lora import ExpertFactors, ExpertLoRA, Stack, side_by_side
from .adapter_layer import _HALF, AdapterLayer
from .expert_parameters import experts_forward, is_routed, why_not_experts
from .exposed import layer_class
from .layer_weights import OWN

# What the buffers begin with that hold the own parameters of a merged module.
_KEPT = "_own_"


class LoRAExperts(AdapterLayer):
    """Σ_j w_tj · D_e act(U_e x_t), e = index_tj, each of U and D with Σ_i s_i · B_ie A_ie over the active i

    A Transformers module of experts (it is one: same parameters) whose rows are sorted by expert once and
    computed by :func:`lora_kernels.grouped_lora_linear`: no ΔW and no W + ΔW, but where it is merged. Made by
    :func:`apply_lora` with ``LoRAConfig(target_parameters=…)``. Adapters are of the parameters' dtype, or
    float32 on a half-precision one.
    """

    base_type = nn.Module
    adapters: Any

    @property
    def _own_weight(self) -> Any:
        return self._parameters["down_proj"]

    @property
    def base_weight(self) -> Tensor:
        """A parameter of the module's, for its device and dtype."""
        kept = self._buffers.get(f"{_KEPT}down_proj")
        return self._own_weight if kept is None else kept  # type: ignore[no-any-return]

    bare_weight = base_weight

    def reset_parameters(self) -> None:
        """Draws every adapter anew."""
        for adapter in self.adapters.values():
            adapter.reset_parameters()

    def make_adapter(self, config: LoRAConfig, *, parameters: Iterable[str] = (), **where: Any) -> Adapter:
        """An adapter on these parameters; :meth:`add_adapter` adds it."""
        name, stacks = where.get("name", ""), {}
        for one in parameters:
            experts, *sizes = self._parameters[one].shape  # type: ignore[union-attr]
            out, width = reversed(sizes) if self.is_transposed else sizes  # type: ignore[truthy-bool]
            stacks[one] = Stack(experts, out, width, config.for_module(f"{name}.{one}" if name else one))
        weight = self.base_weight
        dtype = torch.float32 if weight.dtype in _HALF else weight.dtype
        out_features, in_features = weight.shape[1:]
        site = Site("", in_features, out_features, config, None, weight.device, dtype, tensors={})
        return ExpertLoRA(site._replace(**where), stacks)

    def plan_adapter(self, config: LoRAConfig, **where: Any) -> Adapter:
        """:meth:`make_adapter` with its tensors on the meta device."""
        return self.make_adapter(config, **{**where, "device": "meta"})

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """y for x ``[tokens, hidden]``, the experts of each token and their weights."""
        if not self.enabled:
            with self._bare():
                return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        if self.merged or not self.active:
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        x, index, weights = self._routed(args, kwargs)
        return experts_forward(self, x, index, weights, self._factors())

    def _routed(self, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x, the experts of each token and their weights, however the caller names them."""
        own: Any = self.base_type.forward
        _, *given = inspect.signature(own.__wrapped__).bind(self, *args, **kwargs).args
        reason = why_not_experts(self)
        if reason is None and not is_routed(tuple(given)):
            reason = "expected x, the experts of each token and their weights"
        if reason is not None:
            raise ValueError(f"target_parameters: {reason}")
        x, index, weights = given
        return x, index, weights

    def _factors(self) -> dict[str, ExpertFactors]:
        active = [self.adapters[name] for name in self.active]
        names = dict.fromkeys(name for adapter in active for name in adapter.stacks)
        found = {n: side_by_side([a.factors(n) for a in active if n in a.stacks]) for n in names}
        return {name: one for name, one in found.items() if one is not None}

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """Inside the ``with`` block the parameters are the module's own, merged or not."""
        merged = {name: self._parameters[name] for name in self._kept()}
        self._parameters.update(self._kept())  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._parameters.update(merged)

    def _kept(self) -> dict[str, nn.Parameter]:
        """The module's own parameters in whose place there are merged ones."""
        kept = {n.removeprefix(_KEPT): one for n, one in self._buffers.items() if n.startswith(_KEPT)}
        return {name: _parameter(one) for name, one in kept.items()}

    @torch.no_grad()
    def _merged_parameters(self) -> dict[str, nn.Parameter]:
        return {name: _parameter(self._merged_one(name, one)) for name, one in self._factors().items()}

    def _merged_one(self, name: str, factors: ExpertFactors) -> Tensor:
        """W_e + s B_e A_e of every expert, each computed in at least float32 and rounded once."""
        own: Any = {**self._parameters, **self._kept()}[name]
        merged = own.detach().clone()
        wide = torch.promote_types(own.dtype, torch.float32)
        for one, a, b in zip(merged, factors.lora_a.to(wide), factors.lora_b.to(wide), strict=True):
            product = (a.mT, b.mT) if self.is_transposed else (b, a)  # type: ignore[truthy-bool]
            one.copy_(torch.addmm(one.to(wide), *product, alpha=factors.scaling))
        return merged  # type: ignore[no-any-return]

    def merge(self) -> None:
        """Folds the active adapters into the parameters, whose own are kept beside them."""
        if self.merged or not self.active:
            return
        for name, one in self._merged_parameters().items():
            self.register_buffer(_KEPT + name, None, persistent=False)
            self._buffers[_KEPT + name] = self._parameters[name]
            self._parameters[name] = one
        self.merged = self.active

    def unmerge(self) -> None:
        """Undoes :meth:`merge`, bit for bit."""
        for name, one in self._kept().items():
            self._parameters[name] = one
            del self._buffers[_KEPT + name]
            self._non_persistent_buffers_set.discard(_KEPT + name)
        self.merged = ()

    def to_base(self, *, merge: bool = False) -> nn.Module:
        """The module this was, or with ``merge`` the one it has become."""
        base = self.base_type.__new__(self.base_type)
        state = {key: value for key, value in vars(self).items() if key not in OWN}
        for table in ("_modules", "_buffers"):
            kept = state[table].items()
            state[table] = {k: v for k, v in kept if k not in OWN and not k.startswith(_KEPT)}
        own = self._merged_parameters() if merge else {}
        state["_parameters"] = {**self._parameters, **self._kept(), **own}
        held = (one for one in self._non_persistent_buffers_set if one in state["_buffers"])
        state["_non_persistent_buffers_set"] = set(held)
        base.__dict__.update(state)
        return base

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, one in self._kept().items():
            destination[prefix + name] = one if keep_vars else one.detach()

    def extra_repr(self) -> str:
        """Which adapters act."""
        return super().extra_repr().removeprefix(", ")


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def experts_with_adapters(module: Any) -> Any:
    """A :class:`LoRAExperts` without adapters on the very parameters of ``module``."""
    kind: Any = type(module)
    return layer_class(LoRAExperts, kind, False, False)._share(module)


def why_no_stack(module: Any, name: str) -> str | None:
    """Why a parameter of ``module`` can have no :class:`ExpertLoRA`, or ``None``."""
    parameter = module._parameters[name]
    stack = parameter is not None and parameter.dim() == 3 and parameter.shape[0] > 1
    if not stack or name not in ("gate_up_proj", "up_proj", "down_proj"):
        return "is no stack of experts' matrices"
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return f"is {parameter.dtype}"
    reason = why_not_experts(module)
    return None if reason is None else f"cannot be adapted: {reason}"
