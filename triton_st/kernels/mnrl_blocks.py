"""The two sweeps over a block of the similarity matrix: sums of exponentials, and the weights of the gradients.

A block is some left rows (queries, or their positives) against some right rows (documents, or all queries), both as
copies of one width. What leaves candidates out, or adds to their logits, is chosen by constants and by which pointers
are None, so that the plain form has none of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_st.kernels.products import dot_rows
from triton_st.kernels.rows import exponent_of, inverse, power_of_two


@triton.jit
def _logits(
    similarity, row_scale, own, own_start, bound, left_id, left_twin,
    right_id, right_twin, strength, first, left, period,
    BLOCK_M: tl.constexpr, OWN_IN_LINE: tl.constexpr, OWN_GROUP: tl.constexpr, HARDNESS: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, -inf for whatever is no candidate: the positive, and what the masks leave out.

    `own` is each row's own column. OWN_IN_LINE: they follow one another from own_start on, and only tiles that hold
    some of them look for them. OWN_GROUP leaves out all columns a multiple of `period` further on as well.
    """
    place = tl.arange(0, BLOCK_M)
    column = first + place
    if OWN_GROUP or HARDNESS == 1 or HARDNESS == 2:
        in_group = (column % period)[None, :] == own[:, None]
    if HARDNESS == 0:
        logits = similarity * row_scale[:, None]
    elif HARDNESS == 3:
        logits = similarity * (row_scale + strength)[:, None]
    else:
        added = tl.where(in_group, 0.0, strength) if HARDNESS == 1 else tl.where(in_group, strength, 0.0)
        logits = similarity * (row_scale[:, None] + added)
    if OWN_GROUP:
        logits = tl.where(in_group, float("-inf"), logits)
    elif OWN_IN_LINE:
        if (first < own_start + own.shape[0]) & (own_start < first + BLOCK_M):
            logits = tl.where(column[None, :] == own[:, None], float("-inf"), logits)
    else:
        logits = tl.where(column[None, :] == own[:, None], float("-inf"), logits)
    if left_id is not None:
        inside = place < left
        right = tl.load(right_id + column, mask=inside, other=0)[None, :]
        logits = tl.where((right == left_id[:, None]) | (right == left_twin[:, None]), float("-inf"), logits)
        right = tl.load(right_twin + column, mask=inside, other=0)[None, :]
        logits = tl.where(right == left_id[:, None], float("-inf"), logits)
    if bound is not None:
        logits = tl.where(similarity > bound[:, None], float("-inf"), logits)
    if left < BLOCK_M:
        logits = tl.where((place < left)[None, :], logits, float("-inf"))
    return logits


@triton.jit(
    do_not_specialize=[
        "own_first", "row_first", "column_first", "slot", "fresh", "period", "left_count", "right_count", "row_count",
        "depth",
    ]
)  # fmt: skip
def _sums_kernel(
    left, right,  # copies [left_count, D], [right_count, D]
    left_norm, right_norm,  # [left_count], [right_count], or None: similarities are dot products
    row_scales, positives, bounds,  # [B] each; bounds None: no margin
    targets,  # [B] or None: the row's own column is own_first + row
    left_ids, left_twins, right_ids, right_twins,  # [B], [B], [all columns], [all columns], or None
    tops, totals,  # [slots, B]
    hardest, above,  # [slots, B], or None: no diagnostics
    strength,
    own_first, row_first, column_first, slot, fresh, period,
    left_count, right_count, part_columns, row_count, depth,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    OWN_GROUP: tl.constexpr, HARDNESS: tl.constexpr,
):  # fmt: skip
    """Of one stripe of columns: maximum of the logits, and the sum of their exponentials relative to it.

    Unless it is `fresh`, the stripe goes on from what is in its slot.
    """
    q_start, part = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    m_start = part * part_columns
    q_left, m_left = left_count - q_start, right_count - m_start
    place = tl.arange(0, BLOCK_Q)
    inside = place < q_left
    row = row_first + q_start + place
    left += q_start.to(tl.int64) * D
    right += m_start.to(tl.int64) * D
    row_scale = tl.load(row_scales + row, mask=inside, other=0)
    own_start = own_first + row_first + q_start
    own = own_start + place if targets is None else tl.load(targets + row, mask=inside, other=0).to(tl.int32)
    bound = None if bounds is None else tl.load(bounds + row, mask=inside, other=0)
    left_id = None if left_ids is None else tl.load(left_ids + row, mask=inside, other=0)
    left_twin = None if left_ids is None else tl.load(left_twins + row, mask=inside, other=0)
    if left_norm is not None:
        q_factor = inverse(left_norm + q_start, BLOCK_Q, q_left)
        right_norm += m_start
    at = (slot + part).to(tl.int64) * row_count + row
    later = inside & (place >= fresh * BLOCK_Q)  # none of them where it is fresh
    top = tl.load(tops + at, mask=later, other=float("-inf"))
    total = tl.load(totals + at, mask=later, other=0)
    if hardest is not None:
        positive = tl.load(positives + row, mask=inside, other=0)
        most = tl.load(hardest + at, mask=later, other=float("-inf"))
        reaching = tl.load(above + at, mask=later, other=0)
    for start in range(0, tl.minimum(part_columns, m_left), BLOCK_M):
        similarity = dot_rows(
            left, right, q_left, m_left - start, None, None, depth, D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, False
        )
        if left_norm is not None:
            # In the order of the weights kernel: at a high scale another rounding would not cancel against its own.
            similarity = similarity * q_factor[:, None] * inverse(right_norm, BLOCK_M, m_left - start)[None, :]
            right_norm += BLOCK_M
        logits = _logits(
            similarity, row_scale, own, own_start, bound, left_id, left_twin,
            right_ids, right_twins, strength, column_first + m_start + start, m_left - start, period,
            BLOCK_M, targets is None, OWN_GROUP, HARDNESS,
        )  # fmt: skip
        if hardest is not None:
            rival = tl.where(logits == float("-inf"), float("-inf"), similarity)
            most = tl.maximum(most, tl.max(rival, 1))
            reaching += tl.sum((rival >= positive[:, None]).to(tl.int32), 1)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = new_top
        right += BLOCK_M * D
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, total, mask=inside)
    if hardest is not None:
        tl.store(hardest + at, most, mask=inside)
        tl.store(above + at, reaching, mask=inside)


