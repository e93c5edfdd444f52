"""The last LayerNorm and mean pooling: normalised rows go into their sequence's sum and nowhere else.

LayerNorm's scale and offset are the same for every row, so they wait until the mean is formed. In backward every row
of a sequence has the same gradient, which is read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import TARGET_PROGRAMS, Call, launch, meta, splits
from triton_st.kernels.dropout_add_layer_norm import parameter_gradients
from triton_st.kernels.layer_norm import (
    RowTile,
    dropout,
    load_parameter,
    load_rows,
    normalise,
    normalised,
    residual_sum,
    store_rows,
    store_sum,
    through_layer_norm,
)
from triton_st.kernels.philox import dropout_arguments
from triton_st.kernels.rows import floor_log2, power_of_two
from triton_st.kernels.storing import saturate
from triton_st.reference import EPS

_EPS = tl.constexpr(EPS)


@triton.jit
def _stretch(cu_seqlens, unit, parts, BLOCK_R: tl.constexpr):
    """Sequence of this unit of work, and the first row and the end of its part of it."""
    sequence, part = unit // parts, unit % parts
    start = tl.load(cu_seqlens + sequence).to(tl.int32)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(end - start, parts), BLOCK_R) * BLOCK_R
    first = tl.minimum(start + part * chunk, end)
    return sequence, first, tl.minimum(first + chunk, end)


@triton.jit(do_not_specialize=["parts", "threshold", "stream"])
def _norm_pool_kernel(
    x, residual, x_bias, cu_seqlens,  # [T, D], [T, D], [D] or None, [B + 1]
    sums, mean_out, rstd_out,  # [B, parts, D]: sums of normalised rows; [T], [T]
    seed, threshold, factor, stream,
    parts, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    _, first, end = _stretch(cu_seqlens, program, parts, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        total = residual_sum(x, residual, x_bias, seed, threshold, factor, stream, row, mask, D, BLOCK_R, BLOCK_D)
        unit, mean, rstd = normalise(total, mask, eps, D)
        tl.store(mean_out + row, mean, mask=inside)
        tl.store(rstd_out + row, rstd, mask=inside)
        acc += unit
    store_sum(sums, program, acc, D, BLOCK_D)


@triton.jit
def _norm(rows, EPSILON: tl.constexpr):
    """Rows times a power of two, so that no square overflows; the power, the norm and the least norm [rows, 1]."""
    exponent = floor_log2(tl.max(tl.abs(rows), 1))
    power = power_of_two(tl.minimum(tl.maximum(-exponent - 1, -100), 120))[:, None]
    scaled = rows * power
    return scaled, power, tl.sqrt_rn(tl.sum(scaled * scaled, 1))[:, None], EPSILON * power


@triton.jit(do_not_specialize=["batch", "parts"])
def _pooled_kernel(
    sums, weight, bias, cu_seqlens,  # [B, parts, D], [D], [D], [B + 1]
    pooled, out,  # [B, D]
    batch, parts,
    NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < batch
    mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for part in range(0, parts):
        total += load_rows(sums, row * parts + part, mask, D, BLOCK_D)
    start = tl.load(cu_seqlens + row, mask=inside, other=0)
    length = (tl.load(cu_seqlens + row + 1, mask=inside, other=0) - start).to(tl.float32)[:, None]
    mean = total / tl.maximum(length, 1.0) * load_parameter(weight, D, BLOCK_D) + load_parameter(bias, D, BLOCK_D)
    mean = tl.where(length > 0, mean, 0.0)
    store_rows(pooled, row, mask, mean, D, BLOCK_D)
    if NORMALIZE:
        scaled, _, norm, least = _norm(mean, _EPS)
        mean = tl.where(norm == 0, 0.0, scaled / tl.maximum(norm, least, propagate_nan=tl.PropagateNan.ALL))
    store_rows(out, row, mask, saturate(mean, out.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=["batch", "parts", "threshold", "stream"])
def _norm_pool_grad_kernel(
    grad, x, residual, weight, pooled, mean, rstd, cu_seqlens, x_bias,
    grad_x, grad_residual,  # [T, D]
    sums,  # [programs, 2 or (with x_bias) 3, D]: gradients of weight, bias and x_bias
    seed, threshold, factor, stream,
    batch, parts,
    NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    inside_row = (tl.arange(0, BLOCK_D) < D)[None, :]
    weight_row = load_parameter(weight, D, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_x_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for work in range(program, batch * parts, tl.num_programs(0)):
        sequence, first, end = _stretch(cu_seqlens, work, parts, BLOCK_R)
        one = sequence + tl.arange(0, 1)
        share = load_rows(grad, one, inside_row, D, BLOCK_D)  # [1, BLOCK_D]
        if NORMALIZE:
            scaled, power, norm, least = _norm(load_rows(pooled, one, inside_row, D, BLOCK_D), _EPS)
            floored = tl.where(norm == 0, 1.0, tl.maximum(norm, least, propagate_nan=tl.PropagateNan.ALL))
            unit_row = scaled / floored
            radial = tl.where(norm < least, 0.0, tl.sum(share * unit_row, 1)[:, None])
            share = tl.where(norm == 0, 0.0, (share - unit_row * radial) / floored * power)
        length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
        share = share / tl.maximum(length, 1).to(tl.float32)
        for start in range(first, end, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            inside = row < end
            mask = inside[:, None] & inside_row
            total = residual_sum(x, residual, x_bias, seed, threshold, factor, stream, row, mask, D, BLOCK_R, BLOCK_D)
            row_rstd = tl.load(rstd + row, mask=inside, other=0)
            unit = normalised(total, tl.load(mean + row, mask=inside, other=0), row_rstd, mask)
            grad_row = tl.where(mask, share, 0.0)
            grad_weight += grad_row * unit
            grad_bias += grad_row
            grad_total = through_layer_norm(grad_row, unit, weight_row, row_rstd, D)
            store_rows(grad_residual, row, mask, grad_total, D, BLOCK_D)
            grad_total = dropout(grad_total, seed, threshold, factor, stream, row, D, BLOCK_R, BLOCK_D)
            store_rows(grad_x, row, mask, grad_total, D, BLOCK_D)
            if x_bias is not None:
                grad_x_bias += grad_total
    lines = 2 if x_bias is None else 3
    store_sum(sums, program * lines, grad_weight, D, BLOCK_D)
    store_sum(sums, program * lines + 1, grad_bias, D, BLOCK_D)
    if x_bias is not None:
        store_sum(sums, program * lines + 2, grad_x_bias, D, BLOCK_D)


def _parts(rows: int, batch: int, tile: RowTile) -> int:
    """Into how many parts each sequence is cut."""
    return splits(batch, triton.cdiv(rows // max(batch, 1), tile.rows))


def layer_norm_mean_pool_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [T, D] -> the result [B, D]; the means before normalisation [B, D]; mean and rstd [T]."""
    x, residual, weight, bias = x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    (rows, d), batch = x.shape, len(cu_seqlens) - 1
    mean, rstd = weight.new_empty(rows), weight.new_empty(rows)
    pooled, out = weight.new_empty(batch, d), residual.new_empty(batch, d)
    tile = RowTile.of(d)
    parts = _parts(rows, batch, tile)
    sums = weight.new_empty(batch, parts, d)
    launch(
        _norm_pool_kernel, (batch * parts,),
        x=x, residual=residual, x_bias=None if x_bias is None else x_bias.contiguous(), cu_seqlens=cu_seqlens,
        sums=sums, mean_out=mean, rstd_out=rstd, **dropout_arguments(dropout_p, seed, stream), parts=parts, eps=eps,
        **tile.constants(d),
    )  # fmt: skip
    launch(
        _pooled_kernel, (triton.cdiv(batch, tile.rows),),
        sums=sums, weight=weight, bias=bias, cu_seqlens=cu_seqlens, pooled=pooled, out=out, batch=batch, parts=parts,
        NORMALIZE=normalize, **tile.constants(d),
    )  # fmt: skip
    return out, pooled, mean, rstd


