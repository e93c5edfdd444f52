"""What is done row by row before and after the sweeps over the blocks: positives first, losses from partial sums."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import launch
from triton_st.kernels.mnrl_prefix_rows import PrefixRows, Segments
from triton_st.kernels.rows import Scaled, block_of, divisor, exponent_of, norms, power_of_two

LOSS_ROWS = 128


@triton.jit(do_not_specialize=["own_first", "row_count", "scale_stride"])
def _positives_kernel(
    queries, documents,  # [B, D], [M, D], lines STRIDE apart
    targets,  # [B] or None: own_first + row
    scale, row_weights,  # [B] (scale_stride 1) or [] (0); [B] or None: weight / B
    positives, row_scales, coefficients, bounds,  # [B] each; bounds None: no margin
    own_first, row_count, scale_stride,
    weight, margin,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMALIZED: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Of each row: its positive's similarity, its scale, what its gradient by the similarities is multiplied by, and
    the largest similarity that the margin lets pass.
    """
    first, place, column = tl.program_id(0) * BLOCK_R, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    row = first + place
    inside = place < row_count - first
    own = own_first + row if targets is None else tl.load(targets + row, mask=inside, other=0)
    x = queries + first.to(tl.int64) * STRIDE
    x_offset, y_offset = place * STRIDE, own.to(tl.int64) * STRIDE
    dot = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if NORMALIZED:
        x_norm, x_power = norms(x, x_offset, inside, D, BLOCK_R, BLOCK_D)
        y_norm, y_power = norms(documents, y_offset, inside, D, BLOCK_R, BLOCK_D)
    for start in range(0, D, BLOCK_D):
        mask = inside[:, None] & (start + column < D)[None, :]
        x_value = tl.load(x + x_offset[:, None] + column[None, :] + start, mask=mask, other=0).to(tl.float32)
        y_value = tl.load(documents + y_offset[:, None] + column[None, :] + start, mask=mask, other=0).to(tl.float32)
        if NORMALIZED:
            x_value, y_value = x_value * x_power[:, None], y_value * y_power[:, None]
        dot += x_value * y_value
    positive = tl.sum(dot, 1)
    if NORMALIZED:
        positive = positive * (1.0 / divisor(x_norm, x_power)) * (1.0 / divisor(y_norm, y_power))
    row_scale = tl.load(scale + row * scale_stride, mask=inside, other=1)
    if row_weights is None:
        coefficient = row_scale * (weight / row_count)
    else:
        coefficient = row_scale * weight * tl.load(row_weights + row, mask=inside, other=0)
    tl.store(positives + row, positive, mask=inside)
    tl.store(row_scales + row, row_scale, mask=inside)
    tl.store(coefficients + row, coefficient, mask=inside)
    if bounds is not None:
        tl.store(bounds + row, positive - margin * (tl.abs(positive) if RELATIVE else 1.0), mask=inside)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0, to a few units in the last place also where x is small."""
    one_plus = 1.0 + x
    # Kahan: the rounding of 1 + x is undone by the factor x / ((1 + x) - 1).
    exact = one_plus == 1.0
    return tl.where(exact, x, tl.log(one_plus) * (x / tl.where(exact, 1.0, one_plus - 1.0)))


@triton.jit(do_not_specialize=["slot", "slots", "row_count", "diagnosed", "accumulate"])
def _losses_kernel(
    tops, totals,  # [all slots, B]: partial sums over the candidates without the positive
    positives, row_scales, coefficients,  # [B]
    losses, logsumexps,  # [B], [B]
    largest,  # [1] int32: bits of the largest coefficient · probability
    hardest, above,  # [all slots, B] or None
    diagnostics,  # [4, B] or None
    slot, slots, row_count, diagnosed, accumulate,
    weight, copies,  # the positive stands `copies` times among the candidates
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one softmax, from the partial sums in `slots` slots."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < row_count
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    at = slot * tl.cast(row_count, tl.int64) + row
    for _ in range(0, slots):
        top = tl.maximum(top, tl.load(tops + at, mask=inside, other=0))
        at += row_count
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    at = slot * tl.cast(row_count, tl.int64) + row
    for _ in range(0, slots):
        part_top = tl.load(tops + at, mask=inside, other=0)
        total += tl.load(totals + at, mask=inside, other=0) * tl.exp(part_top - shift)
        at += row_count
    similarity = tl.load(positives + row, mask=inside, other=0)
    positive = similarity * tl.load(row_scales + row, mask=inside, other=0)
    others = tl.where(total == 0, float("-inf"), shift + tl.log(tl.where(total == 0, 1.0, total)))
    more = tl.log(copies)
    gap = others - positive - more
    excess = _log1p(tl.exp(-tl.abs(gap)))
    # Not positive + loss: that would round a large logit of the others twice.
    logsumexp = tl.where(gap > 0, others, positive + more) + excess
    loss = weight * (tl.maximum(gap, 0.0) + excess + more)
    if accumulate != 0:
        loss += tl.load(losses + row, mask=inside, other=0)
    tl.store(losses + row, loss, mask=inside)
    tl.store(logsumexps + row, logsumexp, mask=inside)
    coefficient = tl.abs(tl.load(coefficients + row, mask=inside, other=0))
    steepest = tl.where(inside, coefficient * tl.exp(top - logsumexp), 0.0)
    tl.atomic_max(largest, tl.max(steepest).to(tl.int32, bitcast=True))  # the order of integers does not matter
    if diagnostics is not None:
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        reaching = tl.zeros([BLOCK], tl.int32)
        at = row.to(tl.int64)
        for _ in range(0, diagnosed):
            most = tl.maximum(most, tl.load(hardest + at, mask=inside, other=0))
            reaching += tl.load(above + at, mask=inside, other=0)
            at += row_count
        tl.store(diagnostics + row, (reaching == 0).to(tl.float32), mask=inside)
        tl.store(diagnostics + row_count + row, 1.0 / (1 + reaching).to(tl.float32), mask=inside)
        tl.store(diagnostics + 2 * row_count + row, similarity, mask=inside)
        tl.store(diagnostics + 3 * row_count + row, most, mask=inside)


@triton.jit
def _gathered_kernel(
    sums,  # [1 or more, M, WIDTH] float32; the first part is written to
    norm,  # [M] or None
    queries, q_power, q_norm,  # [B, D], lines STRIDE apart; [B] each, or None: the rows, or their copies, as they are
    order, starts,  # [B] queries by target, [M + 1] where each document's begin
    share,  # [B]
    along, radials,  # [M], [B] or None: what else a document's sum is subtracted from, and is the sum of
    largest,
    undo,
    STRIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Subtracts from a document's sum what it gets as the positive of any number of queries, in their order."""
    document = tl.program_id(0)
    start, stop = tl.load(starts + document), tl.load(starts + document + 1)
    unit = undo * power_of_two(exponent_of(largest))
    if norm is not None:
        unit *= tl.load(norm + document)
    sums += document.to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK_D)
    if start < stop:
        for first in range(0, D, BLOCK_D):
            mask = first + column < D
            total = tl.zeros([BLOCK_D], tl.float32)
            for place in range(start, stop):
                row = tl.load(order + place)
                factor = tl.load(share + row)
                if q_norm is not None:
                    factor *= tl.load(q_power + row) / tl.load(q_norm + row)
                elif q_power is not None:
                    factor *= tl.load(q_power + row)
                value = tl.load(queries + row.to(tl.int64) * STRIDE + first + column, mask=mask, other=0)
                total += value.to(tl.float32) * factor
            at = sums + first + column
            tl.store(at, tl.load(at, mask=mask, other=0) - total / unit, mask=mask)
        if along is not None:
            radial = 0.0
            for place in range(start, stop):
                radial += tl.load(radials + tl.load(order + place))
            tl.store(along + document, tl.load(along + document) - radial / unit)


