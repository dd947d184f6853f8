"""Quantised base weights: the formats, how a weight is brought into one, and other libraries' layouts.

Imports torch alone; the ops and the modules build on it.
"""

from __future__ import annotations

from .bnb import from_bitsandbytes
from .grouped import icq_quantize, quantize_int4
from .quantize import quantize
from .weight import FORMATS, QuantizedWeight

__all__ = ["FORMATS", "QuantizedWeight", "from_bitsandbytes", "icq_quantize", "quantize", "quantize_int4"]