def layer_norm_mean_pool_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    pooled: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad [B, D] -> gradients of x and residual [T, D], weight, bias and x_bias [D] ([0] where there is none)."""
    grad, x, residual, weight = grad.contiguous(), x.contiguous(), residual.contiguous(), weight.contiguous()
    (rows, d), batch = x.shape, len(cu_seqlens) - 1
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(residual)
    tile = RowTile.of(d)
    parts = _parts(rows, batch, tile)
    programs = max(1, min(TARGET_PROGRAMS, batch * parts))
    sums = weight.new_empty(programs, 2 if x_bias is None else 3, d)
    launch(
        _norm_pool_grad_kernel, (programs,),
        grad=grad, x=x, residual=residual, weight=weight, pooled=pooled.contiguous(), mean=mean.contiguous(),
        rstd=rstd.contiguous(), cu_seqlens=cu_seqlens.contiguous(),
        x_bias=None if x_bias is None else x_bias.contiguous(), grad_x=grad_x, grad_residual=grad_residual, sums=sums,
        **dropout_arguments(dropout_p, seed, stream), batch=batch, parts=parts, NORMALIZE=normalize,
        **tile.gradient_constants(d),
    )  # fmt: skip
    return grad_x, grad_residual, *parameter_gradients(sums)


PROMISES = {
    "_norm_pool_kernel": ("wide loads",),
    "_pooled_kernel": ("wide loads", "wide stores"),
    "_norm_pool_grad_kernel": ("wide loads", "wide stores"),
}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    x, parameter, seed = meta(9000, d, dtype=dtype), meta(d, dtype=torch.float32), meta(dtype=torch.int64)
    row, pooled, cu_seqlens = (
        meta(9000, dtype=torch.float32),
        meta(384, d, dtype=torch.float32),
        meta(385, dtype=torch.int32),
    )
    grad = meta(384, d, dtype=dtype)
    tail = (parameter, seed, 0.1, 8, True)
    yield layer_norm_mean_pool_forward, (x, x, parameter, parameter, cu_seqlens, parameter, seed, 1e-12, 0.1, 8, True)
    yield layer_norm_mean_pool_backward, (grad, x, x, parameter, pooled, row, row, cu_seqlens, *tail)
