"""How results are rounded on their way to memory."""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def saturate(x, dtype: tl.constexpr):
    """x as `dtype`; a finite activation past float16's range becomes its largest, inf and NaN stay."""
    if dtype == tl.float16:
        held = tl.minimum(tl.maximum(x, -_LARGEST_HALF), _LARGEST_HALF)
        x = tl.where(tl.abs(x) < float("inf"), held, x)
    return x.to(dtype)
