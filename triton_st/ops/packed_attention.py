"""Self-attention within each sequence of a packed batch: no padding, no stored scores, no stored dropout mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_st.ops._checks import check_dropout, check_max_seqlen
from triton_st.ops._library import call, define, differentiable, require_device, require_dims, require_floating
from triton_st.ops.mean_pool import check_cu_seqlens, check_cu_seqlens_values

MAX_HEAD_SIZE = 128


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(q kᵀ / √d + bias)) v within each sequence, every token attending to every other of its own.

    Scores, softmax and sums are float32. What is kept for the gradient is one number per row, its log-sum-exp; scores
    and dropout are computed again. The dropout of weight (head h, token t of the batch, key j of its sequence) is that
    of element (h · T + t) · round_up(max_seqlen, 4) + j: see `triton_st.reference.philox`.

    Args:
        qkv: queries, keys and values [T, 3, H, d]; float32, float16, bfloat16 (float64 by the reference); d ≤ 128.
        cu_seqlens: [B + 1], int32 or int64: 0, then the running total of sequence lengths, ending at T.
        max_seqlen: at least the longest sequence's length.
        dropout_p: probability of dropping a weight.
        seed: int64, one element, on qkv's device; needed where dropout_p is not 0.
        stream: names the place in the model, so that no two places drop alike under one seed.
        relative_bias: [H, 2 P - 1], float32 (float64 if qkv is), P at least max_seqlen: added to the score of a key by
            its distance from the query, key minus query, which counts from 1 - P. −inf keeps a key out.

    Returns:
        [T, H · d] in qkv's dtype. A finite value past float16's range becomes its largest.

    Raises:
        ValueError: shapes or devices do not fit, d is not served, dropout_p is no probability; on CPU also if
            cu_seqlens or max_seqlen are not as above (on a GPU that check would wait for the device).
        TypeError: a dtype is not one of the above.

    References: Vaswani et al., https://arxiv.org/abs/1706.03762; Dao, FlashAttention-2,
    https://arxiv.org/abs/2307.08691; Raffel et al., "T5", https://arxiv.org/abs/1910.10683, section 2.1.
    """
    return call("packed_attention_forward", qkv, cu_seqlens, seed, max_seqlen, dropout_p, stream, relative_bias)[0]


def check_relative_bias(relative_bias: Tensor | None, heads: int, max_seqlen: int, like: Tensor, name: str) -> None:
    """A bias fits `heads` heads, sequences of `max_seqlen` tokens and the activations `like`, which are called `name`.

    That it reaches as far as `max_seqlen` says can be known without a look at cu_seqlens, which a GPU may hold.
    """
    if relative_bias is None:
        return
    if not isinstance(relative_bias, Tensor):
        raise TypeError(f"relative_bias must be a tensor, got {type(relative_bias).__name__}")
    if relative_bias.layout != torch.strided:
        raise TypeError(f"relative_bias must be a dense tensor, got layout {relative_bias.layout}")
    require_device(name, like, relative_bias=relative_bias)
    wide = torch.promote_types(like.dtype, torch.float32)
    if relative_bias.dtype != wide:
        raise TypeError(f"relative_bias must be {wide} with {name} in {like.dtype}, got {relative_bias.dtype}")
    shape = relative_bias.shape
    if relative_bias.dim() != 2 or shape[0] != heads or shape[1] % 2 == 0:
        raise ValueError(f"relative_bias must be [H, 2 P - 1] with {heads} heads, got shape {list(shape)}")
    columns = 2 * max_seqlen - 1
    if shape[1] < columns:
        raise ValueError(
            f"relative_bias must have at least {columns} columns with max_seqlen {max_seqlen}, got {shape[1]}"
        )


def empty_bias_gradient(relative_bias: Tensor | None, heads: int, like: Tensor) -> Tensor:
    """Memory for the gradient of a bias; of none, [H, 0]."""
    if relative_bias is not None:
        return relative_bias.new_empty(relative_bias.shape)
    return like.new_empty(heads, 0, dtype=torch.promote_types(like.dtype, torch.float32))


def _check(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    relative_bias: Tensor | None,
) -> None:
    require_floating(qkv=qkv)
    require_dims(qkv, "qkv", "[T, 3, H, d]")
    if qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, d], got shape {list(qkv.shape)}")
    if not 1 <= qkv.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"qkv must have heads of 1 to {MAX_HEAD_SIZE} elements, got {qkv.shape[3]}")
    check_cu_seqlens(cu_seqlens)
    require_device("qkv", qkv, cu_seqlens=cu_seqlens)
    check_max_seqlen(max_seqlen)
    check_dropout(dropout_p, seed, qkv.device)
    check_relative_bias(relative_bias, qkv.shape[2], max_seqlen, qkv, "qkv")


def _check_values(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    relative_bias: Tensor | None,
) -> None:
    longest = check_cu_seqlens_values(cu_seqlens, len(qkv))
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the longest sequence's length, got {max_seqlen}")


def _check_backward(grad: Tensor, qkv: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any) -> None:
    _check(qkv, *rest)
    tokens, _, heads, size = qkv.shape
    require_floating(qkv=qkv, grad=grad, out=out)
    for name, tensor, shape in (
        ("grad", grad, [tokens, heads * size]),
        ("out", out, [tokens, heads * size]),
        ("logsumexp", logsumexp, [heads, tokens]),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got shape {list(tensor.shape)}")
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if logsumexp.dtype != wide:
        raise TypeError(f"logsumexp must be {wide}, got {logsumexp.dtype}")


def _fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tokens, _, heads, size = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(tokens, heads * size), qkv.new_empty(heads, tokens, dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, seed, *ctx.settings, relative_bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed, relative_bias)


def _backward(ctx: Any, grad: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    *saved, relative_bias = ctx.saved_tensors
    grad_qkv, grad_bias = call("packed_attention_backward", grad, *saved, *ctx.settings, relative_bias, checked=True)
    return grad_qkv, None, None, None, None, None, None if relative_bias is None else grad_bias


def _fake_backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), empty_bias_gradient(rest[-1], qkv.shape[2], qkv)


define(
    "packed_attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor? seed, SymInt max_seqlen, float dropout_p,"
    " int stream, Tensor? relative_bias) -> (Tensor out, Tensor logsumexp)",
    check=_check,
    check_values=_check_values,
    fake=_fake,
)
define(
    "packed_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor logsumexp, Tensor cu_seqlens, Tensor? seed,"
    " SymInt max_seqlen, float dropout_p, int stream, Tensor? relative_bias) -> (Tensor, Tensor)",
    check=_check_backward,
    check_values=lambda grad, qkv, out, logsumexp, *rest: _check_values(qkv, *rest),
    fake=_fake_backward,
)
differentiable("packed_attention_forward", _backward, _setup, by="packed_attention_backward")
