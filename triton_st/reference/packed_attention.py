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
    relative_bias: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(q kᵀ / √d + bias)) v. qkv [T, 3, H, d], cu_seqlens [B + 1], bias [H, 2 P − 1] -> [T, H · d]."""
    return packed_attention_forward(qkv, cu_seqlens, seed, max_seqlen, dropout_p, stream, relative_bias)[0]


def _sequences(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(cu_seqlens.tolist())


def _scores(qkv: Tensor, relative_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv [L, 3, H, d] -> q, k, v [H, L, d] and the scores [H, L, L], scaled and biased, all widened."""
    q, k, v = widen(qkv).permute(1, 2, 0, 3).unbind()
    scores = q @ k.mT * (1 / math.sqrt(qkv.shape[3]))
    if relative_bias is not None:
        scores = scores + relative_bias[:, _distances(len(qkv), relative_bias)]
    return q, k, v, scores


def _distances(length: int, relative_bias: Tensor) -> Tensor:
    """Columns of a bias [H, 2 P − 1] by query and key [L, L]: key − query, from 1 − P on."""
    position = torch.arange(length, device=relative_bias.device)
    return relative_bias.shape[1] // 2 + position - position.unsqueeze(1)


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
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [T, H · d] and each row's log-sum-exp of scores [H, T], widened."""
    tokens, _, heads, size = qkv.shape
    outs, logsumexps = [widen(qkv).new_empty(0, heads * size)], [widen(qkv).new_empty(heads, 0)]
    for start, end in _sequences(cu_seqlens):
        _, _, v, scores = _scores(qkv[start:end], relative_bias)
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
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """grad [T, H · d] -> gradients of qkv [T, 3, H, d] and of the bias, [H, 0] where there is none.

    `out` is the forward result: grad · out is each row's sum.
    """
    tokens, _, heads, size = qkv.shape
    pieces = [qkv.new_empty(0, 3, heads, size)]
    grad_bias = widen(qkv).new_zeros(heads, 0) if relative_bias is None else torch.zeros_like(relative_bias)
    for start, end in _sequences(cu_seqlens):
        q, k, v, scores = _scores(qkv[start:end], relative_bias)
        drop = _drop(heads, start, end, tokens, seed, max_seqlen, dropout_p, stream)
        probabilities = torch.exp(scores - logsumexp[:, start:end, None])
        grad_out = widen(grad[start:end]).view(-1, heads, size).transpose(0, 1)  # [H, L, d]
        grad_probabilities = grad_out @ v.mT * drop
        delta = (probabilities * grad_probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - delta)
        if relative_bias is not None:
            columns = _distances(end - start, relative_bias).flatten()
            grad_bias = grad_bias.index_add(1, columns, grad_scores.flatten(1))
        grad_scores = grad_scores * (1 / math.sqrt(size))
        grads = torch.stack([grad_scores @ k, grad_scores.mT @ q, (probabilities * drop).mT @ grad_out])
        pieces.append(grads.permute(2, 0, 1, 3).to(qkv.dtype))
    return torch.cat(pieces), grad_bias
