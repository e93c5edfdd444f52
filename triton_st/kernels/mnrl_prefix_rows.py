"""Rows of which several prefixes are compared: their copies, what positive pairs take, gradients through the norms.

The columns that a prefix adds to the one before are a segment. In a copy each segment is scaled as `rows` scales the
rows of its prefix, so that neither the dot products of a prefix nor the weights of its gradient, divided by its norms,
leave the range of halves, however small the prefix is against the row. `ratio` is a prefix's power of two over that of
the one before: at most 1, for norms only grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import launch, padded_width, register_limit
from triton_st.kernels.rows import PROJECT_ROWS, below_eps, block_of, exponent_of, floor_log2, power_of_two, scale_of

PAIR_ROWS = 128


class Segments(NamedTuple):
    """Of all prefixes: edges (0, dims ...) of their segments in the rows, and `starts` of these in copies."""

    edges: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, dtype: torch.dtype, dims: Sequence[int]) -> Segments:
        """Segments of the first `dims` columns, ascending; each fills whole blocks of a copy."""
        edges, starts = (0, *dims), [0]
        for begin, end in zip(edges, dims, strict=False):
            starts.append(starts[-1] + padded_width(dtype, end - begin))
        return cls(edges, tuple(starts))

    @property
    def prefixes(self) -> int:
        """How many."""
        return len(self.starts) - 1

    @property
    def width(self) -> int:
        """Of a copy."""
        return self.starts[-1]

    def ends(self, block: int) -> tuple[int, ...]:
        """How many blocks of columns there are up to the end of each segment of a copy."""
        return tuple(start // block for start in self.starts[1:])


@triton.jit(do_not_specialize=["count", "lines"])
def _prefix_copy_kernel(
    x, copy,  # [count, D], STRIDE apart; [count, STARTS[PREFIXES]]: segments, scaled, each followed by zeros
    power_out, norm_out, ratio_out,  # [PREFIXES, count], lines apart; None: copied as they are
    count, lines,
    EDGES: tl.constexpr, STARTS: tl.constexpr, PREFIXES: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first, row, column = tl.program_id(0) * BLOCK_R, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    inside = row < count - first
    x += first.to(tl.int64) * STRIDE
    copy += first.to(tl.int64) * STARTS[PREFIXES]
    longer = tl.full([BLOCK_R], 1.0, tl.float32)
    for p in tl.static_range(PREFIXES - 1, -1, -1):
        if power_out is not None:
            power, norm = scale_of(x, row * STRIDE, inside, EDGES[p + 1], BLOCK_R, BLOCK_D)
            # A prefix of zeros has no size of its own, and longer prefixes' gradients pass through it.
            power = tl.where(power == 0, longer, power)
            line = tl.cast(lines, tl.int64) * p + first + row
            tl.store(power_out + line, power, mask=inside)
            tl.store(norm_out + line, norm, mask=inside)
            if p + 1 < PREFIXES:
                step = tl.minimum(tl.maximum(floor_log2(longer) - floor_log2(power), -127), 127)
                tl.store(ratio_out + line + lines, power_of_two(step), mask=inside)
            if p == 0:
                tl.store(ratio_out + line, tl.full([BLOCK_R], 1.0, tl.float32), mask=inside)
            longer = power
        for start in range(0, STARTS[p + 1] - STARTS[p], BLOCK_D):
            mask = inside[:, None] & (start + column < EDGES[p + 1] - EDGES[p])[None, :]
            value = tl.load(x + row[:, None] * STRIDE + column[None, :] + (EDGES[p] + start), mask=mask, other=0)
            if power_out is not None:
                value = value.to(tl.float32) * power[:, None]
            mask = inside[:, None] & (start + column < STARTS[p + 1] - STARTS[p])[None, :]
            at = copy + row[:, None] * STARTS[PREFIXES] + column[None, :] + (STARTS[p] + start)
            tl.store(at, value.to(copy.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["own_first", "pairs", "q_lines", "d_lines"])
def _pairs_kernel(
    shares,  # [PREFIXES, pairs]
    q_norm, q_ratio, d_norm, d_ratio,  # [PREFIXES, rows], lines apart, or None
    targets,  # [pairs] or None: own_first + pair
    factors,  # [PREFIXES, pairs]
    own_first, pairs, q_lines, d_lines,
    PREFIXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each pair and segment: what the copy of either row is multiplied by in the gradient of the other's."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    own = own_first + pair if targets is None else tl.load(targets + pair, mask=inside, other=0)
    q_lines, d_lines = q_lines.to(tl.int64), d_lines.to(tl.int64)
    factor = tl.zeros([BLOCK], tl.float32)
    for p in tl.static_range(PREFIXES - 1, -1, -1):
        at = tl.cast(pairs, tl.int64) * p + pair
        share = tl.load(shares + at, mask=inside, other=0)
        if q_norm is not None:
            if p + 1 < PREFIXES:
                factor *= tl.load(q_ratio + (p + 1) * q_lines + pair, mask=inside, other=0)
                factor *= tl.load(d_ratio + (p + 1) * d_lines + own, mask=inside, other=0)
            share *= 1.0 / tl.load(q_norm + p * q_lines + pair, mask=inside, other=1)
            share *= 1.0 / tl.load(d_norm + p * d_lines + own, mask=inside, other=1)
        factor += share
        tl.store(factors + at, factor, mask=inside)


@triton.jit(do_not_specialize=["count", "parts", "part_rows", "pair_first", "pairs", "lines", "other_lines"])
def _prefix_project_kernel(
    sums,  # [parts, part_rows ≥ count, WIDTH] float32: gradient of the copies' rows over their norms, in parts
    x, out,  # [count, D], STRIDE and OUT_STRIDE apart
    power, norm, ratio, along,  # [PREFIXES, count], lines apart; None: the rows count as they are
    other, other_power,  # partners in positive pairs: [≥ pairs, D], [PREFIXES, ≥ pairs], other_lines apart; or None
    other_rows,  # [pairs] or None: pair i is with row i of other
    factors, radials,  # [PREFIXES, pairs]: as in _pairs_kernel; and what the pair takes of `along`
    largest,  # [1] int32: bits of the number whose power of two sums and along were divided by
    undo,
    count, parts, part_rows, pair_first, pairs, lines, other_lines,
    EDGES: tl.constexpr, PREFIXES: tl.constexpr,
    STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows: of each segment, from the longest prefix on, with what lies along the row taken off."""
    first, row, column = tl.program_id(0) * BLOCK_R, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    inside = row < count - first
    unit = undo * power_of_two(exponent_of(largest))
    pair = first + row - pair_first
    paired = inside & (pair >= 0) & (pair < pairs)
    other_offset = tl.zeros([BLOCK_R], tl.int64)
    if other is not None:
        other_row = pair if other_rows is None else tl.load(other_rows + pair, mask=paired, other=0)
        other_row = tl.where(paired, other_row, 0).to(tl.int64)
        other_offset = other_row * STRIDE
    sums += first.to(tl.int64) * WIDTH
    x += first.to(tl.int64) * STRIDE
    out += first.to(tl.int64) * OUT_STRIDE
    part_stride = tl.cast(part_rows, tl.int64) * WIDTH
    radial = tl.zeros([BLOCK_R], tl.float32)
    for p in tl.static_range(PREFIXES - 1, -1, -1):
        line = tl.cast(lines, tl.int64) * p + first
        pair_line = tl.cast(pairs, tl.int64) * p + pair
        size = tl.full([BLOCK_R], 1.0, tl.float32)
        other_factor = tl.zeros([BLOCK_R], tl.float32)
        if other is not None:
            other_factor = tl.load(factors + pair_line, mask=paired, other=0)
            if norm is not None:
                other_line = tl.cast(other_lines, tl.int64) * p + other_row
                other_factor *= tl.load(other_power + other_line, mask=paired, other=0)
        if norm is not None:
            size = tl.load(power + line + row, mask=inside, other=0)
            inverse = 1.0 / tl.load(norm + line + row, mask=inside, other=1)
            mine = tl.load(along + line + row, mask=inside, other=0) * unit
            if other is not None:
                mine -= tl.load(radials + pair_line, mask=paired, other=0)
            if p + 1 < PREFIXES:
                step = tl.load(ratio + line + lines + row, mask=inside, other=0)
                radial *= step * step
            radial += tl.where(below_eps(size), 0.0, mine * inverse * inverse)
        for start in range(0, EDGES[p + 1] - EDGES[p], BLOCK_D):
            mask = inside[:, None] & (start + column < EDGES[p + 1] - EDGES[p])[None, :]
            at = sums + row[:, None] * WIDTH + column[None, :] + (EDGES[p] + start)
            grad = tl.load(at, mask=mask, other=0)
            for _ in range(1, parts):
                at += part_stride
                grad += tl.load(at, mask=mask, other=0)
            grad *= unit
            if norm is not None:
                value = tl.load(x + row[:, None] * STRIDE + column[None, :] + (EDGES[p] + start), mask=mask, other=0)
                grad -= value.to(tl.float32) * size[:, None] * radial[:, None]
            if other is not None:
                # The row of the positive, kept out of the products: it never meets half precision.
                at = other + other_offset[:, None] + column[None, :] + (EDGES[p] + start)
                value = tl.load(at, mask=mask & (other_factor != 0)[:, None], other=0)
                grad -= value.to(tl.float32) * other_factor[:, None]
            grad *= size[:, None]
            at = out + row[:, None] * OUT_STRIDE + column[None, :] + (EDGES[p] + start)
            tl.store(at, grad.to(out.dtype.element_ty), mask=mask)