@triton.jit(
    do_not_specialize=[
        "own_first", "row_first", "column_first", "period", "left_count", "row_count", "depth",
    ]
)  # fmt: skip
def _weights_kernel(
    left, right, left_norm, right_norm, row_scales, positives, bounds, targets,  # as in _sums_kernel
    left_ids, left_twins, right_ids, right_twins,
    logsumexps, coefficients, largest,  # [B], [B], []
    weights,  # [left_count, stride]: coefficient · probability, scaled
    shares, slopes,  # [parts, B]: the plain sums are added here, and those of probability · (similarity − positive)
    strength,
    weight_scale,  # weights are weight_scale · coefficient · probability / (both norms · the largest of them)
    own_first, row_first, column_first, period,
    left_count, right_count, part_columns, row_count, stride, depth,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    OWN_GROUP: tl.constexpr, HARDNESS: tl.constexpr,
):  # fmt: skip
    """Of one stripe of columns: the gradients of the loss by the logits, ready to be multiplied with the copies."""
    q_start, part = tl.program_id(0) * BLOCK_Q, tl.program_id(1)
    m_start = part * part_columns
    q_left, m_left = left_count - q_start, right_count - m_start
    place, m_place = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    inside = place < q_left
    row = row_first + q_start + place
    left += q_start.to(tl.int64) * D
    right += m_start.to(tl.int64) * D
    weights += q_start.to(tl.int64) * stride + m_start
    row_scale = tl.load(row_scales + row, mask=inside, other=1)
    own_start = own_first + row_first + q_start
    own = own_start + place if targets is None else tl.load(targets + row, mask=inside, other=0).to(tl.int32)
    bound = None if bounds is None else tl.load(bounds + row, mask=inside, other=0)
    left_id = None if left_ids is None else tl.load(left_ids + row, mask=inside, other=0)
    left_twin = None if left_ids is None else tl.load(left_twins + row, mask=inside, other=0)
    positive = tl.load(positives + row, mask=inside, other=0)
    logsumexp = tl.load(logsumexps + row, mask=inside, other=0)
    factor = tl.load(coefficients + row, mask=inside, other=0) * power_of_two(-exponent_of(largest)) * weight_scale
    if left_norm is not None:
        q_factor = inverse(left_norm + q_start, BLOCK_Q, q_left)
        factor *= q_factor
        right_norm += m_start
    share = tl.zeros([BLOCK_Q], tl.float32)
    slope = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, tl.minimum(part_columns, m_left), BLOCK_M):
        similarity = dot_rows(
            left, right, q_left, m_left - start, None, None, depth, D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, False
        )
        if left_norm is not None:
            m_factor = inverse(right_norm, BLOCK_M, m_left - start)
            similarity = similarity * q_factor[:, None] * m_factor[None, :]
            right_norm += BLOCK_M
        logits = _logits(
            similarity, row_scale, own, own_start, bound, left_id, left_twin,
            right_ids, right_twins, strength, column_first + m_start + start, m_left - start, period,
            BLOCK_M, targets is None, OWN_GROUP, HARDNESS,
        )  # fmt: skip
        probability = tl.exp(logits - logsumexp[:, None])
        share += tl.sum(probability, 1)
        # An overflown similarity that is left out has the probability 0.
        slope += tl.sum(tl.where(probability == 0, 0.0, probability * (similarity - positive[:, None])), 1)
        weight = probability * factor[:, None]
        if left_norm is not None:
            weight *= m_factor[None, :]
        at = weights + place[:, None] * stride + m_place[None, :]
        mask = inside[:, None] & (m_place < m_left - start)[None, :]
        tl.store(at, weight.to(weights.dtype.element_ty), mask=mask)
        right += BLOCK_M * D
        weights += BLOCK_M
    # Loaded once more: kept through the loop, they are registers that exact products do not have.
    coefficient = tl.load(coefficients + row, mask=inside, other=0)
    row_scale = tl.load(row_scales + row, mask=inside, other=1)
    at = part.to(tl.int64) * row_count + row
    tl.store(shares + at, tl.load(shares + at, mask=inside, other=0) + share * coefficient, mask=inside)
    slope *= coefficient / row_scale
    tl.store(slopes + at, tl.load(slopes + at, mask=inside, other=0) + slope, mask=inside)


PROMISES = {
    "_sums_kernel": ("tensor cores", "wide loads"),
    "_weights_kernel": ("tensor cores", "wide loads"),
}
