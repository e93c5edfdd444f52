"""Cosine similarity of all pairs: row norms first, then a product whose last step divides by them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import (
    EXAMPLE_WIDTH,
    Call,
    dot_precision,
    example_sizes,
    launch,
    meta,
    padded_width,
    product_tile,
)
from triton_st.kernels.products import dot_rows, new_sums, weighted_sum
from triton_st.kernels.rows import COPY_EXPONENT, Scaled, Statistics, copy_rows, inverse, project

GROUP = 8
"""Row blocks that march together along b, so that b's blocks are still in the L2 cache for the next."""


@triton.jit(do_not_specialize=["a_count", "depth"])
def _similarity_kernel(
    a, b, out,  # [M, D], [N, D], [M, N]
    a_power, a_norm, b_power, b_norm, extreme,
    a_count, b_count, stride, depth,
    D: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    b_blocks = tl.cdiv(b_count, BLOCK_B)
    group = tl.program_id(0) // (GROUP * b_blocks)
    within = tl.program_id(0) % (GROUP * b_blocks)
    group_size = tl.minimum(tl.cdiv(a_count, BLOCK_A) - group * GROUP, GROUP)
    a_first = (group * GROUP + within % group_size) * BLOCK_A
    b_first = within // group_size * BLOCK_B
    a += a_first.to(tl.int64) * D
    b += b_first.to(tl.int64) * D
    a_left, b_left = a_count - a_first, b_count - b_first
    a_power += a_first
    b_power += b_first
    # No product of halves leaves float32's range.
    if a.dtype.element_ty == tl.float16 or tl.load(extreme) == 0:
        acc = dot_rows(a, b, a_left, b_left, a_power, b_power, depth, D, BLOCK_A, BLOCK_B, BLOCK_K, PRECISION, False)
    else:
        acc = dot_rows(a, b, a_left, b_left, a_power, b_power, depth, D, BLOCK_A, BLOCK_B, BLOCK_K, PRECISION, True)
    acc = acc * inverse(a_norm + a_first, BLOCK_A, a_left)[:, None]
    acc = acc * inverse(b_norm + b_first, BLOCK_B, b_left)[None, :]
    a_row, b_row = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B)
    at = out + a_first.to(tl.int64) * stride + b_first + a_row.to(tl.int64)[:, None] * stride + b_row[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(a_row < a_left)[:, None] & (b_row < b_left)[None, :])


def write_similarities(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Into out [≥ M, ≥ N], of any floating dtype: the cosines of a [M, D] and b [N, D], both contiguous."""
    (m, d), n = a.shape, len(b)
    rows = Statistics(a, b)
    tile = product_tile(a.dtype, m, n, aligned=d == padded_width(a.dtype, d))
    launch(
        _similarity_kernel, (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        a=a, b=b, out=out, a_power=rows.a_power, a_norm=rows.a_norm, b_power=rows.b_power,
        b_norm=rows.b_norm, extreme=rows.extreme, a_count=m, b_count=n, stride=out.stride(0), depth=d,
        D=d, BLOCK_A=tile.rows, BLOCK_B=tile.columns, BLOCK_K=tile.depth, PRECISION=dot_precision(a.dtype), GROUP=GROUP,
        **tile.options,
    )  # fmt: skip


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """a [M, D], b [N, D] -> [M, N]."""
    a, b = a.contiguous(), b.contiguous()
    out = a.new_empty(len(a), len(b))
    if out.numel() > 0:
        write_similarities(a, b, out)
    return out


def cosine_similarity_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """grad [M, N] -> gradients of a [M, D] and of b [N, D].

    With unit rows û: gradient of û_a = grad @ û_b, of a = (that − û_a (û_a · that)) / ‖a‖; b likewise.
    """
    grad, scaled_a, scaled_b = grad.contiguous(), Scaled(a.contiguous()), Scaled(b.contiguous())
    m, n = grad.shape
    a_copy, b_copy = copy_rows(scaled_a, scaled_b)
    width = a_copy.shape[1]
    a_sums, b_sums = new_sums(a, (0, width), m, n, m), new_sums(b, (0, width), n, m, n)
    weight = 2.0**COPY_EXPONENT  # over the norm: between 1/2 and 1, which no half in grad overflows or vanishes by
    weighted_sum(grad, b_copy, a_sums, norm=scaled_b.norm, weight=weight)
    weighted_sum(grad, a_copy, b_sums, norm=scaled_a.norm, weight=weight, transposed=True)
    grad_a, grad_b = torch.empty_like(scaled_a.rows), torch.empty_like(scaled_b.rows)
    project(a_sums, scaled_a, grad_a, undo=1 / weight)
    project(b_sums, scaled_b, grad_b, undo=1 / weight)
    return grad_a, grad_b


PROMISES = {"_similarity_kernel": ("tensor cores", "wide loads")}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles."""
    for m, n in example_sizes(d):
        a, b = meta(m, d, dtype=dtype), meta(n, d, dtype=dtype)
        yield cosine_similarity, (a, b)
        if d == EXAMPLE_WIDTH:  # at others the loss has the same sums
            yield cosine_similarity_backward, (meta(m, n, dtype=dtype), a, b)
