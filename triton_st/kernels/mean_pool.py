"""Mean pooling: one streaming pass over the tokens that count, one streaming write back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Call, launch, meta, splits

BLOCK_TOKENS = 32
BLOCK_COMBINE = 512
BLOCK_COUNT = 256
"""Mask entries counted at a time in backward: with 512, ptxas spills two registers on sm_80."""
BLOCK_COLUMNS = 128
"""Widest column block: a row's piece is 512 bytes of float32 or 256 of half, whole cache lines, 16 bytes a thread."""


@triton.jit
def _extent(extents, row, length, MASKED: tl.constexpr):
    """First row of hidden that belongs to sequence `row`, and how many belong to it (masked ones included)."""
    if MASKED:
        first = row.to(tl.int64) * length
    else:
        first = tl.load(extents + row).to(tl.int64)
        length = (tl.load(extents + row + 1).to(tl.int64) - first).to(tl.int32)
    return first, length


@triton.jit
def _chunk(part, parts, length, BLOCK_T: tl.constexpr):
    """Where part `part` of a sequence of `length` rows begins and ends, in whole blocks but for the sequence's end."""
    chunk = tl.cdiv(tl.cdiv(length, parts), BLOCK_T) * BLOCK_T
    return part * chunk, tl.minimum((part + 1) * chunk, length)


@triton.jit(do_not_specialize=["rows", "length", "parts"])
def _sum_kernel(
    hidden,  # [T, D]
    extents,  # MASKED: attention mask [rows, length]; else cu_seqlens [rows + 1]
    out,  # [rows, D], means; SPLIT: sums [parts, rows, D]
    counts,  # SPLIT: [parts, rows]
    rows,
    length,
    parts,
    D: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0) // COLUMN_BLOCKS
    part = tl.program_id(1)
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    first, length = _extent(extents, row, length, MASKED)
    begin, stop = _chunk(part, parts, length, BLOCK_T)
    token = tl.arange(0, BLOCK_T)
    hidden += (first + begin) * D  # the 64-bit part of the address: one number for the tile
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_T], tl.int32)
    for start in range(begin, stop, BLOCK_T):
        kept = token < stop - start
        if MASKED:
            kept = kept & (tl.load(extents + first + start + token, mask=kept, other=0) != 0)
        at = hidden + token[:, None] * D + column[None, :]
        total += tl.load(at, mask=kept[:, None] & (column < D)[None, :], other=0).to(tl.float32)
        count += kept.to(tl.int32)
        hidden += BLOCK_T * D
    total = tl.sum(total, 0)  # [BLOCK_D]
    count = tl.sum(count)
    if SPLIT:
        slot = part.to(tl.int64) * rows + row
        tl.store(out + slot * D + column, total, mask=column < D)
        tl.store(counts + slot, count)  # the same number from every column block
    else:
        mean = total / tl.maximum(count, 1).to(tl.float32)
        tl.store(out + row.to(tl.int64) * D + column, mean.to(out.dtype.element_ty), mask=column < D)


@triton.jit(do_not_specialize=["rows", "parts"])
def _combine_kernel(
    sums,  # [parts, rows, D]
    counts,  # [parts, rows]
    out,  # [rows, D]
    rows,
    parts,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cuts [rows, D] into runs of BLOCK numbers, whatever D is."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < tl.cast(rows, tl.int64) * D - first
    row = (first + place) // D
    sums += first
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for _ in range(0, parts):
        total += tl.load(sums + place, mask=inside, other=0)
        count += tl.load(counts + row, mask=inside, other=0)
        sums += tl.cast(rows, tl.int64) * D
        counts += rows
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + first + place, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "parts"])
def _spread_kernel(
    grad,  # [rows, D]
    extents,  # as in _sum_kernel
    grad_hidden,  # [T, D]
    length,
    parts,
    D: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    MASKED: tl.constexpr,
):
    row = tl.program_id(0) // COLUMN_BLOCKS
    part = tl.program_id(1)
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    first, length = _extent(extents, row, length, MASKED)
    begin, stop = _chunk(part, parts, length, BLOCK_T)
    count = length
    if MASKED:
        kept_tokens = tl.zeros([BLOCK_COUNT], tl.int32)
        for start in range(0, length, BLOCK_COUNT):
            mask_token = start + tl.arange(0, BLOCK_COUNT)
            mask = tl.load(extents + first + mask_token, mask=mask_token < length, other=0)
            kept_tokens += (mask != 0).to(tl.int32)
        count = tl.sum(kept_tokens)
    share = tl.load(grad + row.to(tl.int64) * D + column, mask=column < D, other=0).to(tl.float32)
    share = (share / tl.maximum(count, 1).to(tl.float32)).to(grad_hidden.dtype.element_ty)  # [BLOCK_D]
    token = tl.arange(0, BLOCK_T)
    grad_hidden += (first + begin) * D
    for start in range(begin, stop, BLOCK_T):
        inside = token < stop - start
        tile = tl.broadcast_to(share[None, :], [BLOCK_T, BLOCK_D])
        if MASKED:
            kept = tl.load(extents + first + start + token, mask=inside, other=0) != 0
            tile = tl.where(kept[:, None], tile, tl.zeros_like(tile))
        at = grad_hidden + token[:, None] * D + column[None, :]
        tl.store(at, tile, mask=inside[:, None] & (column < D)[None, :])
        grad_hidden += BLOCK_T * D