class PrefixRows:
    """Rows [N, D] with the power, norm and ratio [prefixes, N] that `copy_prefixes` fills in; None: taken as they are.

    `along` [prefixes, N] is for what lies along the rows of the products that make their gradient.
    """

    power: Tensor | None = None
    norm: Tensor | None = None
    ratio: Tensor | None = None

    def __init__(self, rows: Tensor, prefixes: int, *, normalized: bool) -> None:
        self.rows = rows
        if normalized:
            self.power, self.norm, self.ratio = rows.new_empty(3, prefixes, len(rows), dtype=torch.float32)

    def __getitem__(self, part: slice) -> PrefixRows:
        view = object.__new__(PrefixRows)
        view.rows = self.rows[part]
        if self.power is not None and self.norm is not None and self.ratio is not None:
            view.power, view.norm, view.ratio = self.power[:, part], self.norm[:, part], self.ratio[:, part]
        return view

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lines(self) -> int:
        """Numbers from one prefix's to the next's."""
        return 0 if self.power is None else self.power.stride(0)


def copy_prefixes(x: PrefixRows, segments: Segments) -> Tensor:
    """Copies [N, segments.width] of the rows; fills in power, norm and ratio."""
    copy = x.rows.new_empty(len(x), segments.width)
    block_rows, block_columns = block_of(segments.edges[-1])
    launch(
        _prefix_copy_kernel, (triton.cdiv(len(x), block_rows),),
        x=x.rows, copy=copy, power_out=x.power, norm_out=x.norm, ratio_out=x.ratio, count=len(x), lines=x.lines,
        EDGES=segments.edges, STARTS=segments.starts, PREFIXES=segments.prefixes,
        STRIDE=x.rows.stride(0), BLOCK_R=block_rows, BLOCK_D=block_columns, num_warps=4,
    )  # fmt: skip
    return copy