def subtract_gathered(
    sums: Tensor, documents: Scaled, queries: Scaled, targets: Tensor, share: Tensor, largest: Tensor, undo: float
) -> None:
    """From the documents' sums [parts, M, width], what being `targets` [B] of queries takes: `share` [parts, B].

    A document may be the positive of many queries or of none, so each adds up its own queries' rows, sorted beforehand.
    """
    order, starts = _by_target(targets, len(documents))
    _subtract(
        sums, documents.norm, queries.rows, queries.power, queries.norm, order, starts, share.sum(0), None, None,
        largest, undo,
    )  # fmt: skip


def subtract_gathered_prefixes(
    sums: Tensor,
    along: Tensor | None,
    queries: PrefixRows,
    targets: Tensor,
    factors: Tensor,
    radials: Tensor,
    segments: Segments,
    largest: Tensor,
    undo: float,
) -> None:
    """As `subtract_gathered`, of rows in segments; and from `along` [prefixes, M] what it takes of that."""
    order, starts = _by_target(targets, sums.shape[1])
    for p, (begin, end) in enumerate(itertools.pairwise(segments.edges)):
        power = None if queries.power is None else queries.power[p]
        _subtract(
            sums[:, :, begin:], None, queries.rows[:, begin:end], power, None, order, starts, factors[p],
            None if along is None else along[p], radials[p], largest, undo,
        )  # fmt: skip


