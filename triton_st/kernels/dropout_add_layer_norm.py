"""Bias, dropout, residual sum and LayerNorm: every number is read once and written once, in both directions.

Backward computes the sum and the dropout bits again. A fixed number of programs walk over the rows; each keeps the
parameters' gradients of its rows in registers and leaves one part of them, which are added up in order.
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
    residual_sum,
    store_rows,
    store_sum,
    through_layer_norm,
)
from triton_st.kernels.philox import dropout_arguments
from triton_st.kernels.storing import saturate
from triton_st.kernels.sums import sum_parts


@triton.jit(do_not_specialize=["rows", "threshold", "stream"])
def _add_norm_kernel(
    x, residual, weight, bias, x_bias,  # [T, D], [T, D], [D], [D], [D] or None
    out, mean_out, rstd_out,  # [T, D], [T], [T]
    seed, threshold, factor, stream,
    rows, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    total = residual_sum(x, residual, x_bias, seed, threshold, factor, stream, row, mask, D, BLOCK_R, BLOCK_D)
    unit, mean, rstd = normalise(total, mask, eps, D)
    result = unit * load_parameter(weight, D, BLOCK_D) + load_parameter(bias, D, BLOCK_D)
    store_rows(out, row, mask, saturate(result, out.dtype.element_ty), D, BLOCK_D)
    tl.store(mean_out + row, mean, mask=inside)
    tl.store(rstd_out + row, rstd, mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "stream"])
def _add_norm_grad_kernel(
    grad, x, residual, weight, mean, rstd, x_bias,
    grad_x, grad_residual,  # [T, D]
    parts,  # [programs, 2 or (with x_bias) 3, D]: gradients of weight, bias and x_bias
    seed, threshold, factor, stream,
    rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    weight_row = load_parameter(weight, D, BLOCK_D)
    grad_weight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    grad_x_bias = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < rows
        mask = inside[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        total = residual_sum(x, residual, x_bias, seed, threshold, factor, stream, row, mask, D, BLOCK_R, BLOCK_D)
        row_rstd = tl.load(rstd + row, mask=inside, other=0)
        unit = normalised(total, tl.load(mean + row, mask=inside, other=0), row_rstd, mask)
        grad_row = load_rows(grad, row, mask, D, BLOCK_D)
        grad_weight += grad_row * unit
        grad_bias += grad_row
        grad_total = through_layer_norm(grad_row, unit, weight_row, row_rstd, D)
        store_rows(grad_residual, row, mask, grad_total, D, BLOCK_D)
        grad_total = dropout(grad_total, seed, threshold, factor, stream, row, D, BLOCK_R, BLOCK_D)
        store_rows(grad_x, row, mask, grad_total, D, BLOCK_D)
        if x_bias is not None:
            grad_x_bias += grad_total
    lines = 2 if x_bias is None else 3
    store_sum(parts, program * lines, grad_weight, D, BLOCK_D)
    store_sum(parts, program * lines + 1, grad_bias, D, BLOCK_D)
    if x_bias is not None:
        store_sum(parts, program * lines + 2, grad_x_bias, D, BLOCK_D)


def dropout_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [T, D] -> the result [T, D] in residual's dtype, each row's mean and inverse deviation [T]."""
    x, residual, weight, bias = x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous()
    rows, d = x.shape
    out, mean, rstd = torch.empty_like(residual), weight.new_empty(rows), weight.new_empty(rows)
    tile = RowTile.of(d)
    launch(
        _add_norm_kernel, (triton.cdiv(rows, tile.rows),),
        x=x, residual=residual, weight=weight, bias=bias, x_bias=None if x_bias is None else x_bias.contiguous(),
        out=out, mean_out=mean, rstd_out=rstd, **dropout_arguments(dropout_p, seed, stream), rows=rows, eps=eps,
        **tile.constants(d),
    )  # fmt: skip
    return out, mean, rstd


def dropout_add_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad [T, D] -> gradients of x and residual [T, D], weight, bias and x_bias [D] ([0] where there is none)."""
    grad, x, residual, weight = grad.contiguous(), x.contiguous(), residual.contiguous(), weight.contiguous()
    rows, d = x.shape
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(residual)
    tile = RowTile.of(d)
    programs = tile.programs(rows)
    parts = weight.new_empty(programs, 2 if x_bias is None else 3, d)
    launch(
        _add_norm_grad_kernel, (programs,),
        grad=grad, x=x, residual=residual, weight=weight, mean=mean.contiguous(), rstd=rstd.contiguous(),
        x_bias=None if x_bias is None else x_bias.contiguous(), grad_x=grad_x, grad_residual=grad_residual, parts=parts,
        **dropout_arguments(dropout_p, seed, stream), rows=rows, **tile.gradient_constants(d),
    )  # fmt: skip
    return grad_x, grad_residual, *parameter_gradients(parts)


def parameter_gradients(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """parts [P, 2 or 3, D] -> gradients of weight, bias and x_bias; the last is empty where it has no part."""
    sums = sum_parts(parts)
    # clones of a few hundred numbers: an operator's results may not share memory
    grad_x_bias = sums[2].clone() if len(sums) == 3 else sums.new_empty(0)
    return sums[0].clone(), sums[1].clone(), grad_x_bias


PROMISES = {"_add_norm_kernel": ("wide loads", "wide stores"), "_add_norm_grad_kernel": ("wide loads", "wide stores")}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    x, parameter, seed = meta(9000, d, dtype=dtype), meta(d, dtype=torch.float32), meta(dtype=torch.int64)
    row = meta(9000, dtype=torch.float32)
    yield dropout_add_layer_norm_forward, (x, x, parameter, parameter, parameter, seed, 1e-12, 0.1, 8)
    yield dropout_add_layer_norm_backward, (x, x, x, parameter, row, row, parameter, seed, 0.1, 8)
