"""Sums in two stages: parts that programs leave behind, added up in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import launch

BLOCK_PARTS = 32
BLOCK_COLUMNS = 64


@triton.jit(do_not_specialize=["parts_count"])
def _parts_kernel(
    parts, out,  # [parts, columns], [columns]
    parts_count, columns,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts_count, BLOCK_P):
        mask = (start + part < parts_count)[:, None] & (column < columns)[None, :]
        total += tl.load(parts + (start + part).to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0)
    tl.store(out + column, tl.sum(total, 0), mask=column < columns)


def sum_parts(parts: Tensor) -> Tensor:
    """parts [P, ...] float32 -> their sum [...]."""
    out = parts.new_empty(parts.shape[1:])
    launch(
        _parts_kernel, (triton.cdiv(out.numel(), BLOCK_COLUMNS),),
        parts=parts, out=out, parts_count=len(parts), columns=out.numel(),
        BLOCK_P=BLOCK_PARTS, BLOCK_C=BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


PROMISES = {"_parts_kernel": ("wide loads",)}
