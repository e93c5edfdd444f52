"""A post-LayerNorm transformer layer: the other operators, and products with weights rounded to the activations' dtype.

Sites of dropout, counted from the layer's stream: 0 attention weights, 1 attention's projection, 2 the feed-forward
block's result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from triton_st.reference.dropout_add_layer_norm import layer_norm_backward, normalised, residual_sum, statistics
from triton_st.reference.normalize import saturate, widen
from triton_st.reference.packed_attention import packed_attention_backward, packed_attention_forward
from triton_st.reference.philox import dropout


class BertLayerParameters(NamedTuple):
    """A layer's parameters: two blocks of a product, an output product and a LayerNorm."""

    qkv_weight: Tensor  # [3 D, D]: query, key, value
    qkv_bias: Tensor  # [3 D]
    projection_weight: Tensor  # [D, D]
    projection_bias: Tensor  # [D]
    attention_norm_weight: Tensor  # [D]
    attention_norm_bias: Tensor  # [D]
    up_weight: Tensor  # [I, D]
    up_bias: Tensor  # [I]
    down_weight: Tensor  # [D, I]
    down_bias: Tensor  # [D]
    output_norm_weight: Tensor  # [D]
    output_norm_bias: Tensor  # [D]


def _weight(weight: Tensor, like: Tensor) -> Tensor:
    """The weight as it enters a product: rounded to the activations' dtype, and widened."""
    return widen(weight.to(like.dtype))


def bert_layer(
    hidden: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    parameters: BertLayerParameters,
    heads: int,
    eps: float,
    *,
    attention_dropout_p: float = 0.0,
    projection_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """hidden [T, D], cu_seqlens [B + 1] -> [T, D]."""
    settings = (max_seqlen, heads, eps, attention_dropout_p, projection_dropout_p, hidden_dropout_p, stream)
    return bert_layer_forward(hidden, cu_seqlens, seed, *parameters, *settings, True, relative_bias)[0]


def bert_layer_forward(
    hidden: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *parameters_and_settings: Any
) -> tuple[Tensor, ...]:
    """The result [T, D] and, if the setting `keep` says so, what the gradient needs; else empty tensors.

    Kept: qkv [T, 3, H, d], attention's log-sum-exp [H, T] and result [T, D], the first sum normalised [T, D] and its
    inverse deviation [T], the input of GELU [T, I], and the second sum's [T, D] and [T].
    """
    p = BertLayerParameters(*parameters_and_settings[:12])
    max_seqlen, heads, eps, attention_p, projection_p, hidden_p, stream, keep, bias = parameters_and_settings[12:]
    dtype = hidden.dtype
    qkv = saturate(F.linear(widen(hidden), _weight(p.qkv_weight, hidden), p.qkv_bias), dtype)
    qkv = qkv.view(len(hidden), 3, heads, hidden.shape[1] // heads)
    attended, lse = packed_attention_forward(qkv, cu_seqlens, seed, max_seqlen, attention_p, stream, bias)

    projected = F.linear(widen(attended), _weight(p.projection_weight, hidden))
    total = residual_sum(projected, hidden, p.projection_bias, seed, projection_p, stream + 1)
    mean1, rstd1 = statistics(total, eps)
    norm1 = normalised(total, mean1, rstd1)
    middle = saturate(norm1 * p.attention_norm_weight + p.attention_norm_bias, dtype)

    pre = saturate(F.linear(widen(middle), _weight(p.up_weight, hidden), p.up_bias), dtype)
    activated = saturate(F.gelu(widen(pre)), dtype)
    fed = F.linear(widen(activated), _weight(p.down_weight, hidden))
    total = residual_sum(fed, middle, p.down_bias, seed, hidden_p, stream + 2)
    mean2, rstd2 = statistics(total, eps)
    norm2 = normalised(total, mean2, rstd2)
    out = saturate(norm2 * p.output_norm_weight + p.output_norm_bias, dtype)
    kept = (qkv, lse, attended, norm1.to(dtype), rstd1, pre, norm2.to(dtype), rstd2)
    if keep:
        return (out, *kept)
    return (out, *(x.narrow(1 if x is lse else 0, 0, 0).clone() for x in kept))


def bert_layer_backward(
    grad: Tensor,
    hidden: Tensor,
    qkv: Tensor,
    lse: Tensor,
    attended: Tensor,
    norm1: Tensor,
    rstd1: Tensor,
    pre: Tensor,
    norm2: Tensor,
    rstd2: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    qkv_weight: Tensor,
    projection_weight: Tensor,
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    output_norm_weight: Tensor,
    max_seqlen: int,
    attention_dropout_p: float,
    projection_dropout_p: float,
    hidden_dropout_p: float,
    stream: int,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of hidden [T, D], of the parameters, in the order of `BertLayerParameters`, and of the bias."""

    def through_norm(grad: Tensor, norm: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = widen(norm)
        zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
        grad_sum, grad_weight, grad_bias = layer_norm_backward(grad, unit, weight, zeros, ones)
        return grad_sum * rstd.unsqueeze(1), grad_weight, grad_bias

    middle = widen(norm1) * attention_norm_weight + attention_norm_bias
    grad_sum2, grad_norm2_weight, grad_norm2_bias = through_norm(widen(grad), norm2, rstd2, output_norm_weight)
    grad_fed = dropout(grad_sum2, hidden_dropout_p, seed, stream + 2)
    grad_pre = aten.gelu_backward(grad_fed @ _weight(down_weight, hidden), widen(pre))
    grad_middle = grad_pre @ _weight(up_weight, hidden) + grad_sum2
    grad_sum1, grad_norm1_weight, grad_norm1_bias = through_norm(grad_middle, norm1, rstd1, attention_norm_weight)
    grad_projected = dropout(grad_sum1, projection_dropout_p, seed, stream + 1)
    grad_attended = grad_projected @ _weight(projection_weight, hidden)
    grad_qkv, grad_bias = packed_attention_backward(
        grad_attended, qkv, attended, lse, cu_seqlens, seed, max_seqlen, attention_dropout_p, stream, relative_bias
    )
    grad_qkv = widen(grad_qkv).flatten(1)  # [T, 3 · D]
    grad_hidden = grad_qkv @ _weight(qkv_weight, hidden) + grad_sum1
    return (
        grad_hidden.to(hidden.dtype),
        grad_qkv.T @ widen(hidden),
        grad_qkv.sum(0),
        grad_projected.T @ widen(attended),
        grad_projected.sum(0),
        grad_norm1_weight,
        grad_norm1_bias,
        grad_pre.T @ middle,
        grad_pre.sum(0),
        grad_fed.T @ F.gelu(widen(pre)),
        grad_fed.sum(0),
        grad_norm2_weight,
        grad_norm2_bias,
        grad_bias,
    )