def _blocks(d: int) -> tuple[int, int]:
    """Columns of a block and how many blocks make a row."""
    block = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(d)))
    return block, triton.cdiv(d, block)


def _pool(hidden: Tensor, extents: Tensor, rows: int, length: int, mean_length: int, masked: bool) -> Tensor:
    hidden, extents = hidden.contiguous(), extents.contiguous()
    d = hidden.shape[-1]
    out = hidden.new_empty(rows, d)
    block, column_blocks = _blocks(d)
    programs = rows * column_blocks
    parts = splits(programs, triton.cdiv(mean_length, BLOCK_TOKENS))
    split = parts > 1
    sums = hidden.new_empty(parts, rows, d, dtype=torch.float32) if split else out
    counts = torch.empty(parts, rows, dtype=torch.int32, device=hidden.device) if split else extents
    launch(
        _sum_kernel, (programs, parts),
        hidden=hidden, extents=extents, out=sums, counts=counts, rows=rows, length=length, parts=parts,
        D=d, COLUMN_BLOCKS=column_blocks, BLOCK_T=BLOCK_TOKENS, BLOCK_D=block, MASKED=masked, SPLIT=split,
        num_warps=4,
    )  # fmt: skip
    if split:
        launch(
            _combine_kernel, (triton.cdiv(rows * d, BLOCK_COMBINE),),
            sums=sums, counts=counts, out=out, rows=rows, parts=parts, D=d, BLOCK=BLOCK_COMBINE, num_warps=2,
        )  # fmt: skip
    return out


def _pool_backward(
    grad: Tensor, extents: Tensor, grad_hidden: Tensor, length: int, mean_length: int, masked: bool
) -> Tensor:
    grad, extents = grad.contiguous(), extents.contiguous()
    rows, d = grad.shape
    block, column_blocks = _blocks(d)
    programs = rows * column_blocks
    parts = splits(programs, triton.cdiv(mean_length, BLOCK_TOKENS))
    launch(
        _spread_kernel, (programs, parts),
        grad=grad, extents=extents, grad_hidden=grad_hidden, length=length, parts=parts,
        D=d, COLUMN_BLOCKS=column_blocks, BLOCK_T=BLOCK_TOKENS, BLOCK_D=block, BLOCK_COUNT=BLOCK_COUNT, MASKED=masked,
        num_warps=4,
    )  # fmt: skip
    return grad_hidden


def _bytes(attention_mask: Tensor) -> Tensor:
    return attention_mask.view(torch.uint8) if attention_mask.dtype == torch.bool else attention_mask


def masked_mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """hidden [B, L, D], attention_mask [B, L] -> [B, D]."""
    rows, length = attention_mask.shape
    return _pool(hidden, _bytes(attention_mask), rows, length, length, masked=True)


def masked_mean_pool_backward(grad: Tensor, attention_mask: Tensor) -> Tensor:
    """grad [B, D], attention_mask [B, L] -> gradient of hidden [B, L, D]."""
    rows, length = attention_mask.shape
    grad_hidden = grad.new_empty(rows, length, grad.shape[1])
    return _pool_backward(grad, _bytes(attention_mask), grad_hidden, length, length, masked=True)


def packed_mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """hidden [T, D], cu_seqlens [B + 1] -> [B, D]."""
    rows = len(cu_seqlens) - 1
    return _pool(hidden, cu_seqlens, rows, 0, len(hidden) // max(rows, 1), masked=False)


def packed_mean_pool_backward(grad: Tensor, cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """grad [B, D], cu_seqlens [B + 1] -> gradient of hidden [T, D]."""
    grad_hidden = grad.new_empty(total_tokens, grad.shape[1])
    return _pool_backward(grad, cu_seqlens, grad_hidden, 0, total_tokens // max(len(grad), 1), masked=False)


PROMISES = {
    "_sum_kernel": ("wide loads",),
    "_combine_kernel": ("wide loads",),
    "_spread_kernel": ("wide stores",),
}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    for b, length in ((2, 512), (4096, 128)):
        hidden, grad = meta(b, length, d, dtype=dtype), meta(b, d, dtype=dtype)
        mask, cu_seqlens = meta(b, length, dtype=torch.int64), meta(b + 1, dtype=torch.int32)
        yield masked_mean_pool, (hidden, mask)
        yield masked_mean_pool_backward, (grad, mask)
        yield packed_mean_pool, (hidden.view(-1, d), cu_seqlens)
        yield packed_mean_pool_backward, (grad, cu_seqlens, b * length)
