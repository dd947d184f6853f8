"""What a start is, and the names of those there are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..adapters.site import Site


class Drawn(NamedTuple):
    """The factors that an adapter starts with, and what becomes of W."""

    lora_a: Tensor  # [r, in]
    lora_b: Tensor  # [out, r]
    # The W [out, in] to go on with; None where it stays as it is.
    weight: Tensor | None = None
    # Those of the factors that do not train.
    frozen: frozenset[str] = frozenset()
    # Whether W goes on without s · B A.
    taken: bool = False


class Initialiser(NamedTuple):
    """One way to start."""

    name: str
    draw: Callable[[Site], Drawn]
    # The statistic that it reads, one of `calibrate`'s, or none.
    needs: str | None
    # Whether W goes on without s · B A: W_res + s · B A is W.
    takes: bool
    # Keys of its options in `method_options`.
    options: frozenset[str]
    # Where its statistic comes from, where that is not `calibrate`.
    hint: str | None = None


INITIALISERS: dict[str, Initialiser] = {}
# The names among a site's statistics under which a checkpoint gives its start.
GIVEN = ("start_A", "start_B")
_NITER = re.compile(r"pissa_niter_[1-9][0-9]*")


def register(
    name: str,
    *,
    needs: str | None = None,
    takes: bool = False,
    options: Iterable[str] = (),
    hint: str | None = None,
) -> Callable[[Callable[[Site], Drawn]], Callable[[Site], Drawn]]:
    """Decorator: makes a function known as ``LoRAConfig(init_lora_weights=name)``.

    A function that is defined anew under the same name takes the place of the old one.

    Raises:
        TypeError: no name; or ``options`` is one str.
        ValueError: another function has that name.

    Examples:
        >>> @register("ones")
        ... def ones(site):
        ...     a = torch.ones(site.config.r, site.in_features)
        ...     return Drawn(a, torch.zeros(site.out_features, site.config.r))
    """

    check_name(name)
    if isinstance(options, str):
        raise TypeError(f"options: expected a list of names, got the str {options!r}")

    def add(draw: Callable[[Site], Drawn]) -> Callable[[Site], Drawn]:
        there = INITIALISERS.get(name)
        check_free(name, draw, draw if there is None else there.draw)
        INITIALISERS[name] = Initialiser(name, draw, needs, takes, frozenset(options), hint)
        return draw

    return add


def check_name(name: Any) -> None:
    """Raises where what a decorator was given is no name: it may have been used without one."""
    if not isinstance(name, str):
        raise TypeError(f"register: expected a name, @register('name'), got {name!r}")
    if not name or "." in name:
        raise ValueError(f"register: expected a name without dots, got {name!r}")


def check_free(name: str, new: Any, there: Any) -> None:
    """Raises where ``name`` is that of something else than an earlier definition of ``new``."""
    if (new.__module__, new.__qualname__) != (there.__module__, there.__qualname__):
        whose = f"{there.__module__}.{there.__qualname__}"
        raise ValueError(f"register: expected a name of its own, got {name!r}, which is {whose}'s")


def find(name: Any) -> Initialiser:
    """The initialiser that ``init_lora_weights=name`` asks for.

    Raises:
        ValueError: there is none; the message lists those there are.

    Examples:
        >>> find("eva").needs
        'activation_svd'
    """
    if isinstance(name, bool):
        return INITIALISERS["_true" if name else "_false"]
    key = name if isinstance(name, str) else None
    if key is not None and (key.startswith("_") or _NITER.fullmatch(key)):
        key = "_niter" if _NITER.fullmatch(key) else None
    if key not in INITIALISERS:
        known = ", ".join(one for one in INITIALISERS if not one.startswith("_"))
        raise ValueError(
            f"init_lora_weights: expected one of True, False, pissa_niter_N, {known}, got {name!r}"
        )
    return INITIALISERS[key]


def draw(site: Site) -> Drawn:
    """The start that the site's config asks for.

    Raises:
        ValueError: the site has no weight, or not the statistics, that it needs; or the rank does not fit.

    Examples:
        >>> from lora_kernels.adapters import Site
        >>> weight = torch.randn(4, 8)
        >>> drawn = draw(Site("layer", 8, 4, LoRAConfig(r=2, init_lora_weights="pissa"), weight=weight))
    """
    one = find(site.config.init_lora_weights)
    if GIVEN[0] in site.statistics:
        return _given(site)
    if one.needs is not None and one.needs not in site.statistics:
        raise ValueError(_missing(one, site))
    with torch.no_grad():
        drawn = _checked(one, site, one.draw(site))
        if one.takes:
            weight = rest(site, drawn.lora_a, drawn.lora_b)
            drawn = drawn._replace(weight=weight, taken=True)
    return drawn


def _checked(one: Initialiser, site: Site, drawn: Any) -> Drawn:
    """What a start drew, if that are factors for the site."""
    if not isinstance(drawn, Drawn):
        raise TypeError(f"init_lora_weights: expected a Drawn of {one.name!r}, got {type(drawn).__name__}")
    r, sizes = site.config.r, (site.in_features, site.out_features)
    wanted = {"lora_a": (r, sizes[0]), "lora_b": (sizes[1], r), "weight": sizes[::-1]}
    for field, want in wanted.items():
        got = getattr(drawn, field)
        if got is None and field == "weight":
            continue
        if not isinstance(got, Tensor) or not got.is_floating_point() or tuple(got.shape) != want:
            shown = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(
                f"{field}: expected floats of shape {want} of the start {one.name!r}, got {shown}"
            )
    for name in drawn.frozen:
        if name not in ("lora_A", "lora_B"):
            raise ValueError(f"frozen: expected lora_A or lora_B of the start {one.name!r}, got {name!r}")
    return drawn


def _given(site: Site) -> Drawn:
    """The start that a checkpoint holds, which was taken out of W."""
    r = site.config.r
    lora_a = statistic(site, GIVEN[0], r, site.in_features)
    lora_b = statistic(site, GIVEN[1], site.out_features, r)
    return Drawn(lora_a, lora_b, rest(site, lora_a, lora_b), taken=True)


def _missing(one: Initialiser, site: Site) -> str:
    where = site.name or "this layer"
    call = f"gather it by statistics = lora_kernels.calibrate(model, batches, ({one.needs!r},))"
    hint = one.hint or f"{call} before the adapters are there"
    return (
        f"init_lora_weights: {one.name!r} needs the statistic {one.needs!r} of {where}; {hint}, and pass"
        " it on as apply_lora(model, config, statistics=statistics)"
    )


def rest(site: Site, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """W_res = W - s · B A in at least float32, rounded once to W's dtype.

    A and B are taken as the adapter will hold them, so that the sum is W but for the roundings.
    """
    given_weight(site)
    held_a, held_b = (factor.to(site.dtype or factor.dtype) for factor in (lora_a, lora_b))
    return rest_of(site.weight, held_a, held_b, scaling_of(site))


def rest_of(weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """:func:`rest` of a W and the factors that are held."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.detach().to(wide) - scaling * (lora_b.to(wide) @ lora_a.to(wide))).to(weight.dtype)


