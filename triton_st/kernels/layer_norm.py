"""What the kernels that normalise rows share: a few whole rows at a time, statistics in float32."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_st.kernels.common import TARGET_PROGRAMS, register_limit
from triton_st.kernels.philox import keep_rows

BLOCK_NUMBERS = 2048
"""Numbers in a tile: 16 for each of 4 × 32 threads, so that three sums over rows stay in registers."""
MOST_ROWS = 16
"""With 32 of the shortest rows, whose elements need a mask each, ptxas spills."""


@triton.jit
def load_rows(x, row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of x [T, D] in float32, 0 where masked. [rows, BLOCK_D]."""
    return tl.load(x + row.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :], mask=mask, other=0).to(
        tl.float32
    )


@triton.jit
def store_rows(x, row, mask, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows of x [T, D], in its dtype."""
    at = x + row.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_parameter(parameter, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A vector [D] as [1, BLOCK_D], 0 past the end."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(parameter + column, mask=column < D, other=0)[None, :]


@triton.jit
def dropout(value, seed, threshold, factor, stream, row, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements of rows [BLOCK_R] of a tensor [T, D], dropped or scaled; as they are where there is no seed."""
    if seed is not None:
        kept = keep_rows(tl.load(seed), stream, threshold, row, D, BLOCK_R, BLOCK_D)
        value = tl.where(kept, value * factor, 0.0)
    return value


@triton.jit
def residual_sum(
    x, residual, x_bias, seed, threshold, factor, stream, row, mask,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dropout(x + x_bias) + residual, 0 where masked. [BLOCK_R, BLOCK_D]."""
    value = load_rows(x, row, mask, D, BLOCK_D)
    if x_bias is not None:
        value += load_parameter(x_bias, D, BLOCK_D)
    value = dropout(value, seed, threshold, factor, stream, row, D, BLOCK_R, BLOCK_D)
    return value + load_rows(residual, row, mask, D, BLOCK_D)


@triton.jit
def normalise(total, mask, eps, D: tl.constexpr):
    """Unit rows, 0 where masked, and each row's mean and inverse deviation. [rows, BLOCK_D], [rows], [rows]."""
    mean = tl.sum(total, 1) / D
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def normalised(total, mean, rstd, mask):
    """Unit rows from statistics that are known, 0 where masked."""
    return tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def through_layer_norm(grad, unit, weight, rstd, D: tl.constexpr):
    """Gradient of the rows that were normalised; grad is 0 where masked, weight past the end. [rows, BLOCK_D]."""
    grad_unit = grad * weight
    level = tl.sum(grad_unit, 1) / D
    radial = tl.sum(grad_unit * unit, 1) / D
    return (grad_unit - level[:, None] - unit * radial[:, None]) * rstd[:, None]


@triton.jit
def store_sum(parts, index, total, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum over the rows of a tile into line `index` of parts [..., D]."""
    column = tl.arange(0, BLOCK_D)
    tl.store(parts + index.to(tl.int64) * D + column, tl.sum(total, 0), mask=column < D)


class RowTile(NamedTuple):
    """Rows × columns of a tile of whole rows; as many programs as it takes walk over `steps` of them."""

    rows: int
    columns: int
    num_warps: int

    @staticmethod
    def of(d: int) -> RowTile:
        """For rows of d numbers."""
        columns = max(16, triton.next_power_of_2(d))
        return RowTile(max(1, min(MOST_ROWS, BLOCK_NUMBERS // columns)), columns, max(4, min(16, columns // 512)))

    def constants(self, d: int) -> dict[str, int]:
        """Constants and options of a launch."""
        return {"D": d, "BLOCK_R": self.rows, "BLOCK_D": self.columns, "num_warps": self.num_warps}

    def gradient_constants(self, d: int) -> dict[str, int]:
        """The same for a launch of backward, which at 168 registers, ptxas' own choice, spills on some GPUs."""
        return {**self.constants(d), **register_limit(self.num_warps)}

    def programs(self, rows: int) -> int:
        """Programs that share the tiles of so many rows: each leaves one part of every sum over rows."""
        return max(1, min(TARGET_PROGRAMS, triton.cdiv(rows, self.rows)))
