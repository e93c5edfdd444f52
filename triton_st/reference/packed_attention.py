"""Self-attention within each sequence of a packed batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from triton_st.reference.normalize import saturate, widen
from triton_st.reference.philox import dropout_factor, keep_mask


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """dropout(softmax(q kᵀ / √d)) v. qkv [T, 3, H, d], cu_seqlens [B + 1] -> [T, H · d]."""
    return packed_attention_forward(qkv, cu_seqlens, seed, max_seqlen, dropout_p, stream)[0]


def _sequences(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(cu_seqlens.tolist())


def _scores(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv [L, 3, H, d] -> q, k, v [H, L, d] and the scaled scores [H, L, L], all widened."""
    q, k, v = widen(qkv).permute(1, 2, 0, 3).unbind()
    return q, k, v, q @ k.mT * (1 / math.sqrt(qkv.shape[3]))


def _drop(
    heads: int, start: int, end: int, tokens: int, seed: Tensor | None, max_seqlen: int, dropout_p: float, stream: int
) -> Tensor | float:
    """Factors of a sequence's weights [H, L, L]: 0 or 1 / (1 − p). Row h · T + t, column the key's place."""
    if dropout_p == 0:
        return 1.0
    assert seed is not None
    rows = torch.arange(heads, device=seed.device).unsqueeze(1) * tokens + torch.arange(start, end, device=seed.device)
    return keep_mask(seed, stream, rows, end - start, max_seqlen, dropout_p) * dropout_factor(dropout_p)


def packed_attention_forward(
    qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, dropout_p: float, stream: int
) -> tuple[Tensor, Tensor]:
    """The result [T, H · d] and each row's log-sum-exp of scaled scores [H, T], widened."""
    tokens, _, heads, size = qkv.shape
    outs, logsumexps = [widen(qkv).new_empty(0, heads * size)], [widen(qkv).new_empty(heads, 0)]
    for start, end in _sequences(cu_seqlens):
        _, _, v, scores = _scores(qkv[start:end])
        drop = _drop(heads, start, end, tokens, seed, max_seqlen, dropout_p, stream)
        logsumexps.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) * drop @ v).transpose(0, 1).reshape(-1, heads * size))
    return saturate(torch.cat(outs), qkv.dtype), torch.cat(logsumexps, 1)


def packed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
) -> Tensor:
    """grad [T, H · d] -> gradient of qkv [T, 3, H, d]. `out` is the forward result: grad · out is each row's sum."""
    tokens, _, heads, size = qkv.shape
    pieces = [qkv.new_empty(0, 3, heads, size)]
    for start, end in _sequences(cu_seqlens):
        q, k, v, scores = _scores(qkv[start:end])
        drop = _drop(heads, start, end, tokens, seed, max_seqlen, dropout_p, stream)
        probabilities = torch.exp(scores - logsumexp[:, start:end, None])
        grad_out = widen(grad[start:end]).view(-1, heads, size).transpose(0, 1)  # [H, L, d]
        grad_probabilities = grad_out @ v.mT * drop
        delta = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta) * (1 / math.sqrt(size))
        grads = torch.stack([grad_scores @ k, grad_scores.mT @ q, (probabilities * drop).mT @ grad_out])
        pieces.append(grads.permute(2, 0, 1, 3).to(qkv.dtype))
    return torch.cat(pieces)
