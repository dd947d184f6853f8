"""Classes made at run time on top of those that people wrote; instances are copied and pickled as ever."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar


class Made:
    """Comes first among the bases of a class that a function of this package made.

    ``_lk_made_by`` is that function and its arguments. No name leads to the class, so that a pickle says
    these.
    """

    _lk_made_by: ClassVar[tuple[Any, ...]]

    def __init_subclass__(cls) -> None:
        """Nothing that the other bases do for classes that people write."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        given: Any = super().__reduce_ex__(max(protocol, 2))
        made, args, *state = given
        if made is copyreg.__newobj__ and args[0] is type(self):  # type: ignore[attr-defined]
            return _new, (self._lk_made_by, *args[1:]), *state
        return given


def _new(made_by: tuple[Any, ...], *args: Any) -> Any:
    """An instance without state."""
    function, *given = made_by
    kind = function(*given)
    return kind.__new__(kind, *args)


def make_class(name_from: Any, bases: tuple[Any, ...], made_by: tuple[Any, ...], **state: Any) -> Any:
    """A class that passes for ``name_from`` where people print it."""
    names = {name: getattr(name_from, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, **state, "_lk_made_by": made_by}
    return type(name_from)(name_from.__name__, (Made, *bases), body)
