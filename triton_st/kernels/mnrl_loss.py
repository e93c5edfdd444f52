"""Multiple negatives ranking loss, streamed over tiles of the similarity matrix.

Forward: each program walks along a stripe of documents with an online log-sum-exp of the negatives; the positive is
kept apart, so that loss = log(1 + exp(negatives − positive)) keeps its digits when it is small.

Backward: what a fused kernel would accumulate, [queries, D] in registers, does not fit them for D ≥ 256, and cutting D
makes it form every similarity again per cut. So a panel of probabilities of at most `PANEL_BYTES` (it stays in the L2
cache) is formed once and serves two plain products, one for each gradient: three products in all, whatever D.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Call, Tile, dot_precision, launch, meta, padded_width, product_tile, splits
from triton_st.kernels.products import dot_rows, new_sums, weighted_sum
from triton_st.kernels.rows import COPY_EXPONENT, Scaled, Statistics, copy_rows, inverse, project

PANEL_BYTES = 32 << 20
PANEL_COLUMNS = 4096

WEIGHT_EXPONENT = 13
"""Probabilities are stored times 2^13 · (1, 2] · (1, 2], the last two being the norms' mantissas: up to 2^15 in half,
and down to 2^-27 with all 11 bits."""
WEIGHT_SCALE = 2.0 ** (2 * (COPY_EXPONENT + 1) + WEIGHT_EXPONENT)


@triton.jit
def _negatives(
    queries, documents, q_left, q_power, d_power, q_factor, d_norm, pair_offset, d_left, count, depth,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Of the first `count` documents: maximum and rescaled sum of the negatives' exponentials, and the positive's logit
    where it is met. Pointers are at the stripe's first query and document; query i's positive is document
    i + pair_offset. [BLOCK_Q] each.
    """
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    positive = tl.zeros([BLOCK_Q], tl.float32)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    for start in range(0, count, BLOCK_M):
        logits = dot_rows(
            queries, documents, q_left, d_left - start, q_power, d_power, depth,
            D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, SCALED,
        )  # fmt: skip
        logits = logits * q_factor[:, None] * inverse(d_norm, BLOCK_M, d_left - start)[None, :]
        if (start < pair_offset + BLOCK_Q) & (pair_offset < start + BLOCK_M):
            pair = (row + pair_offset)[:, None] == (column + start)[None, :]
            positive += tl.sum(tl.where(pair, logits, 0.0), 1)
            logits = tl.where(pair, float("-inf"), logits)
        if d_left - start < BLOCK_M:
            logits = tl.where((column < d_left - start)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = new_top
        documents += BLOCK_M * D
        d_norm += BLOCK_M
        d_power += BLOCK_M
    return top, total, positive


@triton.jit(do_not_specialize=["q_count", "d_count", "part_documents", "depth"])
def _negatives_kernel(
    queries, documents,  # [B, D], [M, D]
    q_power, q_norm, d_power, d_norm, extreme,
    tops, totals,  # [parts, B]
    positives,  # [B]
    scale,
    q_count, d_count, part_documents, depth,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_first = tl.program_id(0) * BLOCK_Q
    part = tl.program_id(1)
    d_first = part * part_documents
    q_left, d_left = q_count - q_first, d_count - d_first
    count = tl.minimum(part_documents, d_left)
    queries += q_first.to(tl.int64) * D
    documents += d_first.to(tl.int64) * D
    q_power, d_power, d_norm = q_power + q_first, d_power + d_first, d_norm + d_first
    q_factor = inverse(q_norm + q_first, BLOCK_Q, q_left) * scale
    pair_offset = q_first - d_first
    # No product of halves leaves float32's range.
    if queries.dtype.element_ty == tl.float16 or tl.load(extreme) == 0:
        top, total, positive = _negatives(
            queries, documents, q_left, q_power, d_power, q_factor, d_norm, pair_offset, d_left, count, depth,
            D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, False,
        )  # fmt: skip
    else:
        top, total, positive = _negatives(
            queries, documents, q_left, q_power, d_power, q_factor, d_norm, pair_offset, d_left, count, depth,
            D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, True,
        )  # fmt: skip
    row = tl.arange(0, BLOCK_Q)
    slot = part.to(tl.int64) * q_count + q_first + row
    tl.store(tops + slot, top, mask=row < q_left)
    tl.store(totals + slot, total, mask=row < q_left)
    met = (row + pair_offset >= 0) & (row + pair_offset < count)
    tl.store(positives + q_first + row, positive, mask=(row < q_left) & met)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0, to a few units in the last place also where x is small."""
    one_plus = 1.0 + x
    # Kahan: the rounding of 1 + x is undone by the factor x / ((1 + x) - 1).
    exact = one_plus == 1.0
    return tl.where(exact, x, tl.log(one_plus) * (x / tl.where(exact, 1.0, one_plus - 1.0)))


@triton.jit(do_not_specialize=["q_count", "parts"])
def _loss_kernel(
    tops, totals, positives,  # [parts, B], [parts, B], [B]
    loss, logsumexp,  # [], [B]
    q_count, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: rows in a fixed order, so that the mean has the same bits every time."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, q_count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < q_count
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        slot = row.to(tl.int64)
        for _ in range(0, parts):
            top = tl.maximum(top, tl.load(tops + slot, mask=inside, other=0))
            slot += q_count
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([BLOCK], tl.float32)
        slot = row.to(tl.int64)
        for _ in range(0, parts):
            part_top = tl.load(tops + slot, mask=inside, other=0)
            total += tl.load(totals + slot, mask=inside, other=0) * tl.exp(part_top - shift)
            slot += q_count
        positive = tl.load(positives + row, mask=inside, other=0)
        negatives = shift + tl.log(tl.where(total == 0, 1.0, total))
        negatives = tl.where(total == 0, float("-inf"), negatives)
        gap = negatives - positive
        excess = _log1p(tl.exp(-tl.abs(gap)))
        row_loss = tl.maximum(gap, 0.0) + excess
        # Not positive + row_loss: that would round a large negative's logit twice.
        tl.store(logsumexp + row, tl.where(gap > 0, negatives, positive) + excess, mask=inside)
        sums += tl.where(inside, row_loss, 0.0)
    tl.store(loss, tl.sum(sums) / q_count)


@triton.jit(do_not_specialize=["q_first", "d_first", "q_count", "share_rows", "depth"])
def _weights_kernel(
    queries, documents,  # one panel's copies [q_count, D], [d_count, D]
    q_norm, d_norm, logsumexp,  # [q_count], [d_count], [q_count]
    weights,  # [q_count, stride]: probabilities of the negatives, scaled
    share,  # [parts, share_rows] float32: their plain sums are added here
    scale, weight_scale,  # weights are weight_scale · probability / (both norms)
    q_first, d_first,  # the panel's first query and document
    q_count, d_count, part_documents, share_rows, stride, depth,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    q_start = tl.program_id(0) * BLOCK_Q
    part = tl.program_id(1)
    d_start = part * part_documents
    q_left, d_left = q_count - q_start, d_count - d_start
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M)
    inside = row < q_left
    queries += q_start.to(tl.int64) * D
    documents += d_start.to(tl.int64) * D
    d_norm += d_start
    weights += q_start.to(tl.int64) * stride + d_start
    pair_offset = q_first + q_start - d_first - d_start
    q_factor = inverse(q_norm + q_start, BLOCK_Q, q_left) * scale
    logsumexp_row = tl.load(logsumexp + q_start + row, mask=inside, other=0)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, tl.minimum(part_documents, d_left), BLOCK_M):
        logits = dot_rows(
            queries, documents, q_left, d_left - start, q_norm, d_norm, depth,
            D, BLOCK_Q, BLOCK_M, BLOCK_K, PRECISION, False,
        )  # fmt: skip
        d_factor = inverse(d_norm, BLOCK_M, d_left - start)
        logits = logits * q_factor[:, None] * d_factor[None, :]
        probability = tl.exp(logits - logsumexp_row[:, None])
        d_inside = (column < d_left - start)[None, :]
        if d_left - start < BLOCK_M:
            probability = tl.where(d_inside, probability, 0.0)
        if (start < pair_offset + BLOCK_Q) & (pair_offset < start + BLOCK_M):
            pair = (row + pair_offset)[:, None] == (column + start)[None, :]
            probability = tl.where(pair, 0.0, probability)
        total += tl.sum(probability, 1)
        weight = probability * (q_factor * (weight_scale / scale))[:, None] * d_factor[None, :]
        at = weights + row[:, None] * stride + column[None, :]
        tl.store(at, weight.to(weights.dtype.element_ty), mask=inside[:, None] & d_inside)
        documents += BLOCK_M * D
        d_norm += BLOCK_M
        weights += BLOCK_M
    at = share + part.to(tl.int64) * share_rows + q_start + row
    tl.store(at, tl.load(at, mask=inside, other=0) + total, mask=inside)


def _stripes(tile: Tile, q_count: int, d_count: int, parts: int | None = None) -> tuple[int, int]:
    """Into how many stripes of documents to cut a matrix, and how many documents make a stripe."""
    tiles = triton.cdiv(d_count, tile.columns)
    parts = parts or splits(triton.cdiv(q_count, tile.rows), tiles)
    return parts, triton.cdiv(tiles, parts) * tile.columns


def mnrl_loss_forward(queries: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """queries [B, D], documents [M, D] -> the loss [], the log-sum-exp of each query's scaled similarities [B]."""
    queries, documents = queries.contiguous(), documents.contiguous()
    (b, d), m = queries.shape, len(documents)
    rows = Statistics(queries, documents)
    aligned = d == padded_width(queries.dtype, d)
    tile = product_tile(queries.dtype, b, m, aligned=aligned, epilogue=True)
    parts, part_documents = _stripes(tile, b, m)
    tops, totals = queries.new_empty(2, parts, b, dtype=torch.float32)
    positives, logsumexp = (queries.new_empty(b, dtype=torch.float32) for _ in range(2))
    loss = queries.new_empty((), dtype=torch.float32)
    launch(
        _negatives_kernel, (triton.cdiv(b, tile.rows), parts),
        queries=queries, documents=documents, q_power=rows.a_power, q_norm=rows.a_norm, d_power=rows.b_power,
        d_norm=rows.b_norm, extreme=rows.extreme, tops=tops, totals=totals, positives=positives, scale=scale,
        q_count=b, d_count=m, part_documents=part_documents, depth=d,
        D=d, BLOCK_Q=tile.rows, BLOCK_M=tile.columns, BLOCK_K=tile.depth, PRECISION=dot_precision(queries.dtype),
        **tile.options,
    )  # fmt: skip
    launch(
        _loss_kernel, (1,),
        tops=tops, totals=totals, positives=positives, loss=loss, logsumexp=logsumexp, q_count=b, parts=parts,
        BLOCK=min(1024, max(32, triton.next_power_of_2(b))), num_warps=4,
    )  # fmt: skip
    return loss, logsumexp


def mnrl_loss_backward(
    grad_loss: Tensor, queries: Tensor, documents: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [B, D] and of documents [M, D].

    With probabilities p, unit rows q̂, d̂ and r_i = Σ_{j≠i} p_ij = 1 − p_ii, the gradient of q̂_i is in proportion to
    Σ_{j≠i} p_ij d̂_j − r_i d̂_i, that of d̂_j to Σ_{i≠j} p_ij q̂_i − r_j q̂_j. So the positive's term stays in float32, and
    is a sum, not a difference from 1.
    """
    q, d = Scaled(queries.contiguous()), Scaled(documents.contiguous())
    b, m = len(queries), len(documents)
    dtype = queries.dtype
    width = padded_width(dtype, queries.shape[1])
    columns = min(m, PANEL_COLUMNS)
    stride = triton.cdiv(columns, 16) * 16  # lines and panels begin at multiples of 16 bytes
    lines = min(b, PANEL_BYTES // (stride * dtype.itemsize) // 16 * 16)
    tile = product_tile(dtype, lines, columns, epilogue=True)
    parts, _ = _stripes(tile, lines, columns)
    weights = queries.new_empty(lines, stride)
    share = queries.new_zeros(parts, b, dtype=torch.float32)
    q_sums, d_sums = new_sums(queries, width, lines, columns, lines), new_sums(queries, width, columns, lines, m)
    grad_q, grad_d = torch.empty_like(q.rows), torch.empty_like(d.rows)
    gradient = functools.partial(project, grad_loss=grad_loss, coefficient=scale / b, undo=1 / WEIGHT_SCALE)
    for q_first in range(0, b, lines):
        q_range = slice(q_first, min(q_first + lines, b))
        panel_q, panel_share = q[q_range], share[:, q_range]
        for d_first in range(0, m, columns):
            d_range = slice(d_first, min(d_first + columns, m))
            panel_d = d[d_range]
            q_copy, d_copy = copy_rows(panel_q, panel_d)
            _, part_documents = _stripes(tile, len(q_copy), len(d_copy), parts)
            launch(
                _weights_kernel, (triton.cdiv(len(q_copy), tile.rows), parts),
                queries=q_copy, documents=d_copy, q_norm=panel_q.norm, d_norm=panel_d.norm,
                logsumexp=logsumexp[q_range], weights=weights, share=panel_share,
                scale=scale, weight_scale=WEIGHT_SCALE, q_first=q_first, d_first=d_first,
                q_count=len(q_copy), d_count=len(d_copy), part_documents=part_documents,
                share_rows=b, stride=stride, depth=width,
                D=width, BLOCK_Q=tile.rows, BLOCK_M=tile.columns, BLOCK_K=tile.depth, PRECISION=dot_precision(dtype),
                **tile.options,
            )  # fmt: skip
            panel = weights[: len(q_copy), : len(d_copy)]
            weighted_sum(panel, d_copy, q_sums[:, : len(q_copy)], accumulate=d_first > 0)
            weighted_sum(panel, q_copy, d_sums[:, d_range], transposed=True, accumulate=q_first > 0)
        gradient(q_sums, panel_q, grad_q[q_range], partner=d[q_range], share=panel_share)
    gradient(d_sums, d, grad_d, partner=q, share=share)
    return grad_q, grad_d


PROMISES = {
    "_negatives_kernel": ("tensor cores", "wide loads"),
    "_weights_kernel": ("tensor cores", "wide loads"),
    "_loss_kernel": (),  # reads a few numbers of each query
}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    for b, m in ((128, 384), (8192, 16384)):
        queries, documents = meta(b, d, dtype=dtype), meta(m, d, dtype=dtype)
        scalar, logsumexp = meta(dtype=torch.float32), meta(b, dtype=torch.float32)
        yield mnrl_loss_forward, (queries, documents, 20.0)
        yield mnrl_loss_backward, (scalar, queries, documents, logsumexp, 20.0)
