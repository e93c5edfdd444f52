"""What follows every block of a BERT layer, in one pass: bias, dropout, residual sum and LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_st.ops._checks import check_dropout, check_eps, check_parameters, check_sum
from triton_st.ops._library import call, define, differentiable, require_device


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
    """LayerNorm(dropout(x + x_bias) + residual).

    Sums and statistics are float32. Kept for the gradient: the inputs and two numbers per row; the sum and the dropout
    are computed again. Element (t, k) drops as number t · round_up(D, 4) + k: see `triton_st.reference.philox`.

    Args:
        x: [T, D] in residual's dtype, or float32 (a product's full range).
        residual: [T, D]; float32, float16, bfloat16 (float64 by the reference).
        weight: LayerNorm's scale [D], float32 (float64 if residual is).
        bias: LayerNorm's offset, as weight.
        eps: added to the variance, in float32.
        x_bias: [D], as weight; bias of the product that made x.
        dropout_p: probability of dropping an element of x.
        seed: int64, one element, on x's device; needed where dropout_p is not 0.
        stream: names the place in the model, so that no two places drop alike under one seed.

    Returns:
        [T, D] in residual's dtype. A finite value past float16's range becomes its largest. The parameters' gradients
        are float32 and repeatable bit for bit.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, dropout_p is no probability. TypeError: a dtype is
            not one of the above.

    Reference: Ba et al., "Layer Normalization", https://arxiv.org/abs/1607.06450.
    """
    return call("dropout_add_layer_norm_forward", x, residual, weight, bias, x_bias, seed, eps, dropout_p, stream)[0]


def _check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
) -> None:
    check_sum(x, residual)
    check_parameters("residual", residual, x.shape[1], weight=weight, bias=bias, x_bias=x_bias)
    check_eps(eps)
    check_dropout(dropout_p, seed, x.device)


def _check_backward(
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
) -> None:
    _check(x, residual, weight, weight, x_bias, seed, 0.0, dropout_p, stream)
    if grad.dtype != residual.dtype or grad.shape != residual.shape:
        raise ValueError(
            f"grad must be {list(residual.shape)} in {residual.dtype} as residual, got {list(grad.shape)}, {grad.dtype}"
        )
    check_parameters("residual", residual, x.shape[0], mean=mean, rstd=rstd)
    require_device("x", x, grad=grad)


def _fake(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    return (
        residual.new_empty(residual.shape),
        x.new_empty(x.shape[0], dtype=wide),
        x.new_empty(x.shape[0], dtype=wide),
    )


def _fake_backward(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x_bias = rest[2]
    sums = (weight.new_empty(weight.shape), weight.new_empty(weight.shape))
    return (
        x.new_empty(x.shape),
        residual.new_empty(residual.shape),
        *sums,
        weight.new_empty(0 if x_bias is None else x_bias.shape[0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, x_bias, seed, _, *ctx.settings = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd, x_bias, seed)
    ctx.has_x_bias = x_bias is not None


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = call("dropout_add_layer_norm_backward", grad, *ctx.saved_tensors, *ctx.settings, checked=True)
    return *grads[:4], grads[4] if ctx.has_x_bias else None, None, None, None, None


define(
    "dropout_add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias,"
    " Tensor? seed, float eps, float dropout_p, int stream) -> (Tensor out, Tensor mean, Tensor rstd)",
    check=_check,
    fake=_fake,
)
define(
    "dropout_add_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,"
    " Tensor? x_bias, Tensor? seed, float dropout_p, int stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
)
differentiable("dropout_add_layer_norm_forward", _backward, _setup, by="dropout_add_layer_norm_backward")
