"""Sums of rows that share a key, without atomics: the keys are sorted, and each run of equal ones is added in order.

Sorted rows are cut into chunks. A run's sum over one chunk goes to its place in the result if the run begins there,
else it is a carry; one program, that of the chunk where the run begins, then adds the carries. So a key that fills half
the batch costs no more than many keys that occur once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import launch

BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
_NO_KEY = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["count", "results"])
def _runs_kernel(
    keys, order, rows,  # [T] ascending, [T]: whose keys they are, [T, D]
    out, carries,  # [results, D], [chunks, D]
    count, results,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = place < count
    key = tl.load(keys + place, mask=inside, other=_NO_KEY)
    previous = tl.load(keys + place - 1, mask=inside & (place > 0), other=_NO_KEY)
    row = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    at = rows + row[:, None] * D + column[None, :]
    value = tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0)
    same = (key[:, None] == key[None, :]).to(tl.float32)
    total = tl.dot(same, value, input_precision="ieee")
    begins = (key != previous) & (key >= 0) & (key < results)
    tl.store(out + key.to(tl.int64)[:, None] * D + column[None, :], total, mask=begins[:, None] & (column < D)[None, :])
    carried = inside & (tl.arange(0, BLOCK_R) == 0) & (key == previous)
    at = carries + chunk.to(tl.int64) * D + tl.zeros([BLOCK_R], tl.int64)[:, None] + column[None, :]
    tl.store(at, total, mask=carried[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["count", "results"])
def _carries_kernel(
    keys, carries, out,  # [T] ascending, [chunks, D], [results, D]
    count, results,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, next_first = chunk * BLOCK_R, (chunk + 1) * BLOCK_R
    key = tl.load(keys + tl.minimum(next_first, count) - 1)
    begins_before = (first > 0) & (tl.load(keys + tl.maximum(first - 1, 0)) == key)
    goes_on = (next_first < count) & (tl.load(keys + tl.minimum(next_first, count - 1)) == key)
    if goes_on & (begins_before == 0) & (key >= 0) & (key < results):
        ahead = tl.arange(0, BLOCK_R)
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        following = chunk + 1
        while goes_on:
            place = (following + ahead) * BLOCK_R
            same = tl.load(keys + place, mask=place < count, other=_NO_KEY) == key
            at = carries + (following + ahead).to(tl.int64)[:, None] * D + column[None, :]
            total += tl.load(at, mask=same[:, None] & (column < D)[None, :], other=0)
            goes_on = tl.sum(same.to(tl.int32)) == BLOCK_R
            following += BLOCK_R
        at = out + key.to(tl.int64) * D + column
        tl.store(at, tl.load(at, mask=column < D, other=0) + tl.sum(total, 0), mask=column < D)


def segment_sums(rows: Tensor, keys: Tensor, results: int) -> Tensor:
    """rows [T, D] float32, keys [T] -> [results, D]: line k is the sum of the rows with key k, for k < results."""
    count, d = rows.shape
    out = rows.new_zeros(results, d)
    chunks = triton.cdiv(count, BLOCK_ROWS)
    sorted_keys, order = torch.sort(keys, stable=True)
    carries = rows.new_empty(chunks, d)
    columns = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(d)))
    shared = {
        "keys": sorted_keys, "carries": carries, "out": out, "count": count, "results": results,
        "D": d, "BLOCK_R": BLOCK_ROWS, "BLOCK_D": columns, "num_warps": 4,
    }  # fmt: skip
    grid = (chunks, triton.cdiv(d, columns))
    launch(_runs_kernel, grid, order=order, rows=rows, **shared)
    launch(_carries_kernel, grid, **shared)
    return out


PROMISES = {"_runs_kernel": ("wide loads",), "_carries_kernel": ("wide loads",)}
