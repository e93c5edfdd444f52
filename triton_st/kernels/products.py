"""The two shapes of matrix product that everything here is made of: rows with rows, and weighted sums of rows."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Tile, dot_precision, launch, product_tile, splits

SCRATCH_BYTES = 32 << 20
"""Most that the parts of split sums may take together."""


@triton.jit
def dot_rows(
    a, b,  # from the tile's first rows on: [a_left, D], [b_left, D]
    a_left, b_left, a_power, b_power, depth,
    D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Dot products of the first rows of a with the first rows of b [BLOCK_A, BLOCK_B], summed in float32.

    SCALED multiplies the rows by their powers of two first. Rows past the end count as 0. The 64-bit part of an address
    is the caller's, one number for the whole tile; what is added here are constants of 32 bits, which the compiler
    folds into the loads (with 64-bit row offsets the 128 × 128 tile needed 250 registers and spilled). Counts that mask
    along memory are specialised arguments: only where they are known to be multiples of 16 are accesses wide.
    """
    k = tl.arange(0, BLOCK_K)
    a_row, b_row = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    a_at = a + a_row[:, None] * D + k[None, :]
    b_at = b + b_row[None, :] * D + k[:, None]
    if SCALED:
        a_factor = tl.load(a_power + a_row, mask=a_row < a_left, other=0)[:, None]
        b_factor = tl.load(b_power + b_row, mask=b_row < b_left, other=0)[None, :]
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    # The scaled loop is rare: no buffers of its own in shared memory.
    for start in tl.range(0, depth, BLOCK_K, num_stages=1 if SCALED else None):
        a_mask, b_mask = (a_row < a_left)[:, None], (b_row < b_left)[None, :]
        if D % BLOCK_K != 0:
            a_mask = a_mask & (start + k < D)[None, :]
            b_mask = b_mask & (start + k < D)[:, None]
        x = tl.load(a_at + start, mask=a_mask, other=0)
        y = tl.load(b_at + start, mask=b_mask, other=0)
        if SCALED:
            x = (x * a_factor).to(a.dtype.element_ty)
            y = (y * b_factor).to(b.dtype.element_ty)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["out_rows", "accumulate"])
