"""The end of an encoder in one pass: dropout, residual sum, LayerNorm, mean pooling and, if wanted, unit length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_st.ops._checks import check_dropout, check_eps, check_parameters, check_sum
from triton_st.ops._library import call, define, differentiable, require_device
from triton_st.ops.mean_pool import check_cu_seqlens, check_cu_seqlens_values


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
    """Mean over each sequence of LayerNorm(dropout(x + x_bias) + residual), divided by its length if `normalize`.

    The last hidden states are never written: they are float32 numbers on their way into a sum.

    Args:
        x: [T, D] in residual's dtype, or float32 (a product's full range).
        residual: [T, D]; float32, float16, bfloat16 (float64 by the reference).
        weight: LayerNorm's scale [D], float32 (float64 if residual is).
        bias: LayerNorm's offset, as weight.
        eps: added to the variance, in float32.
        cu_seqlens: [B + 1], int32 or int64: 0, then the running total of sequence lengths, ending at T.
        x_bias: [D], as weight; bias of the product that made x.
        dropout_p: probability of dropping an element of x.
        seed: int64, one element, on x's device; needed where dropout_p is not 0.
        stream: names the place in the model, so that no two places drop alike under one seed.
        normalize: divide each embedding by its L2 norm (or 1e-12 where that is larger).

    Returns:
        Embeddings [B, D] in residual's dtype; 0 for an empty sequence.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, dropout_p is no probability; on CPU also if
            cu_seqlens is not as above. TypeError: a dtype is not one of the above.

    References: Ba et al., https://arxiv.org/abs/1607.06450; Reimers & Gurevych, https://arxiv.org/abs/1908.10084.
    """
    settings = (eps, dropout_p, stream, normalize)
    return call("layer_norm_mean_pool_forward", x, residual, weight, bias, cu_seqlens, x_bias, seed, *settings)[0]


def _check(
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
) -> None:
    check_sum(x, residual)
    check_parameters("residual", residual, x.shape[1], weight=weight, bias=bias, x_bias=x_bias)
    check_cu_seqlens(cu_seqlens)
    require_device("x", x, cu_seqlens=cu_seqlens)
    check_eps(eps)
    check_dropout(dropout_p, seed, x.device)


def _check_backward(
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
) -> None:
    _check(x, residual, weight, weight, cu_seqlens, x_bias, seed, 0.0, dropout_p, stream, normalize)
    shape = [cu_seqlens.shape[0] - 1, x.shape[1]]
    wide = torch.promote_types(residual.dtype, torch.float32)
    for name, tensor, dtype in (("grad", grad, residual.dtype), ("pooled", pooled, wide)):
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} in {dtype}, got {list(tensor.shape)}, {tensor.dtype}")
    check_parameters("residual", residual, x.shape[0], mean=mean, rstd=rstd)
    require_device("x", x, grad=grad, pooled=pooled)


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    shape = cu_seqlens.shape[0] - 1, x.shape[1]
    return (
        residual.new_empty(shape),
        x.new_empty(shape, dtype=wide),
        x.new_empty(x.shape[0], dtype=wide),
        x.new_empty(x.shape[0], dtype=wide),
    )


def _fake_backward(grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x_bias = rest[4]
    return (
        x.new_empty(x.shape),
        residual.new_empty(residual.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if x_bias is None else x_bias.shape[0]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, cu_seqlens, x_bias, seed, _, *ctx.settings = inputs
    _, pooled, mean, rstd = output
    ctx.mark_non_differentiable(pooled, mean, rstd)
    ctx.save_for_backward(x, residual, weight, pooled, mean, rstd, cu_seqlens, x_bias, seed)
    ctx.has_x_bias = x_bias is not None


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = call("layer_norm_mean_pool_backward", grad, *ctx.saved_tensors, *ctx.settings, checked=True)
    return *grads[:4], None, grads[4] if ctx.has_x_bias else None, None, None, None, None, None


define(
    "layer_norm_mean_pool_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor cu_seqlens,"
    " Tensor? x_bias, Tensor? seed, float eps, float dropout_p, int stream, bool normalize)"
    " -> (Tensor out, Tensor pooled, Tensor mean, Tensor rstd)",
    check=_check,
    check_values=lambda x, residual, weight, bias, cu_seqlens, *rest: check_cu_seqlens_values(cu_seqlens, len(x)),
    fake=_fake,
)
define(
    "layer_norm_mean_pool_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor pooled, Tensor mean,"
    " Tensor rstd, Tensor cu_seqlens, Tensor? x_bias, Tensor? seed, float dropout_p, int stream, bool normalize)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    check_values=lambda grad, x, *rest: check_cu_seqlens_values(rest[5], len(x)),
    fake=_fake_backward,
)
differentiable("layer_norm_mean_pool_forward", _backward, _setup, by="layer_norm_mean_pool_backward")
