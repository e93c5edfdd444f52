"""Multiple negatives ranking loss: scaled cross-entropy over in-batch cosine similarities, streamed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from triton_st.ops._library import call, define, differentiable, require_dims, require_floating


def mnrl_loss(queries: Tensor, documents: Tensor, scale: float = 20.0) -> Tensor:
    """Mean over queries of −log softmax(scale · cosine)[positive]; document i is the positive of query i.

    The other documents, hard negatives included, are every query's negatives. Forward and backward stream over the
    [B, M] similarities in tiles of at most 32 MiB, however large B and M are, with an exact online log-sum-exp in
    float32, and each gradient runs through the normalisation. A zero row has similarity 0 and gradient 0.

    Args:
        queries: [B, D]; float32, float16, bfloat16 (float64 by the reference).
        documents: [M, D] with M a multiple of B: the B positives, then the hard negatives.
        scale: inverse temperature, > 0.

    Returns:
        The loss, 0-d; float32 (float64 for float64 inputs). Gradients have the inputs' dtype.

    Raises:
        ValueError: shapes, devices or scale do not fit. TypeError: dtypes are not floating or differ.

    References: Henderson et al., https://arxiv.org/abs/1705.00652, and sentence-transformers'
    MultipleNegativesRankingLoss, https://sbert.net/docs/package_reference/sentence_transformer/losses.html
    """
    return call("mnrl_loss_forward", queries, documents, scale)[0]


def _check(queries: Tensor, documents: Tensor, scale: float) -> None:
    require_floating(queries=queries, documents=documents)
    require_dims(queries, "queries", "[B, D]")
    require_dims(documents, "documents", "[M, D]")
    (b, d), (m, document_d) = queries.shape, documents.shape
    if d != document_d:
        raise ValueError(f"queries and documents must have rows of one length D, got {d} and {document_d}")
    if b == 0:
        raise ValueError("queries must have at least one row, got none")
    if m == 0 or m % b:
        raise ValueError(f"documents must have a multiple of {b} rows, one positive per query first; got {m}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number > 0, got {scale}")


def _check_backward(grad_loss: Tensor, queries: Tensor, documents: Tensor, logsumexp: Tensor, scale: float) -> None:
    _check(queries, documents, scale)
    if grad_loss.dim() or logsumexp.shape != queries.shape[:1]:
        raise ValueError(
            f"grad_loss must be 0-d and logsumexp {[len(queries)]}, "
            f"got shapes {list(grad_loss.shape)} and {list(logsumexp.shape)}"
        )


def _fake(queries: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return queries.new_empty((), dtype=dtype), queries.new_empty(queries.shape[0], dtype=dtype)


def _backward(ctx: Any, grad_loss: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor, Tensor, None]:
    grads = call("mnrl_loss_backward", grad_loss, *ctx.saved_tensors, ctx.scale, checked=True)
    return grads[0], grads[1], None


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    queries, documents, ctx.scale = inputs
    logsumexp = output[1]
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(queries, documents, logsumexp)


define(
    "mnrl_loss_forward(Tensor queries, Tensor documents, float scale) -> (Tensor loss, Tensor logsumexp)",
    check=_check,
    fake=_fake,
)
define(
    "mnrl_loss_backward(Tensor grad_loss, Tensor queries, Tensor documents, Tensor logsumexp, float scale)"
    " -> (Tensor, Tensor)",
    check=_check_backward,
    fake=lambda grad_loss, queries, documents, logsumexp, scale: (
        queries.new_empty(queries.shape),
        documents.new_empty(documents.shape),
    ),
)
differentiable("mnrl_loss_forward", _backward, _setup, by="mnrl_loss_backward")
