"""The two sweeps over a block of the similarity matrix where the loss is that of several prefixes of the rows.

A segment is the columns that a prefix adds to the one before; it fills whole blocks of a copy. The dot products of a
prefix are those of the one before plus one segment's, and the gradient of a segment's columns is one product, with the
sum of the weights of all prefixes that reach it: so both sweeps, and both sides' sums, are each one product over D.

Each segment of a copy has the size that suits its own prefix (`mnrl_prefix_rows`), so dot products are multiplied by
the `ratio` of two powers of two on the way from one prefix to the next, and sums of weights on the way back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_st.kernels.mnrl_blocks import _logits
from triton_st.kernels.rows import exponent_of, inverse, power_of_two


@triton.jit
def _add_dots(
    acc, left, right, q_left, m_left, first, last,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_Q, BLOCK_M] plus the dot products over blocks [first, last) of the columns; see `dot_rows`."""
    k = tl.arange(0, BLOCK_K)
    q_row, m_row = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    left_at = left + q_row[:, None] * D + k[None, :]
    right_at = right + m_row[None, :] * D + k[:, None]
    for block in range(first, last):
        x = tl.load(left_at + block * BLOCK_K, mask=(q_row < q_left)[:, None], other=0)
        y = tl.load(right_at + block * BLOCK_K, mask=(m_row < m_left)[None, :], other=0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _factors(values, BLOCK: tl.constexpr, left):
    """The first values [BLOCK], 0 past the end."""
    row = tl.arange(0, BLOCK)
    return tl.load(values + row, mask=row < left, other=0)


@triton.jit
def _to_prefix(
    dots, prefix, first, left, right, left_ratio, right_ratio, left_lines, right_lines, q_left, m_left,
    D: tl.constexpr, ENDS: tl.constexpr, PREFIXES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of a prefix's copies from those of the prefix before, which ends with block `first`; and its end."""
    last = 0
    for p in tl.static_range(PREFIXES):
        last = tl.where(prefix == p, ENDS[p], last)
    if left_ratio is not None:
        line = tl.cast(prefix, tl.int64)
        left_step = _factors(left_ratio + line * left_lines, BLOCK_Q, q_left)
        right_step = _factors(right_ratio + line * right_lines, BLOCK_M, m_left)
        dots = dots * left_step[:, None] * right_step[None, :]
    dots = _add_dots(dots, left, right, q_left, m_left, first, last, D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION)
    return dots, last


@triton.jit(
    do_not_specialize=[
        "own_first", "row_first", "column_first", "slot", "slots", "fresh", "period", "left_count", "right_count",
        "row_count", "left_lines", "right_lines",
    ]
)  # fmt: skip
def _prefix_sums_kernel(
    left, right,  # copies [left_count, D], [right_count, D]
    left_norm, right_norm, left_ratio, right_ratio,  # [prefixes, rows], lines apart; None: dot products
    row_scales, positives, bounds,  # [B], [prefixes, B] twice; bounds None: no margin
    targets,  # [B] or None: the row's own column is own_first + row
    left_ids, left_twins, right_ids, right_twins,  # [B], [B], [all columns], [all columns], or None
    tops, totals,  # [prefixes, slots, B]
    hardest, above,  # [slots, B] of the longest prefix, or None: no diagnostics
    strength,
    own_first, row_first, column_first, slot, slots, fresh, period,
    left_count, right_count, part_columns, row_count, left_lines, right_lines,
    D: tl.constexpr, ENDS: tl.constexpr, PREFIXES: tl.constexpr, LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    OWN_GROUP: tl.constexpr, HARDNESS: tl.constexpr,
):  # fmt: skip
    """As `_sums_kernel`, of each prefix; segment p ends with block ENDS[p] of the columns.

    The running sums of all prefixes are lanes of one tensor, so that the code and its registers hardly grow with them.
    """
    q_start, part = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    m_start = part * part_columns
    q_left, m_left = left_count - q_start, right_count - m_start
    place, lane = tl.arange(0, BLOCK_Q), tl.arange(0, LANES)
    inside = place < q_left
    row = row_first + q_start + place
    left += q_start.to(tl.int64) * D
    right += m_start.to(tl.int64) * D
    row_scale = tl.load(row_scales + row, mask=inside, other=0)
    own_start = own_first + row_first + q_start
    own = own_start + place if targets is None else tl.load(targets + row, mask=inside, other=0).to(tl.int32)
    left_id = None if left_ids is None else tl.load(left_ids + row, mask=inside, other=0)
    left_twin = None if left_ids is None else tl.load(left_twins + row, mask=inside, other=0)
    if left_norm is not None:
        left_norm += q_start
        left_ratio += q_start
        right_norm += m_start
        right_ratio += m_start
    at = (lane.to(tl.int64) * slots + slot + part)[None, :] * row_count + row[:, None]
    kept = inside[:, None] & (lane < PREFIXES)[None, :]
    later = kept & (place >= fresh * BLOCK_Q)[:, None]  # none of them where it is fresh
    all_tops = tl.load(tops + at, mask=later, other=float("-inf"))
    all_totals = tl.load(totals + at, mask=later, other=0)
    if hardest is not None:
        fact = (slot + part).to(tl.int64) * row_count + row
        longest = positives + tl.cast(row_count, tl.int64) * (PREFIXES - 1)
        positive = tl.load(longest + row, mask=inside, other=0)
        most = tl.load(hardest + fact, mask=inside & (place >= fresh * BLOCK_Q), other=float("-inf"))
        reaching = tl.load(above + fact, mask=inside & (place >= fresh * BLOCK_Q), other=0)
    for start in range(0, tl.minimum(part_columns, m_left), BLOCK_M):
        dots = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
        first = 0
        for prefix in range(PREFIXES):
            dots, first = _to_prefix(
                dots, prefix, first, left, right, left_ratio, right_ratio, left_lines, right_lines,
                q_left, m_left - start, D, ENDS, PREFIXES, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION,
            )  # fmt: skip
            line = tl.cast(prefix, tl.int64)
            similarity = dots
            if left_norm is not None:
                # In the order of the weights kernel: at a high scale another rounding would not cancel against its own.
                q_factor = inverse(left_norm + line * left_lines, BLOCK_Q, q_left)
                m_factor = inverse(right_norm + line * right_lines, BLOCK_M, m_left - start)
                similarity = dots * q_factor[:, None] * m_factor[None, :]
            bound = None if bounds is None else tl.load(bounds + line * row_count + row, mask=inside, other=0)
            logits = _logits(
                similarity, row_scale, own, own_start, bound, left_id, left_twin,
                right_ids, right_twins, strength, column_first + m_start + start, m_left - start, period,
                BLOCK_M, targets is None, OWN_GROUP, HARDNESS,
            )  # fmt: skip
            if hardest is not None:  # noqa: SIM102, of which only this one is decided when compiling
                if prefix == PREFIXES - 1:
                    rival = tl.where(logits == float("-inf"), float("-inf"), similarity)
                    most = tl.maximum(most, tl.max(rival, 1))
                    reaching += tl.sum((rival >= positive[:, None]).to(tl.int32), 1)
            mine = (lane == prefix)[None, :]
            top = tl.max(tl.where(mine, all_tops, float("-inf")), 1)
            total = tl.sum(tl.where(mine, all_totals, 0.0), 1)
            new_top = tl.maximum(top, tl.max(logits, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
            all_tops = tl.where(mine, new_top[:, None], all_tops)
            all_totals = tl.where(mine, total[:, None], all_totals)
        right += BLOCK_M * D
        if left_norm is not None:
            right_norm += BLOCK_M
            right_ratio += BLOCK_M
    tl.store(tops + at, all_tops, mask=kept)
    tl.store(totals + at, all_totals, mask=kept)
    if hardest is not None:
        tl.store(hardest + fact, most, mask=inside)
        tl.store(above + fact, reaching, mask=inside)


@triton.jit(do_not_specialize=["left_count", "right_count", "left_lines", "right_lines"])
def _prefix_products_kernel(
    left, right, left_ratio, right_ratio,  # as in _prefix_sums_kernel
    products,  # [prefixes, left rows, right columns] float32, `panel` and `stride` apart
    left_count, right_count, left_lines, right_lines, stride, panel,
    D: tl.constexpr, ENDS: tl.constexpr, PREFIXES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products of each prefix's copies."""
    q_start, m_start = tl.program_id(0) * BLOCK_Q, tl.program_id(1) * BLOCK_M
    q_left, m_left = left_count - q_start, right_count - m_start
    place, m_place = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    left += q_start.to(tl.int64) * D
    right += m_start.to(tl.int64) * D
    products += q_start.to(tl.int64) * stride + m_start
    if left_ratio is not None:
        left_ratio += q_start
        right_ratio += m_start
    dots = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    first = 0
    for prefix in range(PREFIXES):
        dots, first = _to_prefix(
            dots, prefix, first, left, right, left_ratio, right_ratio, left_lines, right_lines,
            q_left, m_left, D, ENDS, PREFIXES, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip
        at = products + place[:, None] * stride + m_place[None, :]
        tl.store(at, dots, mask=(place < q_left)[:, None] & (m_place < m_left)[None, :])
        products += panel


@triton.jit(
    do_not_specialize=[
        "own_first", "row_first", "column_first", "period", "left_count", "row_count", "left_lines", "right_lines",
        "parts",
    ]
)  # fmt: skip
def _prefix_weights_kernel(
    products,  # from _prefix_products_kernel
    left_norm, right_norm, left_ratio, right_ratio,  # as in _prefix_sums_kernel
    row_scales, positives, bounds, targets, left_ids, left_twins, right_ids, right_twins,
    logsumexps, coefficients, largest,  # [prefixes, B] twice, []
    weights,  # like products: one panel for the product of each segment
    shares, slopes,  # [prefixes, parts, B], [parts, B]: the plain sums are added here, and as in _weights_kernel
    left_along, right_along,  # [prefixes, parts, B], added to; [row blocks, prefixes, right_count]
    strength,
    weight_scale,  # as in _weights_kernel
    own_first, row_first, column_first, period,
    left_count, right_count, row_count, left_lines, right_lines, parts, stride, panel,
    PREFIXES: tl.constexpr, STILL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    OWN_GROUP: tl.constexpr, HARDNESS: tl.constexpr,
):  # fmt: skip
    """Of one tile: for each segment the gradients of the loss by the logits of all prefixes that reach it, ready to be
    multiplied with the copies; and how much of what these products will be lies along the rows themselves.

    That is Σ weight · dot product, of each prefix by itself, for it cannot be told from the sums of several. What a
    prefix's weight is there is the difference of two segments' as they are stored, so that rounding them turns no row.
    STILL: cosines of the first prefix are ±1 and have no gradient.
    """
    q_start, part = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    m_start = part * BLOCK_M
    q_left, m_left = left_count - q_start, right_count - m_start
    place, m_place = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    inside, m_inside = place < q_left, m_place < m_left
    mask = inside[:, None] & m_inside[None, :]
    row = row_first + q_start + place
    tile = q_start.to(tl.int64) * stride + m_start
    row_scale = tl.load(row_scales + row, mask=inside, other=1)
    own_start = own_first + row_first + q_start
    own = own_start + place if targets is None else tl.load(targets + row, mask=inside, other=0).to(tl.int32)
    left_id = None if left_ids is None else tl.load(left_ids + row, mask=inside, other=0)
    left_twin = None if left_ids is None else tl.load(left_twins + row, mask=inside, other=0)
    unit = power_of_two(-exponent_of(largest)) * weight_scale
    if left_norm is not None:
        left_norm += q_start
        left_ratio += q_start
        right_norm += m_start
        right_ratio += m_start
        right_along += tl.program_id(0).to(tl.int64) * PREFIXES * right_count + m_start
    slope = tl.zeros([BLOCK_Q], tl.float32)
    summed = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    stored = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    for i in range(PREFIXES):
        prefix = tl.cast(PREFIXES - 1 - i, tl.int64)
        fact = prefix * row_count + row
        coefficient = tl.load(coefficients + fact, mask=inside, other=0)
        positive = tl.load(positives + fact, mask=inside, other=0)
        logsumexp = tl.load(logsumexps + fact, mask=inside, other=0)
        bound = None if bounds is None else tl.load(bounds + fact, mask=inside, other=0)
        at = tile + prefix * panel + (place[:, None] * stride + m_place[None, :])
        dots = tl.load(products + at, mask=mask, other=0)
        similarity = dots
        factor = coefficient * unit
        if left_norm is not None:
            q_factor = inverse(left_norm + prefix * left_lines, BLOCK_Q, q_left)
            m_factor = inverse(right_norm + prefix * right_lines, BLOCK_M, m_left)
            similarity = dots * q_factor[:, None] * m_factor[None, :]
            factor *= q_factor
        logits = _logits(
            similarity, row_scale, own, own_start, bound, left_id, left_twin,
            right_ids, right_twins, strength, column_first + m_start, m_left, period,
            BLOCK_M, targets is None, OWN_GROUP, HARDNESS,
        )  # fmt: skip
        probability = tl.exp(logits - logsumexp[:, None])
        # An overflown similarity that is left out has the probability 0.
        away = tl.sum(tl.where(probability == 0, 0.0, probability * (similarity - positive[:, None])), 1)
        slope += away * coefficient / row_scale
        share = tl.sum(probability, 1) * coefficient
        if STILL:
            share, factor = tl.where(prefix == 0, 0.0, share), tl.where(prefix == 0, 0.0, factor)
        weight = probability * factor[:, None]
        if left_norm is not None:
            weight *= m_factor[None, :]
        summed += weight
        rounded = summed.to(weights.dtype.element_ty)
        tl.store(weights + at, rounded, mask=mask)
        sum_at = (prefix * parts + part) * row_count + row
        tl.store(shares + sum_at, tl.load(shares + sum_at, mask=inside, other=0) + share, mask=inside)
        if left_norm is not None:
            mine = rounded.to(tl.float32) - stored
            along = tl.where(mine == 0, 0.0, mine * dots)
            before = tl.load(left_along + sum_at, mask=inside, other=0)
            tl.store(left_along + sum_at, before + tl.sum(along, 1), mask=inside)
            tl.store(right_along + prefix * right_count + m_place, tl.sum(along, 0), mask=m_inside)
            left_step = _factors(left_ratio + prefix * left_lines, BLOCK_Q, q_left)[:, None]
            right_step = _factors(right_ratio + prefix * right_lines, BLOCK_M, m_left)[None, :]
            summed = summed * left_step * right_step
            stored = rounded.to(tl.float32) * left_step * right_step
    sum_at = part.to(tl.int64) * row_count + row
    tl.store(slopes + sum_at, tl.load(slopes + sum_at, mask=inside, other=0) + slope, mask=inside)


PROMISES = {
    "_prefix_sums_kernel": ("tensor cores", "wide loads"),
    "_prefix_products_kernel": ("tensor cores", "wide loads"),
    "_prefix_weights_kernel": ("wide loads",),
}
