"""The corpus rows nearest to each query: similarities a panel at a time, and the best of each stripe of a panel.

A score and its row make one int64 key: the score's bits, so turned that integers compare as the scores do, over the
complement of the row. The greater key is the better, and no two are equal, so what is found does not depend on stripes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st import reference
from triton_st.kernels.common import EXAMPLE_WIDTH, Call, example_sizes, launch, meta, splits
from triton_st.kernels.cosine_similarity import write_similarities

MOST_QUERIES = 1024
"""Queries that share a panel."""
PANEL_SCORES = 8 << 20
"""Scores in a panel: 32 MiB, which stay in the L2 cache of a large GPU until they have been read."""
MOST_KEPT = 1024
"""Above this k a program's list no longer fits its registers."""
NUMBERS_PER_THREAD = 4
"""Of scores, 16 bytes."""

_LEAST_KEY = tl.constexpr(-(2**63))  # below that of every score
_LEAST_BITS = tl.constexpr(-(2**31))
_LOW_BITS = tl.constexpr(2**32 - 1)
_MAGNITUDE = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(score, row, inside):
    """Keys of float32 scores, NaN the highest, 0 and -0 one; those not `inside` are below all others."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & _MAGNITUDE)
    bits = tl.where(score == score, bits, _MAGNITUDE)
    bits = tl.where(inside, bits, _LEAST_BITS)
    return (bits.to(tl.int64) << 32) | (row ^ _LOW_BITS)


@triton.jit
def _better_half(falling, rising):
    """Of two sorted lists of one length, falling. Of pairs from opposite ends the better ones are a bitonic list."""
    return tl.bitonic_merge(tl.maximum(falling, rising), descending=True)


@triton.jit(do_not_specialize=["first", "stripe", "k"])
def _select_kernel(
    scores,  # [queries, columns], lines `line` apart: of the corpus rows from `first` on
    best,  # [queries, stripes, KEPT]: keys, falling; those of `scores` that are better take others' places
    first, columns, line, stripe, k,
    KEPT: tl.constexpr,
):  # fmt: skip
    query, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.arange(0, KEPT)
    best += (query * tl.num_programs(1) + part) * KEPT + slot
    scores += query * line
    begin = part * stripe
    end = tl.minimum(begin + stripe, columns)
    kept = tl.load(best)
    least = tl.max(tl.where(slot == k - 1, kept, _LEAST_KEY))
    for start in range(begin, end, KEPT):
        column = start + slot
        score = tl.load(scores + column, mask=column < columns, other=0)
        keys = _keys(score, first + column.to(tl.int64), column < end)
        if tl.max(keys) > least:
            kept = _better_half(kept, tl.sort(keys))
            least = tl.max(tl.where(slot == k - 1, kept, _LEAST_KEY))
    tl.store(best, kept)


@triton.jit(do_not_specialize=["stripes", "k"])
def _merge_kernel(
    best,  # [queries, stripes, KEPT]: keys, falling
    scores, rows,  # [queries, k]
    stripes, k,
    KEPT: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KEPT)
    best += query * stripes * KEPT
    kept = tl.load(best + slot)
    for _ in range(1, stripes):
        best += KEPT
        kept = _better_half(kept, tl.load(best + (KEPT - 1) - slot))
    bits = (kept >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & _MAGNITUDE)
    tl.store(scores + query * k + slot, bits.to(tl.float32, bitcast=True), mask=slot < k)
    tl.store(rows + query * k + slot, (kept & _LOW_BITS) ^ _LOW_BITS, mask=slot < k)


def _search(queries: Tensor, corpus: Tensor, scores: Tensor, rows: Tensor) -> None:
    """Fills scores and rows [B, k] for queries [B, D] that share a panel."""
    count, k = scores.shape
    kept = max(32 * NUMBERS_PER_THREAD, triton.next_power_of_2(k))
    warps = kept // (32 * NUMBERS_PER_THREAD)
    panel = min(len(corpus), PANEL_SCORES // count)
    stripes = splits(count, triton.cdiv(panel, 4 * kept))
    stripe = triton.cdiv(panel, stripes * kept) * kept
    line = triton.cdiv(panel, 16) * 16  # known to be a multiple: wide accesses
    similarities = queries.new_empty(count, line, dtype=torch.float32)
    best = torch.full((count, stripes, kept), _LEAST_KEY.value, dtype=torch.int64, device=queries.device)
    for first in range(0, len(corpus), panel):
        part = corpus[first : first + panel].contiguous()
        write_similarities(queries, part, similarities)
        launch(
            _select_kernel, (count, stripes),
            scores=similarities, best=best, first=first, columns=len(part), line=line, stripe=stripe, k=k,
            KEPT=kept, num_warps=warps,
        )  # fmt: skip
    launch(
        _merge_kernel, (count,),
        best=best, scores=scores, rows=rows, stripes=stripes, k=k, KEPT=kept, num_warps=warps,
    )  # fmt: skip


def cosine_topk(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """queries [B, D], corpus [N, D] -> scores and rows [B, min(k, N)]."""
    count, k = len(queries), min(k, len(corpus))
    if k > MOST_KEPT:
        return reference.cosine_topk(queries, corpus, k)
    scores = queries.new_empty(count, k, dtype=torch.float32)
    rows = queries.new_empty(count, k, dtype=torch.int64)
    for begin in range(0, count if k > 0 else 0, MOST_QUERIES):
        some = slice(begin, begin + MOST_QUERIES)
        _search(queries[some].contiguous(), corpus, scores[some], rows[some])
    return scores, rows


PROMISES = {"_select_kernel": ("wide loads",), "_merge_kernel": ("wide loads",)}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    for count, rows in example_sizes(d):
        for k in (10, MOST_KEPT) if d == EXAMPLE_WIDTH else (10,):
            yield cosine_topk, (meta(count, d, dtype=dtype), meta(rows, d, dtype=dtype), k)
