"""The last LayerNorm of an encoder and mean pooling in one; the last hidden states exist nowhere."""

from __future__ import annotations

from torch import Tensor

from triton_st.reference.dropout_add_layer_norm import layer_norm_backward, normalised, residual_sum, statistics
from triton_st.reference.mean_pool import packed_mean_pool, packed_mean_pool_backward
from triton_st.reference.normalize import normalize as unit_rows
from triton_st.reference.normalize import normalize_backward, saturate, widen
from triton_st.reference.philox import dropout


def layer_norm_mean_pool(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    normalize: bool = False,
) -> Tensor:
    """Mean over each sequence of LayerNorm(dropout(x + x_bias) + residual). x [T, D], cu_seqlens [B + 1] -> [B, D]."""
    return layer_norm_mean_pool_forward(
        x, residual, weight, bias, cu_seqlens, x_bias, seed, eps, dropout_p, stream, normalize
    )[0]


def layer_norm_mean_pool_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result [B, D] in residual's dtype; the means before normalisation [B, D], widened; mean and rstd [T]."""
    total = residual_sum(x, residual, x_bias, seed, dropout_p, stream)
    mean, rstd = statistics(total, eps)
    pooled = packed_mean_pool(normalised(total, mean, rstd) * weight + bias, cu_seqlens)
    out = unit_rows(pooled) if normalize else pooled
    # a copy even where they are equal: an operator's results may not share memory
    return saturate(out, residual.dtype), pooled.clone(), mean, rstd


def layer_norm_mean_pool_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    pooled: Tensor,
    mean: Tensor,
    rstd: Tensor,
    cu_seqlens: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and residual [T, D], weight, bias and x_bias [D]; the last has no element where x_bias is None."""
    grad_pooled = normalize_backward(widen(grad), pooled) if normalize else widen(grad)
    grad_hidden = packed_mean_pool_backward(grad_pooled, cu_seqlens, len(x))
    total = residual_sum(x, residual, x_bias, seed, dropout_p, stream)
    grad_total, grad_weight, grad_bias = layer_norm_backward(grad_hidden, total, weight, mean, rstd)
    grad_x = dropout(grad_total, dropout_p, seed, stream)
    grad_x_bias = grad_weight.new_empty(0) if x_bias is None else grad_x.sum(0)
    return grad_x.to(x.dtype, copy=True), grad_total.to(residual.dtype), grad_weight, grad_bias, grad_x_bias
