"""What commands write into pages that people write too."""

from __future__ import annotations


def between(text: str, begin: str, made: str, end: str) -> str:
    """``text`` with what is between two marks made anew."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{made}{end}{after}"