def _weighted_sum_kernel(
    weights,  # [rows, terms], TRANSPOSED: [terms, rows]; `stride` from line to line, `panel` from segment to segment
    x,  # [terms, D]
    norm,  # [terms] or None: weights are multiplied by WEIGHT / norm first
    out,  # [parts, out_rows, WIDTH] float32: columns EDGES[i] to EDGES[i + 1] are those of segment i
    rows, terms, part_terms, out_rows, stride, panel, accumulate,
    D: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, WEIGHT: tl.constexpr, STARTS: tl.constexpr,
    EDGES: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    first = tl.program_id(0) // COLUMN_BLOCKS * BLOCK_R
    first_column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D
    out_column, out_end = first_column, EDGES[1]
    for i in tl.static_range(1, SEGMENTS):
        later = first_column >= STARTS[i]
        weights += tl.where(later, tl.cast(panel, tl.int64), 0)
        out_column = tl.where(later, EDGES[i] + first_column - STARTS[i], out_column)
        out_end = tl.where(later, EDGES[i + 1], out_end)
    if SEGMENTS > 1:
        out_column = tl.multiple_of(out_column, MULTIPLE)
    row, column, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    mask = (row < rows - first)[:, None] & (column < out_end - out_column)[None, :]
    start = part * part_terms
    left = tl.minimum(part_terms, terms - start)
    # One 64-bit number for the tile, small ones inside it: see dot_rows.
    x += start.to(tl.int64) * D + first_column
    if TRANSPOSED:
        weights += start.to(tl.int64) * stride + first
    else:
        weights += first.to(tl.int64) * stride + start
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for done in range(0, left, BLOCK_K):
        inside = k < left - done
        if TRANSPOSED:
            at = weights + k.to(tl.int64)[:, None] * stride + row[None, :]
            weight = tl.load(at, mask=inside[:, None] & (row < rows - first)[None, :], other=0)
            weight = tl.trans(weight)  # [BLOCK_R, BLOCK_K]
            weights += BLOCK_K * stride
        else:
            at = weights + row.to(tl.int64)[:, None] * stride + k[None, :]
            weight = tl.load(at, mask=(row < rows - first)[:, None] & inside[None, :], other=0)
            weights += BLOCK_K
        if norm is not None:
            factor = WEIGHT / tl.load(norm + start + done + k, mask=inside, other=float("inf"))
            weight = (weight * factor[None, :]).to(x.dtype.element_ty)
        at = x + k[:, None] * D + column[None, :]
        value = tl.load(at, mask=inside[:, None] & (column < D - first_column)[None, :], other=0)
        x += BLOCK_K * D
        acc = tl.dot(weight, value, acc, input_precision=PRECISION)
    at = out + (part.to(tl.int64) * out_rows + first) * WIDTH + out_column + row[:, None] * WIDTH + column[None, :]
    if accumulate != 0:
        acc += tl.load(at, mask=mask, other=0)
    tl.store(at, acc, mask=mask)


def _sum_tile(dtype: torch.dtype, rows: int, starts: tuple[int, ...]) -> Tile:
    """Tile for `weighted_sum`; narrow rows get a narrower tile, and no tile is of two segments."""
    tile = product_tile(dtype, rows, starts[-1])
    columns = min(tile.columns, max(16, triton.next_power_of_2(starts[-1])))
    return tile._replace(columns=math.gcd(columns, *starts[1:-1]))


def new_sums(
    x: Tensor,
    starts: tuple[int, ...],
    rows: int,
    terms: int,
    out_rows: int,
    *,
    width: int | None = None,
    most_bytes: int = SCRATCH_BYTES,
    out: Tensor | None = None,
) -> Tensor:
    """Room for `weighted_sum` of `terms` rows like x's: [parts, out_rows, width], float32.

    `starts` of its segments, and x's width at the end: (0, width) where there is one. Results are as wide if not less.
    `rows` of the `out_rows` are written at a time; the fewer programs that makes, the more parts, up to `most_bytes`.
    A lone part is `out` [out_rows, width] where that is given.
    """
    width = width or starts[-1]
    tile = _sum_tile(x.dtype, rows, starts)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    most = max(1, most_bytes // max(4 * out_rows * width, 1))
    parts = splits(programs, triton.cdiv(terms, 2 * tile.depth), most)
    if parts == 1 and out is not None:
        return out.unsqueeze(0)
    return x.new_empty(parts, out_rows, width, dtype=torch.float32)


def weighted_sum(
    weights: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    weight: float = 1.0,
    transposed: bool = False,
    accumulate: bool = False,
    starts: tuple[int, ...] | None = None,
    edges: tuple[int, ...] | None = None,
) -> None:
    """weights [rows, terms] @ x [terms, width] into (or on top of) out [parts, rows, width], summed part by part.

    `norm` [terms]: weights are multiplied by weight / norm first. The rows of x themselves are not, because rounding
    them would turn them a little, and what is left after the projection of rows of nearly one direction is a small
    difference (bfloat16, rows 1 % apart: a gradient 4 % wrong, against 0.2 % so).
    `transposed`: weights are stored [terms, rows]. Lines of `weights` and parts of `out` may lie apart.
    `starts`: columns of x from starts[i] to starts[i + 1] are multiplied with weights[i], of as many as there are,
    into the columns of out from edges[i] to edges[i + 1], which leave out the last of them where they are fewer.
    """
    terms, width = x.shape
    rows = weights.shape[-1 if transposed else -2]
    parts = len(out)
    starts = starts or (0, width)
    edges = edges or starts
    tile = _sum_tile(x.dtype, rows, starts)
    column_blocks = triton.cdiv(width, tile.columns)
    steps = triton.cdiv(terms, tile.depth)
    launch(
        _weighted_sum_kernel, (triton.cdiv(rows, tile.rows) * column_blocks, parts),
        weights=weights, x=x, norm=norm, out=out, rows=rows, terms=terms,
        part_terms=triton.cdiv(steps, parts) * tile.depth,
        out_rows=out.stride(0) // max(out.shape[2], 1), stride=weights.stride(-2),
        panel=weights.stride(0) if len(starts) > 2 else 0, accumulate=int(accumulate),
        D=width, COLUMN_BLOCKS=column_blocks, BLOCK_R=tile.rows, BLOCK_D=tile.columns, BLOCK_K=tile.depth,
        TRANSPOSED=transposed, PRECISION=dot_precision(x.dtype), WEIGHT=weight, STARTS=starts, EDGES=edges,
        SEGMENTS=len(starts) - 1, WIDTH=out.shape[2], MULTIPLE=math.gcd(16, *edges[1:-1]),
        **tile.options,
    )  # fmt: skip


PROMISES = {"_weighted_sum_kernel": ("tensor cores", "wide loads")}