def _by_target(targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Queries in the order of their targets, and where those of each of `count` documents begin."""
    ordered, order = torch.sort(targets, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=targets.device))


def _subtract(
    sums: Tensor,
    norm: Tensor | None,
    queries: Tensor,
    q_power: Tensor | None,
    q_norm: Tensor | None,
    order: Tensor,
    starts: Tensor,
    share: Tensor,
    along: Tensor | None,
    radials: Tensor | None,
    largest: Tensor,
    undo: float,
) -> None:
    d = queries.shape[1]
    launch(
        _gathered_kernel, (len(starts) - 1,),
        sums=sums, norm=norm, queries=queries, q_power=q_power, q_norm=q_norm, order=order, starts=starts, share=share,
        along=along, radials=radials, largest=largest, undo=undo, STRIDE=queries.stride(0), D=d, WIDTH=sums.stride(1),
        BLOCK_D=min(1024, max(16, triton.next_power_of_2(d))), num_warps=4,
    )  # fmt: skip


def positives(
    queries: Tensor,
    documents: Tensor,
    targets: Tensor | None,
    own_first: int,
    scale: Tensor,
    row_weights: Tensor | None,
    *,
    normalized: bool,
    weight: float,
    margin: float | None,
    relative: bool,
    out: Tensor,
) -> None:
    """Into out [4, B] or, without margin, [3, B]: each row's positive similarity, scale, coefficient of its gradient,
    and bound by the margin.
    """
    b, d = queries.shape
    block_rows, block_columns = block_of(d)
    launch(
        _positives_kernel, (triton.cdiv(b, block_rows),),
        queries=queries, documents=documents, targets=targets, scale=scale, row_weights=row_weights,
        positives=out[0], row_scales=out[1], coefficients=out[2], bounds=None if margin is None else out[3],
        own_first=own_first, row_count=b, scale_stride=scale.dim(), weight=weight, margin=float(margin or 0),
        STRIDE=queries.stride(0), D=d, BLOCK_R=block_rows, BLOCK_D=block_columns, NORMALIZED=normalized,
        RELATIVE=relative, num_warps=4,
    )  # fmt: skip


PROMISES = {
    "_positives_kernel": ("wide loads",),
    "_losses_kernel": (),  # reads a few numbers of each row
    "_gathered_kernel": (),  # reads the rows of positives only
}
