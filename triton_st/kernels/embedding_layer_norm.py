"""Rows of three tables gathered, summed, normalised and dropped out in one pass.

A token's place in its sequence is found by bisection of cu_seqlens, which stays in the cache. Backward writes the sums'
gradient once, in float32; each table then adds up the rows that are its own, in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Call, launch, meta
from triton_st.kernels.layer_norm import (
    RowTile,
    dropout,
    load_parameter,
    load_rows,
    normalise,
    normalised,
    store_rows,
    store_sum,
    through_layer_norm,
)
from triton_st.kernels.philox import dropout_arguments
from triton_st.kernels.segments import segment_sums
from triton_st.kernels.storing import saturate
from triton_st.kernels.sums import sum_parts

BLOCK_SEQUENCES = 32
BLOCK_COLUMNS = 128


@triton.jit
def _gather(table, index, count, inside, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a table [count, D]; NaN where there is no such row, for no check looks at values on a GPU."""
    exists = (index >= 0) & (index < count)
    at = table + tl.where(exists, index, 0).to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    value = tl.load(at, mask=mask & exists[:, None], other=0)
    return tl.where((exists | (inside == 0))[:, None], value, float("nan"))


@triton.jit
def _embedding_sum(
    word, position, token_type, input_ids, token_type_ids, cu_seqlens,
    row, inside, mask, words, positions, types, batch, steps, position_offset,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """word + position + token type of tokens `row`, 0 where masked. [BLOCK_R, BLOCK_D]."""
    low = tl.zeros([BLOCK_R], tl.int32)
    high = tl.zeros([BLOCK_R], tl.int32) + batch
    for _ in range(0, steps):
        middle = (low + high) // 2
        not_after = tl.load(cu_seqlens + middle, mask=inside, other=0) <= row
        low = tl.where(not_after, middle, low)
        high = tl.where(not_after, high, middle)
    place = row - tl.load(cu_seqlens + low, mask=inside, other=0).to(tl.int32) + position_offset
    token = tl.load(input_ids + row, mask=inside, other=0)
    total = _gather(word, token, words, inside, mask, D, BLOCK_D)
    total += _gather(position, place, positions, inside, mask, D, BLOCK_D)
    if token_type is not None:
        kind = tl.zeros([BLOCK_R], tl.int64)
        if token_type_ids is not None:
            kind += tl.load(token_type_ids + row, mask=inside, other=0)
        total += _gather(token_type, kind, types, inside, mask, D, BLOCK_D)
    return total


_UNSPECIALISED = [
    "rows", "words", "positions", "types", "batch", "steps", "position_offset", "threshold", "stream"
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _embedding_kernel(
    word, position, token_type,  # [V, D], [P, D], [N, D] or None
    weight, bias, input_ids, token_type_ids, cu_seqlens,  # [D], [D], [T], [T] or None, [B + 1]
    out, mean_out, rstd_out,  # [T, D], [T], [T]
    seed, threshold, factor, stream,
    rows, words, positions, types, batch, steps, position_offset, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    total = _embedding_sum(
        word, position, token_type, input_ids, token_type_ids, cu_seqlens,
        row, inside, mask, words, positions, types, batch, steps, position_offset, D, BLOCK_R, BLOCK_D,
    )  # fmt: skip
    unit, mean, rstd = normalise(total, mask, eps, D)
    result = unit * load_parameter(weight, D, BLOCK_D) + load_parameter(bias, D, BLOCK_D)
    result = dropout(result, seed, threshold, factor, stream, row, D, BLOCK_R, BLOCK_D)
    store_rows(out, row, mask, saturate(result, out.dtype.element_ty), D, BLOCK_D)
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(rstd_out + row, rstd, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _embedding_grad_kernel(
    grad, word, position, token_type, weight, mean, rstd, input_ids, token_type_ids, cu_seqlens,
    grad_sum,  # [T, D]: gradient of each token's sum of table rows
    parts,  # [programs, 3, D]: gradients of weight and bias, and the sum of grad_sum
    seed, threshold, factor, stream,
    rows, words, positions, types, batch, steps, position_offset,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    weight_row = load_parameter(weight, D, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_all = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < rows
        mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        total = _embedding_sum(
            word, position, token_type, input_ids, token_type_ids, cu_seqlens,
            row, inside, mask, words, positions, types, batch, steps, position_offset, D, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        row_rstd = tl.load(rstd + row, mask=inside, other=0)
        unit = normalised(total, tl.load(mean + row, mask=inside, other=0), row_rstd, mask)
        grad_row = load_rows(grad, row, mask, D, BLOCK_D)
        grad_row = dropout(grad_row, seed, threshold, factor, stream, row, D, BLOCK_R, BLOCK_D)
        grad_weight += grad_row * unit
        grad_bias += grad_row
        grad_total = through_layer_norm(grad_row, unit, weight_row, row_rstd, D)
        store_rows(grad_sum, row, mask, grad_total, D, BLOCK_D)
        grad_all += grad_total
    store_sum(parts, program * 3, grad_weight, D, BLOCK_D)
    store_sum(parts, program * 3 + 1, grad_bias, D, BLOCK_D)
    store_sum(parts, program * 3 + 2, grad_all, D, BLOCK_D)


@triton.jit(do_not_specialize=["batch", "position_offset"])
def _position_grad_kernel(
    grad_sum, cu_seqlens, out,  # [T, D], [B + 1], [P, D]
    batch, position_offset,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program owns a position and adds it up over the sequences that reach it."""
    position = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.zeros([BLOCK_B], tl.int32) + (position - position_offset)
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for first in range(0, batch, BLOCK_B):
        sequence = first + tl.arange(0, BLOCK_B)
        start = tl.load(cu_seqlens + sequence, mask=sequence < batch, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=0).to(tl.int64)
        reaches = (place >= 0) & (place < end - start)
        at = grad_sum + (start + place)[:, None] * D + column[None, :]
        total += tl.load(at, mask=reaches[:, None] & (column < D)[None, :], other=0)
    tl.store(out + position.to(tl.int64) * D + column, tl.sum(total, 0), mask=column < D)


def embedding_layer_norm_forward(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    eps: float,
    dropout_p: float,
    stream: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids [T] -> the result [T, D] in `dtype`, and each row's mean and inverse deviation [T]."""
    rows, d = len(input_ids), word.shape[1]
    out, mean, rstd = word.new_empty(rows, d, dtype=dtype), word.new_empty(rows), word.new_empty(rows)
    tile = RowTile.of(d)
    launch(
        _embedding_kernel, (triton.cdiv(rows, tile.rows),),
        **_sources(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset),
        weight=weight.contiguous(), bias=bias.contiguous(), out=out, mean_out=mean, rstd_out=rstd,
        **dropout_arguments(dropout_p, seed, stream), eps=eps, **tile.constants(d),
    )  # fmt: skip
    return out, mean, rstd


def _sources(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    position_offset: int,
) -> dict[str, object]:
    batch = len(cu_seqlens) - 1
    return {
        "word": word.contiguous(), "position": position.contiguous(),
        "token_type": None if token_type is None else token_type.contiguous(),
        "input_ids": input_ids.contiguous(), "cu_seqlens": cu_seqlens.contiguous(),
        "token_type_ids": None if token_type is None or token_type_ids is None else token_type_ids.contiguous(),
        "rows": len(input_ids), "words": len(word), "positions": len(position),
        "types": 0 if token_type is None else len(token_type),
        "batch": batch, "steps": batch.bit_length(), "position_offset": position_offset,
    }  # fmt: skip


def embedding_layer_norm_backward(
    grad: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad [T, D] -> gradients of word [V, D], position [P, D], token_type [N, D] ([0, D] where there is none), weight
    and bias [D]."""
    rows, d = grad.shape
    cu_seqlens = cu_seqlens.contiguous()
    tile = RowTile.of(d)
    programs = tile.programs(rows)
    grad_sum, parts = weight.new_empty(rows, d), weight.new_empty(programs, 3, d)
    launch(
        _embedding_grad_kernel, (programs,),
        grad=grad.contiguous(), weight=weight.contiguous(), mean=mean.contiguous(), rstd=rstd.contiguous(),
        **_sources(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset),
        grad_sum=grad_sum, parts=parts, **dropout_arguments(dropout_p, seed, stream), **tile.gradient_constants(d),
    )  # fmt: skip
    grad_weight, grad_bias, grad_all = (line.clone() for line in sum_parts(parts))
    grad_position = torch.empty_like(position, memory_format=torch.contiguous_format)
    columns = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(d)))
    launch(
        _position_grad_kernel, (len(position), triton.cdiv(d, columns)),
        grad_sum=grad_sum, cu_seqlens=cu_seqlens, out=grad_position, batch=len(cu_seqlens) - 1,
        position_offset=position_offset, D=d, BLOCK_B=BLOCK_SEQUENCES, BLOCK_D=columns, num_warps=4,
    )  # fmt: skip
    if token_type is None:
        grad_type = weight.new_empty(0, d)
    elif token_type_ids is None:
        grad_type = weight.new_zeros(len(token_type), d)
        grad_type[:1] = grad_all
    else:
        grad_type = segment_sums(grad_sum, token_type_ids, len(token_type))
    return segment_sums(grad_sum, input_ids, len(word)), grad_position, grad_type, grad_weight, grad_bias


PROMISES = {
    "_embedding_kernel": ("wide loads", "wide stores"),
    "_embedding_grad_kernel": ("wide loads", "wide stores"),
    "_position_grad_kernel": ("wide loads",),
}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    word, position, types = (meta(n, d, dtype=torch.float32) for n in (30522, 512, 2))
    parameter, row, ids = meta(d, dtype=torch.float32), meta(9000, dtype=torch.float32), meta(9000, dtype=torch.int64)
    seed, cu_seqlens = meta(dtype=torch.int64), meta(385, dtype=torch.int32)
    tables = (word, position, types, parameter)
    places = (ids, cu_seqlens, None, seed, 0)
    yield embedding_layer_norm_forward, (*tables, parameter, *places, 1e-12, 0.1, 8, dtype)
    yield embedding_layer_norm_backward, (meta(9000, d, dtype=dtype), *tables, row, row, *places, 0.1, 8)
