"""Self-attention with a bias by relative position over a packed batch, composed of batched products.

What has no such bias runs in `ops.packed_attention`, of which this is the twin: the same scores, the same dropout.
Sequences are sorted by length and cut into a few buckets; each is gathered into [n, L, 3, H, d] (L its longest),
attended with a key mask, and put back. The cut and the indices depend on the lengths alone, so a forward plans once for
all its layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_st.models.functional import store
from triton_st.reference.normalize import widen
from triton_st.reference.philox import dropout_factor, keep_mask

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


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor,
        plan: AttentionPlan,
        max_seqlen: int,
        dropout_p: float,
        seed: Tensor | None,
        stream: int,
        keep: bool,
    ) -> Tensor:
        tokens, _, heads, size = qkv.shape
        rows = _with_zero_row(qkv)
        outputs, saved = [], []
        for bucket in plan.buckets:
            q, k, v = _split(rows, bucket)
            scores = q.mul_(1 / math.sqrt(size)) @ _t(k)  # [n, H, L, L]
            scores += _by_position(bias, bucket.length)
            if bucket.key_bias is not None:
                scores += bucket.key_bias
            weights = probabilities = torch.softmax(scores, -1)
            mask = None
            if dropout_p > 0.0:
                assert seed is not None
                mask = _keep_mask(bucket, tokens, heads, max_seqlen, dropout_p, seed, stream)
                weights = probabilities * mask
            attended = (_t(v) @ _t(weights)).mul_(dropout_factor(dropout_p))  # [n, H, d, L], smaller than the weights
            outputs.append(store(attended, qkv.dtype).permute(0, 3, 1, 2).reshape(-1, heads * size))
            if keep:
                saved += [probabilities.to(qkv.dtype), mask]
        out = torch.cat(outputs) if outputs else qkv.new_empty(0, heads * size)
        out = out.index_select(0, plan.restore)
        if keep:
            ctx.save_for_backward(qkv, bias, out, *saved)
            ctx.plan, ctx.factor = plan, dropout_factor(dropout_p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, out, *saved = ctx.saved_tensors
        _, _, heads, size = qkv.shape
        scale = 1 / math.sqrt(size)
        rows, grad_rows = _with_zero_row(qkv), _with_zero_row(grads[0])
        # sum over keys of weight * grad_weight, per query and head; read off the small output, as FlashAttention does
        delta = _with_zero_row((widen(grads[0]) * widen(out)).view(-1, heads, size).sum(-1))  # [T + 1, H]
        pieces = []
        grad_bias = torch.zeros_like(bias)
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
            _add_by_distance(grad_bias, grad_scores.sum(0))
            grad_q = (_t(k) @ _t(grad_scores)).mul_(scale)  # [n, H, d, L], as the two below
            grad_k = _t(q) @ grad_scores  # q is scaled already
            grad_v = _t(grad) @ weights
            grad_qkv = torch.stack([grad_q, grad_k, grad_v]).permute(1, 4, 0, 2, 3)  # [n, L, 3, H, d]
            pieces.append(grad_qkv.to(qkv.dtype).reshape(-1, *qkv.shape[1:]))
        laid = torch.cat(pieces) if pieces else qkv.new_empty(0, *qkv.shape[1:])
        return laid.index_select(0, ctx.plan.restore), grad_bias, None, None, None, None, None, None


def _by_position(relative_bias: Tensor, length: int) -> Tensor:
    """[H, 2 P - 1] by distance -> [H, L, L] by query and key, of which P >= L."""
    middle = relative_bias.shape[1] // 2
    position = torch.arange(length, device=relative_bias.device)
    return relative_bias[:, middle + position - position[:, None]]


def _add_by_distance(grad_bias: Tensor, grad: Tensor) -> None:
    """Add the sum of every diagonal of grad [H, L, L] to grad_bias [H, 2 P - 1], always in the same order.

    A matrix padded to 2 L columns and read with rows of 2 L - 1 has every row one step further right than the last.
    """
    heads, length, _ = grad.shape
    shifted = torch.nn.functional.pad(grad.flip(1), (0, length)).view(heads, -1)[:, : length * (2 * length - 1)]
    middle = grad_bias.shape[1] // 2
    by_distance = shifted.view(heads, length, 2 * length - 1).sum(1)
    grad_bias[:, middle - length + 1 : middle + length] += by_distance


def _keep_mask(
    bucket: Bucket, tokens: int, heads: int, max_seqlen: int, dropout_p: float, seed: Tensor, stream: int
) -> Tensor:
    """Which weights of a bucket are kept, [n, H, L, L]: those that `ops.packed_attention` keeps."""
    queries = bucket.index.view(bucket.rows, 1, bucket.length)
    rows = torch.arange(heads, device=queries.device).view(1, -1, 1) * tokens + queries
    return keep_mask(seed, stream, rows, bucket.length, max_seqlen, dropout_p)


_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def untraced(function: _Callable) -> _Callable:
    """`torch.compiler.disable`, which imports the whole compiler (1.5 s, 140 MiB), for those who do compile."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class BiasedAttention:
    """softmax(q k^T / sqrt(d) + bias) v within each sequence of one packed batch, for all layers of a forward.

    Scores, softmax and both products run in float32 (float64 for float64 input) whatever the storage dtype.

    Attributes:
        plan: the batch's sequences.
        bias: [H, 2 P - 1], float32: added to the score of a key by its distance from the query, key minus query, which
            counts from 1 - P, where P is at least the longest sequence.

    Reference: Raffel et al., "T5", https://arxiv.org/abs/1910.10683, section 2.1.
    """

    plan: AttentionPlan
    bias: Tensor

    @untraced
    def __call__(
        self, qkv: Tensor, max_seqlen: int, dropout_p: float = 0.0, seed: Tensor | None = None, stream: int = 0
    ) -> Tensor:
        """As `ops.packed_attention`, with `bias` added to the scores. qkv [T, 3, H, d] -> [T, H * d] in qkv's dtype."""
        keep = torch.is_grad_enabled() and (qkv.requires_grad or self.bias.requires_grad)
        return _BiasedAttention.apply(qkv, self.bias, self.plan, max_seqlen, dropout_p, seed, stream, keep)
