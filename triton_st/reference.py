"""Every operator in plain PyTorch: the specification that each kernel is tested against.

Any device, any floating dtype. Values are widened to at least float32 (float64 stays float64), computed, and cast to
the result's dtype once at the end. The forward functions are differentiable by autograd; the `*_backward` functions are
the same gradients written out, for the operators, whose implementations run below autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
"""Smallest norm that a vector is divided by, as `torch.nn.functional.normalize` and sentence-transformers have it."""


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- mean pooling -----------------------------------------------------------------------------------------------------


def masked_mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the positions whose mask is not 0. hidden [B, L, D], attention_mask [B, L] -> [B, D]."""
    kept = attention_mask.ne(0).unsqueeze(-1)  # [B, L, 1]
    total = _widen(hidden).masked_fill(~kept, 0).sum(1)
    return (total / kept.sum(1).clamp_min(1)).to(hidden.dtype)


def masked_mean_pool_backward(grad: Tensor, attention_mask: Tensor) -> Tensor:
    """grad [B, D], attention_mask [B, L] -> gradient of hidden [B, L, D]."""
    kept = attention_mask.ne(0).unsqueeze(-1)
    share = (_widen(grad) / kept.sum(1).clamp_min(1)).to(grad.dtype)
    return share.unsqueeze(1).expand(-1, attention_mask.shape[1], -1).masked_fill(~kept, 0)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.diff().long()


def packed_mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over each run of rows. hidden [T, D], cu_seqlens [B + 1] -> [B, D]; an empty run gives 0."""
    lengths = _lengths(cu_seqlens)
    if hidden.numel() == 0:
        return hidden.new_zeros(len(lengths), hidden.shape[1])
    total = torch.segment_reduce(_widen(hidden), "sum", lengths=lengths, unsafe=True, initial=0)
    return (total / lengths.clamp_min(1).unsqueeze(-1)).to(hidden.dtype)


def packed_mean_pool_backward(grad: Tensor, cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """grad [B, D], cu_seqlens [B + 1] -> gradient of hidden [T, D]."""
    lengths = _lengths(cu_seqlens)
    share = (_widen(grad) / lengths.clamp_min(1).unsqueeze(-1)).to(grad.dtype)
    return share.repeat_interleave(lengths, 0, output_size=total_tokens)


# --- cosine similarity ------------------------------------------------------------------------------------------------


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x times a power of two that brings each near 1, so that no square overflows; and those powers [N, 1]."""
    x = _widen(x)
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    exponent = torch.frexp(largest.nan_to_num(0, 0, 0)).exponent.clamp(-100, 120)
    power = torch.ldexp(torch.ones_like(largest), -exponent)
    return x * power, power


def normalize(x: Tensor) -> Tensor:
    """x / max(‖x‖₂, EPS) row by row, widened. A zero row stays zero and has gradient zero."""
    scaled, power = _scaled(x)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, scaled / norm.clamp_min(EPS * power))


def _normalize_backward(grad_unit: Tensor, x: Tensor) -> Tensor:
    """Gradient of x [N, D] from the gradient of `normalize(x)`, in x's dtype."""
    scaled, power = _scaled(x)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    floor = EPS * power
    unit = scaled / norm.clamp_min(floor)
    radial = torch.where(norm < floor, 0, (grad_unit * unit).sum(-1, keepdim=True))
    grad = (grad_unit - unit * radial) / norm.clamp_min(floor) * power
    return torch.where(norm == 0, 0, grad).to(x.dtype)


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b. a [M, D], b [N, D] -> [M, N]."""
    return (normalize(a) @ normalize(b).T).to(a.dtype)


def cosine_similarity_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """grad [M, N] -> gradients of a [M, D] and of b [N, D]."""
    grad = _widen(grad)
    return _normalize_backward(grad @ normalize(b), a), _normalize_backward(grad.T @ normalize(a), b)


# --- multiple negatives ranking loss ----------------------------------------------------------------------------------


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
    return _normalize_backward(grad @ d, queries), _normalize_backward(grad.T @ q, documents)
