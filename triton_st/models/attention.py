"""Self-attention over a packed batch, composed of batched products over buckets of similar length.

Sequences are sorted by length and cut into a few buckets; each is gathered into [n, L, 3, H, d] (L its longest),
attended with a key mask, and put back. The cut and the indices depend on the lengths alone, so a forward plans once for
all its layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_st.models.functional import keep_mask, store, widen

_BUCKET_COST = 8_000
"""What one more bucket costs, in elements of one head's score matrix; measured on two cores with short texts."""


@dataclass(frozen=True)
class Bucket:
    """Sequences attended together. `index` [n * L] holds their tokens; T stands for padding."""

    index: Tensor
    key_bias: Tensor | None  # [n, 1, 1, L] float32: 0 for a token, -inf for padding; None where nothing is padded
    rows: int
    length: int


@dataclass(frozen=True)
class AttentionPlan:
    """How one packed batch is cut into buckets; stands for `cu_seqlens` and `max_seqlen`."""

    buckets: tuple[Bucket, ...]
    restore: Tensor  # [T]: where each token lies in the buckets laid end to end

    @staticmethod
    def build(lengths: Sequence[int], device: torch.device) -> AttentionPlan:
        """Plan for sequences of these lengths, laid end to end."""
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(sizes, kind="stable")
        order = order[sizes[order] > 0]
        total = int(sizes.sum())
        restore = np.empty(total, dtype=np.int64)
        buckets = []
        laid = 0
        for begin, end in _cut(sizes[order]):
            members = order[begin:end]
            length = int(sizes[members[-1]])
            column = np.arange(length)
            index = starts[members][:, None] + column  # [n, L]
            padding = column >= sizes[members][:, None]
            restore[index[~padding]] = laid + np.flatnonzero(~padding)
            laid += index.size
            key_bias = None
            if padding.any():
                index[padding] = total
                bias = np.where(padding, np.float32(-np.inf), np.float32(0.0))
                key_bias = torch.from_numpy(bias).to(device)[:, None, None, :]
            buckets.append(Bucket(torch.from_numpy(index.reshape(-1)).to(device), key_bias, len(members), length))
        return AttentionPlan(tuple(buckets), torch.from_numpy(restore).to(device))


def _cut(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs of least total cost n * L^2 + _BUCKET_COST, by dynamic programming."""
    if len(lengths) == 0:
        return []
    ends = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))  # a run ends where the length changes
    counts = np.insert(ends, 0, 0)
    best = np.zeros(len(counts))
    previous = np.zeros(len(counts), dtype=np.int64)
    for i in range(1, len(counts)):
        cost = best[:i] + (counts[i] - counts[:i]) * float(lengths[counts[i] - 1]) ** 2 + _BUCKET_COST
        previous[i] = np.argmin(cost)
        best[i] = cost[previous[i]]
    runs = []
    i = len(counts) - 1
    while i > 0:
        runs.append((int(counts[previous[i]]), int(counts[i])))
        i = int(previous[i])
    return runs[::-1]


def _split(qkv: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T + 1, 3, H, d], last row 0 -> q, k, v [n, H, L, d] of a bucket, at least float32."""
    heads, size = qkv.shape[2:]
    rows = qkv.index_select(0, bucket.index).view(bucket.rows, bucket.length, 3, heads, size)
    q, k, v = _contiguous(rows.permute(2, 0, 3, 1, 4))
    return q, k, v


def _contiguous(x: Tensor) -> Tensor:
    """A contiguous copy in at least float32, in one pass."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def _t(x: Tensor) -> Tensor:
    """Transpose of the last two dimensions. A product with the narrow dimension d as rows is 3 times as fast as its
    transpose, which has d columns (measured with MKL at d = 10)."""
    return x.transpose(-1, -2)


def _with_zero_row(x: Tensor) -> Tensor:
    """Append the row that padding reads, so that nothing of one sequence can reach another."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, plan: AttentionPlan, dropout_p: float, keep: bool) -> Tensor:
        _, _, heads, size = qkv.shape
        rows = _with_zero_row(qkv)
        outputs, saved = [], []
        factor = 1.0
        for bucket in plan.buckets:
            q, k, v = _split(rows, bucket)
            scores = q.mul_(1 / math.sqrt(size)) @ _t(k)  # [n, H, L, L]
            if bucket.key_bias is not None:
                scores += bucket.key_bias
            weights = probabilities = torch.softmax(scores, -1)
            mask = None
            if dropout_p > 0.0:
                mask, factor = keep_mask(probabilities.shape, dropout_p, qkv.device)
                weights = probabilities * mask
            attended = (_t(v) @ _t(weights)).mul_(factor)  # [n, H, d, L], smaller than the weights
            outputs.append(store(attended, qkv.dtype).permute(0, 3, 1, 2).reshape(-1, heads * size))
            if keep:
                saved += [probabilities.to(qkv.dtype), mask]
        out = torch.cat(outputs) if outputs else qkv.new_empty(0, heads * size)
        out = out.index_select(0, plan.restore)
        if keep:
            ctx.save_for_backward(qkv, out, *saved)
            ctx.plan, ctx.factor = plan, factor
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, *saved = ctx.saved_tensors
        _, _, heads, size = qkv.shape
        scale = 1 / math.sqrt(size)
        rows, grad_rows = _with_zero_row(qkv), _with_zero_row(grads[0])
        # sum over keys of weight * grad_weight, per query and head; read off the small output, as FlashAttention does
        delta = _with_zero_row((widen(grads[0]) * widen(out)).view(-1, heads, size).sum(-1))  # [T + 1, H]
        pieces = []
        for i, bucket in enumerate(ctx.plan.buckets):
            n, length = bucket.rows, bucket.length
            q, k, v = _split(rows, bucket)
            q.mul_(scale)
            probabilities, mask = saved[2 * i].to(q.dtype), saved[2 * i + 1]
            grad = grad_rows.index_select(0, bucket.index).view(n, length, heads, size)
            grad = _contiguous(grad.transpose(1, 2)).mul_(ctx.factor)  # [n, H, L, d]
            bucket_delta = delta.index_select(0, bucket.index).view(n, length, heads, 1).transpose(1, 2)
            weights = probabilities if mask is None else probabilities * mask
            grad_scores = (grad @ _t(v)).mul_(weights).addcmul_(probabilities, bucket_delta, value=-1)
            grad_q = (_t(k) @ _t(grad_scores)).mul_(scale)  # [n, H, d, L], as the two below
            grad_k = _t(q) @ grad_scores  # q is scaled already
            grad_v = _t(grad) @ weights
            grad_qkv = torch.stack([grad_q, grad_k, grad_v]).permute(1, 4, 0, 2, 3)  # [n, L, 3, H, d]
            pieces.append(grad_qkv.to(qkv.dtype).reshape(-1, *qkv.shape[1:]))
        laid = torch.cat(pieces) if pieces else qkv.new_empty(0, *qkv.shape[1:])
        return laid.index_select(0, ctx.plan.restore), None, None, None


def packed_attention(qkv: Tensor, plan: AttentionPlan, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence of a packed batch, without a causal mask.

    Scores, softmax and both products run in float32 (float64 for float64 input) whatever the storage dtype.

    Args:
        qkv: [T, 3, H, d], any floating dtype.
        plan: the batch's sequences.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [T, H * d] in qkv's dtype.

    Reference: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762.
    """
    keep = torch.is_grad_enabled() and qkv.requires_grad
    return _PackedAttention.apply(qkv, plan, dropout_p, keep)
