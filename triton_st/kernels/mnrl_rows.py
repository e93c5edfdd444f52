"""The contrastive loss row by row, with all its options and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_st.kernels.common import EXAMPLE_WIDTH, Call, example_sizes, meta
from triton_st.kernels.mnrl_prefixes import PrefixSweeps
from triton_st.kernels.mnrl_sweeps import Sweeps
from triton_st.reference.mnrl_rows import (
    ALL_NEGATIVES,
    DOC_TO_DOC,
    DOC_TO_QUERY,
    IN_BATCH_NEGATIVES,
    QUERY_TO_DOC,
    QUERY_TO_QUERY,
)


def mnrl_rows(
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    targets: Tensor | None,
    offset: int,
    scale: Tensor,
    row_weights: Tensor | None,
    normalized: bool,
    directions: int,
    joint: bool,
    hardness_mode: int,
    hardness_strength: float,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    owner_ids: Tensor | None,
    margin: float | None,
    relative_margin: bool,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    gradients: bool,
    diagnostics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradients and diagnostics as `triton_st.reference.mnrl_rows` has them."""
    sets = queries.contiguous(), documents.contiguous(), None if all_queries is None else all_queries.contiguous()
    b, d = queries.shape
    new = functools.partial(queries.new_empty, dtype=torch.float32)
    losses, facts = new(b), new(4, b) if diagnostics else new(0)
    dims, dim_weights = list(dims) or [d], list(dim_weights) or [1.0]
    grads = [new(0) if x is None or not gradients else new(x.shape) for x in sets]
    if gradients and (dims[-1] < d or (all_queries is not None and directions & ~DOC_TO_DOC == QUERY_TO_DOC)):
        grads = [grad.zero_() for grad in grads]  # what nothing is written to
    ids = None
    if query_ids is not None and document_ids is not None and owner_ids is not None:
        target_ids = document_ids[offset : offset + b] if targets is None else document_ids[targets]
        ids = query_ids.contiguous(), target_ids.contiguous(), document_ids.contiguous(), owner_ids.contiguous()
    sweeps = (Sweeps if len(dims) == 1 else PrefixSweeps)(
        *sets, targets, offset, scale, row_weights, normalized, directions, joint, hardness_mode, hardness_strength,
        ids, margin, relative_margin, dims, dim_weights,
    )  # fmt: skip
    sweeps.sum_up(losses, facts if diagnostics else None)
    grad_scale = new(0)
    if gradients:
        grad_q, grad_d, grad_w = (grad[:, : dims[-1]] if grad.dim() == 2 else None for grad in grads)
        assert grad_q is not None
        assert grad_d is not None
        grad_scale = sweeps.differentiate(grad_q, grad_d, grad_w)
    return losses, grads[0], grads[1], grads[2], grad_scale, facts


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles: the plain form, and at one width forms with every option."""
    scale, ids = meta(dtype=torch.float32), meta(8192, dtype=torch.int64)
    plain: tuple[Any, ...]
    for b, m in example_sizes(d):
        pairs = meta(b, d, dtype=dtype), meta(m, d, dtype=dtype)
        plain = (None, None, 0, scale, None, True, QUERY_TO_DOC, True, 0, 0.0, None, None, None, None, False, [], [])
        yield mnrl_rows, (*pairs, *plain, True, False)
    if d != EXAMPLE_WIDTH or dtype == torch.bfloat16:
        return
    queries, documents = meta(8192, d, dtype=dtype), meta(16384, d, dtype=dtype)
    document_ids, weights = meta(16384, dtype=torch.int64), meta(8192, dtype=torch.float32)
    every_direction = QUERY_TO_DOC | QUERY_TO_QUERY | DOC_TO_QUERY | DOC_TO_DOC
    dims = [128, d] if dtype == torch.float16 else [d]
    yield mnrl_rows, (
        queries, documents, queries, None, 0, scale, weights, True, every_direction, True, IN_BATCH_NEGATIVES, 9.0,
        ids, document_ids, document_ids, 0.1, True, dims, [1.0] * len(dims), True, True,
    )  # fmt: skip
    if dtype == torch.float16:
        yield mnrl_rows, (
            queries, documents, None, ids, 0, weights, None, False, QUERY_TO_DOC, True, ALL_NEGATIVES, 9.0,
            None, None, None, None, False, [], [], True, False,
        )  # fmt: skip
