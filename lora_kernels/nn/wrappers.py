"""The names of modules without what ``torch.compile``, DDP, FSDP and checkpointing put around them."""

from __future__ import annotations

from torch import nn

# Where each wrapper keeps what it wraps. DDP's and DataParallel's is no name that only wrappers have.
_INNER = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _inner_name(module: nn.Module) -> str | None:
    """The attribute in which a wrapper keeps its module, ``None`` for any other module."""
    if isinstance(module, _PARALLEL):
        return "module"
    return next((name for name in _INNER if name in module._modules), None)


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` only holds another one, which does the work."""
    return _inner_name(module) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers around the whole of it."""
    while (name := _inner_name(model)) is not None:
        inner = model._modules[name]
        assert inner is not None
        model = inner
    return model


def plain_names(model: nn.Module) -> dict[str, str]:
    """The name of each module, in which every wrapper is left out, by the name that it has now."""
    plain = {"": ""}
    for name, _ in model.named_modules(remove_duplicate=False):
        if name:
            parent, _, last = name.rpartition(".")
            holder = model.get_submodule(parent)
            own = "" if last == _inner_name(holder) else last
            plain[name] = ".".join(filter(None, (plain[parent], own)))
    return plain


def plain_key(key: str) -> str:
    """A key of a file, without the names that only wrappers have."""
    return ".".join(part for part in key.split(".") if part not in _INNER)


def fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds parameters, told without importing it."""
    return any(hasattr(type(one), "set_requires_all_reduce") for one in model.modules())


def check_whole(model: nn.Module, what: str) -> None:
    """Whether adapters can come and go: nobody splits what comes later, nor sums its gradients.

    Raises:
        RuntimeError: FSDP2 has taken over the parameters.
    """
    if fully_sharded(model):
        raise RuntimeError(f"cannot {what} after fully_shard took the parameters over; do it before")
