"""Multiple negatives ranking loss."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.reference.normalize import normalize, normalize_backward


def mnrl_loss(queries: Tensor, documents: Tensor, scale: float = 20.0) -> Tensor:
    """Mean cross-entropy of scale · cosine, document i being the positive of query i. [B, D], [M, D] -> scalar."""
    return mnrl_loss_forward(queries, documents, scale)[0]


def mnrl_loss_forward(queries: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The loss (scalar) and the log-sum-exp of each query's scaled similarities [B], both widened."""
    logits = normalize(queries) @ normalize(documents).T * scale
    logsumexp = logits.logsumexp(1)
    return (logsumexp - logits.diagonal()).mean(), logsumexp


def mnrl_loss_backward(
    grad_loss: Tensor, queries: Tensor, documents: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of queries [B, D] and of documents [M, D]."""
    q, d = normalize(queries), normalize(documents)
    grad = torch.exp(q @ d.T * scale - logsumexp.unsqueeze(1))
    grad.diagonal().sub_(1)
    grad = grad * (grad_loss * (scale / len(queries)))
    return normalize_backward(grad @ d, queries), normalize_backward(grad.T @ q, documents)
