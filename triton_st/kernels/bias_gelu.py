"""GELU (erf) of a product's result plus its bias; the pre-activation is all that backward needs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Call, launch, meta, splits
from triton_st.kernels.storing import saturate
from triton_st.kernels.sums import sum_parts

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit(do_not_specialize=["rows"])
def _gelu_kernel(
    x, bias, out,  # [T, N], [N], [T, N]
    rows,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + column[None, :]
    value = tl.load(x + at, mask=mask, other=0).to(tl.float32)
    value += tl.load(bias + column, mask=column < N, other=0)[None, :]
    value = value * (0.5 * (1.0 + tl.erf(value * _SQRT_HALF)))
    tl.store(out + at, saturate(value, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _gelu_grad_kernel(
    grad, x, bias, grad_x,  # [T, N], [T, N], [N], [T, N]
    parts,  # [parts, N]: the bias's gradient
    rows, part_rows,
    N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < N
    bias_row = tl.load(bias + column, mask=inside, other=0)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        value = tl.load(x + at, mask=mask, other=0).to(tl.float32) + bias_row
        slope = 0.5 * (1.0 + tl.erf(value * _SQRT_HALF)) + value * (_DENSITY * tl.exp(-0.5 * value * value))
        result = tl.load(grad + at, mask=mask, other=0).to(tl.float32) * slope
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=mask)
        total += result
    tl.store(parts + part.to(tl.int64) * N + column, tl.sum(total, 0), mask=inside)


def _block(n: int) -> tuple[int, int]:
    """Columns of a block and how many blocks make a row."""
    columns = min(BLOCK_COLUMNS, max(16, triton.next_power_of_2(n)))
    return columns, triton.cdiv(n, columns)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """x [T, N], bias [N] -> [T, N]."""
    x, bias = x.contiguous(), bias.contiguous()
    rows, n = x.shape
    out = torch.empty_like(x)
    columns, blocks = _block(n)
    launch(
        _gelu_kernel, (triton.cdiv(rows, BLOCK_ROWS), blocks),
        x=x, bias=bias, out=out, rows=rows, N=n, BLOCK_R=BLOCK_ROWS, BLOCK_C=columns, num_warps=4,
    )  # fmt: skip
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """grad [T, N] -> gradients of x [T, N] and bias [N]."""
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    rows, n = x.shape
    grad_x = torch.empty_like(x)
    columns, blocks = _block(n)
    steps = triton.cdiv(rows, BLOCK_ROWS)
    count = splits(blocks, steps)
    parts = bias.new_empty(count, n)
    launch(
        _gelu_grad_kernel, (count, blocks),
        grad=grad, x=x, bias=bias, grad_x=grad_x, parts=parts, rows=rows,
        part_rows=triton.cdiv(steps, count) * BLOCK_ROWS, N=n, BLOCK_R=BLOCK_ROWS, BLOCK_C=columns, num_warps=4,
    )  # fmt: skip
    return grad_x, sum_parts(parts)


PROMISES = {"_gelu_kernel": ("wide loads", "wide stores"), "_gelu_grad_kernel": ("wide loads", "wide stores")}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    x, bias = meta(9000, 4 * d, dtype=dtype), meta(4 * d, dtype=torch.float32)
    yield bias_gelu, (x, bias)
    yield bias_gelu_backward, (x, x, bias)
