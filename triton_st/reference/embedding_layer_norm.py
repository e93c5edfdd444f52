"""BERT's embeddings: word, position and token-type rows summed, normalised and dropped out."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.reference.dropout_add_layer_norm import layer_norm_backward, normalised, statistics
from triton_st.reference.normalize import saturate, widen
from triton_st.reference.philox import dropout


def embedding_layer_norm(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    token_type_ids: Tensor | None = None,
    position_offset: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word + position + token type)): input_ids [T], cu_seqlens [B + 1], word [V, D] -> [T, D]."""
    return embedding_layer_norm_forward(
        word,
        position,
        token_type,
        weight,
        bias,
        input_ids,
        cu_seqlens,
        token_type_ids,
        seed,
        position_offset,
        eps,
        dropout_p,
        stream,
        word.dtype if dtype is None else dtype,
    )[0]


def _positions(cu_seqlens: Tensor, tokens: int, offset: int) -> Tensor:
    """Place of each token in its sequence, plus `offset`. cu_seqlens [B + 1] -> [T]."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    return torch.arange(offset, offset + tokens, device=cu_seqlens.device) - starts


def _types(token_type_ids: Tensor | None, input_ids: Tensor) -> Tensor:
    return torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids


def _sum(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    position_offset: int,
) -> Tensor:
    total = word[input_ids] + position[_positions(cu_seqlens, len(input_ids), position_offset)]
    return total if token_type is None else total + token_type[_types(token_type_ids, input_ids)]


def embedding_layer_norm_forward(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    eps: float,
    dropout_p: float,
    stream: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result [T, D] in `dtype`, and each row's mean and inverse deviation [T] in word's dtype."""
    total = _sum(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset)
    mean, rstd = statistics(total, eps)
    hidden = normalised(total, mean, rstd) * weight + bias
    return saturate(dropout(hidden, dropout_p, seed, stream), dtype), mean, rstd


def embedding_layer_norm_backward(
    grad: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of word [V, D], position [P, D], token_type [N, D] (no row where None), weight and bias [D]."""
    total = _sum(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset)
    grad_hidden = dropout(widen(grad), dropout_p, seed, stream)
    grad_total, grad_weight, grad_bias = layer_norm_backward(grad_hidden, total, weight, mean, rstd)
    positions = _positions(cu_seqlens, len(input_ids), position_offset)
    grad_token_type = word.new_empty(0, word.shape[1])
    if token_type is not None:
        grad_token_type = torch.zeros_like(token_type).index_add_(0, _types(token_type_ids, input_ids), grad_total)
    return (
        torch.zeros_like(word).index_add_(0, input_ids, grad_total),
        torch.zeros_like(position).index_add_(0, positions, grad_total),
        grad_token_type,
        grad_weight,
        grad_bias,
    )
