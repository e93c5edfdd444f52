"""What is done row by row round the matrix products: norms, copies of safe size, gradients through the norm.

A row of any size becomes power · row, with `power` a power of two (so no bit is lost), over `norm`, the norm of that or
the limit EPS where it is below: squares neither overflow nor vanish, and half-precision products see numbers of one
size. A zero row has the norm inf, so that dividing by it gives 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import launch, padded_width, register_limit
from triton_st.reference import EPS

BLOCK_COLUMNS = 128
BLOCK_NUMBERS = 2048
"""Numbers in a block: 16 bytes of halves for each of 4 × 64 threads on AMD, twice that for 4 × 32."""
PROJECT_ROWS = 8
"""16 rows make the projection spill on sm_80 and sm_100."""

COPY_EXPONENT = 7
"""Copies have norms in [2^7, 2^8): a half has its full 11 bits for every entry down to 2^-21 of the norm."""

_EPS = tl.constexpr(EPS)
_COPY_EXPONENT = tl.constexpr(COPY_EXPONENT)
# Rows shorter than EPS are divided by EPS, not by their norm; their power of two, which no other row has, says so.
_BELOW_EPS_POWER = tl.constexpr(2.0 ** (COPY_EXPONENT + 41))
_BELOW_EPS_NORM = tl.constexpr(EPS * 2.0 ** (COPY_EXPONENT + 41))
# Entries within 2^±40 need no power of two: products of two rows stay within 2^±80, far from float32's limits.
_SAFE_EXPONENT = tl.constexpr(40)


@triton.jit
def power_of_two(exponent):
    """2 to the power of an integer in [-126, 127], as float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def floor_log2(x):
    """Exponent of positive float32 numbers; 128 for inf and NaN, -127 for 0 and denormals."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def exponent_of(largest):
    """Exponent of the float32 ≥ 0 whose bits stand at `largest`, kept within reason. A sum over it is near 1."""
    return tl.minimum(tl.maximum(((tl.load(largest) >> 23) & 255) - 127, -90), 90)


@triton.jit
def inverse(norm, BLOCK: tl.constexpr, left):
    """One over each of the first norms [BLOCK], 0 past the end."""
    row = tl.arange(0, BLOCK)
    return 1.0 / tl.load(norm + row, mask=row < left, other=float("inf"))  # div_rn would be a call, and spill round it


@triton.jit
def norms(x, offset, inside, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Norms of power · row and `power`, 1 unless a row's size is extreme; rows begin at x + offset. [BLOCK_R] each."""
    column = tl.arange(0, BLOCK_D)
    at = x + offset[:, None] + column[None, :]
    largest = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = inside[:, None] & (start + column < D)[None, :]
        value = tl.load(at + start, mask=mask, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        squares += value * value
    largest = tl.max(largest, 1)
    exponent = floor_log2(largest)
    extreme = (tl.abs(exponent) > _SAFE_EXPONENT) & (exponent < 128) & (largest > 0)
    power = tl.where(extreme, power_of_two(-tl.minimum(tl.maximum(exponent + 1, -100), 120)), 1.0)
    if x.dtype.element_ty != tl.float16 and tl.max(extreme.to(tl.int32)) != 0:
        squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            mask = inside[:, None] & (start + column < D)[None, :]
            value = tl.load(at + start, mask=mask, other=0).to(tl.float32) * power[:, None]
            squares += value * value
    return tl.sqrt_rn(tl.sum(squares, 1)), power


@triton.jit
def divisor(norm, power):
    """What a row times `power`, of norm `norm`, is divided by: at least EPS · power, and inf for a zero row."""
    floor = _EPS * power
    return tl.where(norm == 0, float("inf"), tl.where(norm < floor, floor, norm))


@triton.jit
def _write_statistics(
    x, power_out, norm_out, extreme_out, block, count, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    first, row = block * BLOCK_R, tl.arange(0, BLOCK_R)
    left = count - first
    norm, power = norms(x + first.to(tl.int64) * D, row * D, row < left, D, BLOCK_R, BLOCK_D)
    norm = divisor(norm, power)
    tl.store(power_out + first + row, power, mask=row < left)
    tl.store(norm_out + first + row, norm, mask=row < left)
    if x.dtype.element_ty != tl.float16 and tl.max((power != 1.0).to(tl.int32)) != 0:
        tl.atomic_or(extreme_out, 1)


@triton.jit(do_not_specialize=["a_count", "b_count"])
def _statistics_kernel(
    a, b,  # [M, D], [N, D]
    a_power, a_norm, b_power, b_norm,  # [M], [M], [N], [N]
    extreme,  # [1], set to 1 if any power is not 1
    a_count, b_count,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    a_blocks = tl.cdiv(a_count, BLOCK_R)
    if block < a_blocks:
        _write_statistics(a, a_power, a_norm, extreme, block, a_count, D, BLOCK_R, BLOCK_D)
    else:
        _write_statistics(b, b_power, b_norm, extreme, block - a_blocks, b_count, D, BLOCK_R, BLOCK_D)


@triton.jit
def _write_copy(
    x, copy, power_out, norm_out, block, count,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, row, column = block * BLOCK_R, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    left = count - first
    x += first.to(tl.int64) * STRIDE
    copy += first.to(tl.int64) * WIDTH
    if power_out is not None:
        power, norm = scale_of(x, row * STRIDE, row < left, D, BLOCK_R, BLOCK_D)
        tl.store(power_out + first + row, power, mask=row < left)
        tl.store(norm_out + first + row, norm, mask=row < left)
    for start in range(0, WIDTH, BLOCK_D):
        mask = (row < left)[:, None] & (start + column < D)[None, :]
        value = tl.load(x + row[:, None] * STRIDE + column[None, :] + start, mask=mask, other=0)
        if power_out is not None:
            value = value.to(tl.float32) * power[:, None]
        mask = (row < left)[:, None] & (start + column < WIDTH)[None, :]
        at = copy + row[:, None] * WIDTH + column[None, :] + start
        tl.store(at, value.to(copy.dtype.element_ty), mask=mask)


@triton.jit
def scale_of(x, offset, inside, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Power of two of each row's copy, 0 for a row of zeros, and the copy's norm. [BLOCK_R] each."""
    norm, power = norms(x, offset, inside, D, BLOCK_R, BLOCK_D)
    below = (norm < _EPS * power) & (norm > 0)
    ordinary = (norm > 0) & (norm < float("inf"))
    shift = tl.where(ordinary, _COPY_EXPONENT - floor_log2(norm), 0)
    power = power_of_two(shift + tl.where(ordinary, floor_log2(power), 0))
    power = tl.where(norm == 0, 0.0, tl.where(below, _BELOW_EPS_POWER, power))
    norm = tl.where(below, _BELOW_EPS_NORM, norm * power_of_two(shift))
    return power, tl.where(norm == 0, float("inf"), norm)


@triton.jit
def below_eps(power):
    """Whether rows of these powers, as `scale_of` gives them, are shorter than EPS, so that their length counts."""
    return power == _BELOW_EPS_POWER


@triton.jit(do_not_specialize=["a_count", "b_count"])
def _copy_kernel(
    a, b,  # [M, D], [N, D], lines STRIDE apart
    a_copy, b_copy,  # [M, WIDTH], [N, WIDTH]: the same, scaled, then zeros
    a_power, a_norm, b_power, b_norm,  # [M], [M], [N], [N]; None: copied as they are
    a_count, b_count,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    a_blocks = tl.cdiv(a_count, BLOCK_R)
    if block < a_blocks:
        _write_copy(a, a_copy, a_power, a_norm, block, a_count, STRIDE, D, WIDTH, BLOCK_R, BLOCK_D)
    else:
        _write_copy(b, b_copy, b_power, b_norm, block - a_blocks, b_count, STRIDE, D, WIDTH, BLOCK_R, BLOCK_D)


@triton.jit
def _through_norm(
    sums, part_stride, parts, undo, x, power, norm, other, other_offset, other_factor, start, inside,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One column block of the gradient of the unit rows, and of the unit rows themselves. [BLOCK_R, BLOCK_D] each."""
    row, column = tl.arange(0, BLOCK_R), start + tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    at = sums + row[:, None] * WIDTH + column[None, :]
    grad = tl.load(at, mask=mask, other=0)
    for _ in range(1, parts):
        at += part_stride
        grad += tl.load(at, mask=mask, other=0)
    grad *= undo[:, None]
    if other is not None:
        # The row of the positive, kept out of the products: it never meets half precision.
        at = other + other_offset[:, None] + column[None, :]
        positive = tl.load(at, mask=mask & (other_factor != 0)[:, None], other=0).to(tl.float32)
        grad -= positive * other_factor[:, None]
    unit = grad
    if norm is not None:
        unit = tl.load(x + row[:, None] * STRIDE + column[None, :], mask=mask, other=0).to(tl.float32) * power[:, None]
        unit = tl.div_rn(unit, tl.broadcast_to(norm[:, None], [BLOCK_R, BLOCK_D]))
    return grad, unit, mask


@triton.jit(do_not_specialize=["count", "parts", "part_rows", "pair_first", "pairs", "share_parts", "share_stride"])
def _project_kernel(
    sums,  # [parts, part_rows ≥ count, WIDTH ≥ D] float32: gradient of the unit rows, in parts
    x, power, norm, out,  # [count, D], [count], [count], [count, D]; norm None: the rows count as they are
    other, other_power, other_norm,  # partners in positive pairs: [≥ pairs, D], or None
    other_rows,  # [pairs] or None: pair i is with row i of other
    share,  # [share_parts, pairs], lines share_stride apart: what a pair's query gives to others
    largest,  # [1] int32: bits of the number whose power of two sums were divided by, or None
    undo,
    count, parts, part_rows, pair_first, pairs, share_parts, share_stride,
    STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, OVER_NORM: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * BLOCK_R, tl.arange(0, BLOCK_R)
    inside = row < count - first
    undo_row = tl.zeros([BLOCK_R], tl.float32) + undo
    if largest is not None:
        undo_row *= power_of_two(exponent_of(largest))
    if norm is not None:
        power = tl.load(power + first + row, mask=inside, other=0)
        norm = tl.load(norm + first + row, mask=inside, other=1)
        if OVER_NORM:
            undo_row *= tl.where(norm < float("inf"), norm, 1.0)
    other_factor = tl.zeros([BLOCK_R], tl.float32)
    other_offset = tl.zeros([BLOCK_R], tl.int64)
    if other is not None:
        pair = first + row - pair_first
        paired = inside & (pair >= 0) & (pair < pairs)
        share += pair
        for _ in range(0, share_parts):
            other_factor += tl.load(share, mask=paired, other=0)
            share += share_stride
        other_row = pair if other_rows is None else tl.load(other_rows + pair, mask=paired, other=0)
        other_offset = tl.where(paired, other_row, 0).to(tl.int64) * STRIDE
        if other_norm is not None:
            other_factor = tl.div_rn(other_factor, tl.load(other_norm + other_row, mask=paired, other=1))
            other_factor *= tl.load(other_power + other_row, mask=paired, other=0)
    sums += first.to(tl.int64) * WIDTH
    x += first.to(tl.int64) * STRIDE
    out += first.to(tl.int64) * OUT_STRIDE
    part_stride = tl.cast(part_rows, tl.int64) * WIDTH
    if norm is not None:
        radial = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            grad, unit, mask = _through_norm(
                sums, part_stride, parts, undo_row, x, power, norm, other, other_offset, other_factor, start, inside,
                STRIDE, D, WIDTH, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            radial += grad * unit
        radial = tl.where(below_eps(power), 0.0, tl.sum(radial, 1))
        factor = tl.div_rn(tl.full([BLOCK_R], 1.0, tl.float32), norm)
    for start in range(0, D, BLOCK_D):
        grad, unit, mask = _through_norm(
            sums, part_stride, parts, undo_row, x, power, norm, other, other_offset, other_factor, start, inside,
            STRIDE, D, WIDTH, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        if norm is not None:
            grad = (grad - unit * radial[:, None]) * factor[:, None] * power[:, None]
            grad = tl.where((power == 0)[:, None], 0.0, grad)
        at = out + row[:, None] * OUT_STRIDE + start + tl.arange(0, BLOCK_D)[None, :]
        tl.store(at, grad.to(out.dtype.element_ty), mask=mask)


def block_of(d: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    columns = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(d)))
    return BLOCK_NUMBERS // columns, columns


class Statistics:
    """Per-row `power` and `norm` of two sets of rows, and whether any power is not 1. One launch."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        (m, d), n = a.shape, len(b)
        self.a_power, self.a_norm, self.b_power, self.b_norm = a.new_empty(2 * (m + n), dtype=torch.float32).split(
            (m, m, n, n)
        )
        block_rows, block_columns = block_of(d)
        self.extreme = torch.zeros(1, dtype=torch.int32, device=a.device)
        launch(
            _statistics_kernel, (triton.cdiv(m, block_rows) + triton.cdiv(n, block_rows),),
            a=a, b=b, a_power=self.a_power, a_norm=self.a_norm, b_power=self.b_power, b_norm=self.b_norm,
            extreme=self.extreme, a_count=m, b_count=n, D=d, BLOCK_R=block_rows, BLOCK_D=block_columns, num_warps=4,
        )  # fmt: skip


class Scaled:
    """Rows [N, D] with the power and norm that `copy_rows` fills in; None where they are to be taken as they are."""

    power: Tensor | None
    norm: Tensor | None

    def __init__(self, rows: Tensor, *, normalized: bool = True) -> None:
        self.rows = rows
        self.power = rows.new_empty(len(rows), dtype=torch.float32) if normalized else None
        self.norm = rows.new_empty(len(rows), dtype=torch.float32) if normalized else None

    def __getitem__(self, part: slice) -> Scaled:
        view = object.__new__(Scaled)
        view.rows = self.rows[part]
        view.power = None if self.power is None else self.power[part]
        view.norm = None if self.norm is None else self.norm[part]
        return view

    def __len__(self) -> int:
        return len(self.rows)


def copy_rows(a: Scaled, b: Scaled) -> tuple[Tensor, Tensor]:
    """Copies of both sets of rows, their norms in [2^7, 2^8); fills in power and norm. One launch.

    Copies are widened with zeros to `padded_width`. Both sets lie in memory with the same distance from row to row.
    """
    a_rows, b_rows = a.rows, b.rows
    d = a_rows.shape[1]
    width = padded_width(a_rows.dtype, d)
    block_rows, block_columns = block_of(width)
    a_copy, b_copy = a_rows.new_empty(len(a_rows), width), b_rows.new_empty(len(b_rows), width)
    launch(
        _copy_kernel, (triton.cdiv(len(a_rows), block_rows) + triton.cdiv(len(b_rows), block_rows),),
        a=a_rows, b=b_rows, a_copy=a_copy, b_copy=b_copy,
        a_power=a.power, a_norm=a.norm, b_power=b.power, b_norm=b.norm,
        a_count=len(a_rows), b_count=len(b_rows),
        STRIDE=a_rows.stride(0), D=d, WIDTH=width, BLOCK_R=block_rows, BLOCK_D=block_columns, num_warps=4,
    )  # fmt: skip
    return a_copy, b_copy


def project(
    sums: Tensor,
    x: Scaled,
    out: Tensor,
    *,
    undo: float = 1.0,
    over_norm: bool = False,
    largest: Tensor | None = None,
    partner: Scaled | None = None,
    partner_rows: Tensor | None = None,
    pair_first: int = 0,
    share: Tensor | None = None,
) -> None:
    """Into out: gradient of the rows of x from that of their unit rows, the sum of the parts of `sums`.

    Args:
        sums: [parts, at least N, width], times 1 / undo. One part may be out itself.
        x: [N, D].
        out: [N, D], or the first D columns of a wider tensor.
        over_norm: sums have been divided by the norm of the row's copy as well.
        largest: [1] int32, bits of a float32; sums have been divided by its power of two as well.
        partner: pair i is of row pair_first + i of x and row partner_rows[i] (or i) of `partner`. share [parts, pairs]
            times the partner's unit row is subtracted from the gradient of x's.
    """
    count, d = x.rows.shape
    pairs, share_parts, share_stride = (share.shape[1], len(share), share.stride(0)) if share is not None else (0, 0, 0)
    launch(
        _project_kernel, (triton.cdiv(count, PROJECT_ROWS),),
        sums=sums, x=x.rows, power=x.power, norm=x.norm, out=out,
        other=partner.rows if partner else None, other_power=partner.power if partner else None,
        other_norm=partner.norm if partner else None, other_rows=partner_rows, share=share, largest=largest,
        undo=undo, count=count, parts=len(sums), part_rows=sums.shape[1],
        pair_first=pair_first, pairs=pairs, share_parts=share_parts, share_stride=share_stride,
        STRIDE=x.rows.stride(0), OUT_STRIDE=out.stride(0), D=d, WIDTH=sums.shape[2],
        BLOCK_R=PROJECT_ROWS, BLOCK_D=block_of(d)[1], OVER_NORM=over_norm, num_warps=4, **register_limit(4),
    )  # fmt: skip


PROMISES = {
    "_statistics_kernel": ("wide loads",),
    "_copy_kernel": ("wide loads",),
    "_project_kernel": ("wide loads",),
}
