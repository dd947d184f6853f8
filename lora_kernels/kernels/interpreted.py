"""What kernels are given in Triton's interpreter in place of functions that it computes otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def dot(a: Any, b: Any, acc: Any, PRECISION: Any = None) -> Any:
    """acc + a b in fp32, each element's products added one by one from the first column of a on.

    The interpreter's own ``tl.dot`` is numpy's matmul: with the BLAS of some processors a row's sums then
    depend on where the row lies, and bfloat16 is multiplied wrongly. ``einsum`` over rows that lie one
    after the other calls no BLAS and adds along the columns of b, for every row alike.
    """
    left, right = (np.ascontiguousarray(t.to(tl.float32).handle.data) for t in (a, b))
    product = np.einsum("mk,kn->mn", left, right, optimize=False)
    return tl.tensor(TensorHandle(product + acc.handle.data, tl.float32), acc.type)
