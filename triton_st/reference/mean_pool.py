"""Mean pooling of padded and of packed token states."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.reference.normalize import widen


def masked_mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the positions whose mask is not 0. hidden [B, L, D], attention_mask [B, L] -> [B, D]."""
    kept = attention_mask.ne(0).unsqueeze(-1)  # [B, L, 1]
    total = widen(hidden).masked_fill(~kept, 0).sum(1)
    return (total / kept.sum(1).clamp_min(1)).to(hidden.dtype)


def masked_mean_pool_backward(grad: Tensor, attention_mask: Tensor) -> Tensor:
    """grad [B, D], attention_mask [B, L] -> gradient of hidden [B, L, D]."""
    kept = attention_mask.ne(0).unsqueeze(-1)
    share = (widen(grad) / kept.sum(1).clamp_min(1)).to(grad.dtype)
    return share.unsqueeze(1).expand(-1, attention_mask.shape[1], -1).masked_fill(~kept, 0)


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.diff().long()


def packed_mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over each run of rows. hidden [T, D], cu_seqlens [B + 1] -> [B, D]; an empty run gives 0."""
    lengths = _lengths(cu_seqlens)
    if hidden.numel() == 0:
        return hidden.new_zeros(len(lengths), hidden.shape[1])
    total = torch.segment_reduce(widen(hidden), "sum", lengths=lengths, unsafe=True, initial=0)
    return (total / lengths.clamp_min(1).unsqueeze(-1)).to(hidden.dtype)


def packed_mean_pool_backward(grad: Tensor, cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """grad [B, D], cu_seqlens [B + 1] -> gradient of hidden [T, D]."""
    lengths = _lengths(cu_seqlens)
    share = (widen(grad) / lengths.clamp_min(1).unsqueeze(-1)).to(grad.dtype)
    return share.repeat_interleave(lengths, 0, output_size=total_tokens)
