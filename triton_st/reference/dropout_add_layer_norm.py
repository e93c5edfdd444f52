"""Dropout, residual sum and LayerNorm in one."""

from __future__ import annotations

from torch import Tensor

from triton_st.reference.normalize import saturate, widen
from triton_st.reference.philox import dropout


def normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """(x − mean) · rstd, row by row. x [T, D], mean and rstd [T]."""
    return (x - mean.unsqueeze(1)) * rstd.unsqueeze(1)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / √(variance + eps) of each row. x [T, D] -> [T], [T]."""
    mean = x.mean(1)
    return mean, ((x - mean.unsqueeze(1)).square().mean(1) + eps).rsqrt()


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm's input [T, D], weight [D] and bias [D]; all widened."""
    unit = normalised(x, mean, rstd)
    grad_unit = grad * weight
    radial = (grad_unit * unit).mean(1, keepdim=True)
    grad_x = (grad_unit - grad_unit.mean(1, keepdim=True) - unit * radial) * rstd.unsqueeze(1)
    return grad_x, (grad * unit).sum(0), grad.sum(0)


def residual_sum(
    x: Tensor, residual: Tensor, x_bias: Tensor | None, seed: Tensor | None, dropout_p: float, stream: int
) -> Tensor:
    """dropout(x + x_bias) + residual, widened."""
    x = widen(x) if x_bias is None else widen(x) + x_bias
    return dropout(x, dropout_p, seed, stream) + widen(residual)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual). x, residual [T, D], weight, bias, x_bias [D] -> [T, D]."""
    return dropout_add_layer_norm_forward(x, residual, weight, bias, x_bias, seed, eps, dropout_p, stream)[0]


def dropout_add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result [T, D] in residual's dtype, and each row's mean and inverse deviation [T], widened."""
    total = residual_sum(x, residual, x_bias, seed, dropout_p, stream)
    mean, rstd = statistics(total, eps)
    return saturate(normalised(total, mean, rstd) * weight + bias, residual.dtype), mean, rstd


def dropout_add_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and residual [T, D], weight, bias and x_bias [D]; the last has no element where x_bias is None."""
    total = residual_sum(x, residual, x_bias, seed, dropout_p, stream)
    grad_total, grad_weight, grad_bias = layer_norm_backward(widen(grad), total, weight, mean, rstd)
    grad_x = dropout(grad_total, dropout_p, seed, stream)
    grad_x_bias = grad_weight.new_empty(0) if x_bias is None else grad_x.sum(0)
    # two tensors even where they are equal: an operator's results may not share memory
    return grad_x.to(x.dtype, copy=True), grad_total.to(residual.dtype), grad_weight, grad_bias, grad_x_bias