def scaling_of(site: Site) -> float:
    """s of the adapter."""
    config = site.config
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def given_weight(site: Site) -> Tensor:
    """W in at least float32.

    Raises:
        ValueError: there is none.
    """
    if site.weight is None:
        name = site.config.init_lora_weights
        raise ValueError(f"init_lora_weights: {name!r} starts from the base weight, and there is none here")
    return site.weight.detach().to(torch.promote_types(site.weight.dtype, torch.float32))


def statistic(site: Site, name: str, *shape: int | None) -> Tensor:
    """One of the site's statistics, in W's device and at least float32.

    Raises:
        TypeError: no tensor.
        ValueError: of another shape, ``None`` standing for any size.
    """
    value = site.statistics[name]
    if not isinstance(value, Tensor):
        where = site.name or "this layer"
        raise TypeError(f"statistics: {where}: expected {name} as a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(w in (None, g) for w, g in zip(shape, value.shape, strict=True))
    if not fits:
        want = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        where = site.name or "this layer"
        raise ValueError(f"statistics: {where}: expected {name} of shape {want}, got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"statistics: {site.name or 'this layer'}: expected finite {name}, got others")
    return value.to(site.device, torch.promote_types(value.dtype, torch.float32))


def check_rank(site: Site, most: int | None = None) -> int:
    """r, where it is at most ``most``, by default the smaller side of W.

    Raises:
        ValueError: it is not.
    """
    most = min(site.in_features, site.out_features) if most is None else most
    if site.config.r > most:
        name, where = site.config.init_lora_weights, f" of {site.name}" if site.name else ""
        raise ValueError(f"r: {name!r} expects at most {most}{where}, got {site.config.r}")
    return site.config.r


def balanced(u: Tensor, s: Tensor, vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √(S/s) Vᵀ and B = U √(S/s), whose s · B A is U S Vᵀ."""
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root