def pair_factors(
    shares: Tensor, queries: PrefixRows, documents: PrefixRows, targets: Tensor | None, own_first: int
) -> Tensor:
    """What positive pairs take of their gradients in each segment, from their `shares` [prefixes, pairs] in each."""
    factors = torch.empty_like(shares)
    prefixes, pairs = shares.shape
    launch(
        _pairs_kernel, (triton.cdiv(pairs, PAIR_ROWS),),
        shares=shares, q_norm=queries.norm, q_ratio=queries.ratio, d_norm=documents.norm, d_ratio=documents.ratio,
        targets=targets, factors=factors, own_first=own_first, pairs=pairs,
        q_lines=queries.lines, d_lines=documents.lines, PREFIXES=prefixes, BLOCK=PAIR_ROWS, num_warps=4,
    )  # fmt: skip
    return factors


def project_prefixes(
    sums: Tensor,
    x: PrefixRows,
    along: Tensor | None,
    out: Tensor,
    segments: Segments,
    *,
    undo: float,
    largest: Tensor,
    factors: Tensor,
    radials: Tensor,
    partner: PrefixRows | None = None,
    partner_rows: Tensor | None = None,
    pair_first: int = 0,
) -> None:
    """Into out: gradient of the rows of x from that of their copies, the sum of the parts of `sums`.

    Args:
        sums: [parts, N, at least D], times 1 / undo and over the power of two of `largest`. May be out itself.
        x: [N, D].
        along: [prefixes, N]: of these products what lies along the rows, on the scale of sums; None: rows are taken as
            they are.
        out: [N, D].
        factors, radials: [prefixes, pairs], from `pair_factors`, and the shares times the positives' similarities.
        partner: pair i is of row pair_first + i of x and row partner_rows[i] (or i) of `partner`; None: no row has one.
    """
    launch(
        _prefix_project_kernel, (triton.cdiv(len(x), PROJECT_ROWS),),
        sums=sums, x=x.rows, out=out, power=x.power, norm=x.norm, ratio=x.ratio, along=along,
        other=partner.rows if partner else None, other_power=partner.power if partner else None,
        other_rows=partner_rows, factors=factors, radials=radials, largest=largest, undo=undo,
        count=len(x), parts=len(sums), part_rows=sums.shape[1], pair_first=pair_first, pairs=factors.shape[1],
        lines=x.lines, other_lines=partner.lines if partner else 0,
        EDGES=segments.edges, PREFIXES=segments.prefixes,
        STRIDE=x.rows.stride(0), OUT_STRIDE=out.stride(0), WIDTH=sums.shape[2],
        BLOCK_R=PROJECT_ROWS, BLOCK_D=block_of(segments.edges[-1])[1], num_warps=4, **register_limit(4),
    )  # fmt: skip


PROMISES = {
    "_prefix_copy_kernel": ("wide loads",),
    "_pairs_kernel": (),  # reads a few numbers of each pair
    "_prefix_project_kernel": ("wide loads",),
}
