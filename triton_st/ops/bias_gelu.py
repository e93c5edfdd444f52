"""GELU of a product's result plus its bias, in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triton_st.ops._checks import check_parameters
from triton_st.ops._library import call, define, differentiable, require_dims, require_floating


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU, computed in float32; the activation is computed again for the gradient.

    Args:
        x: [T, N]; float32, float16, bfloat16 (float64 by the reference).
        bias: [N], float32 (float64 if x is).

    Returns:
        [T, N] in x's dtype. A finite value past float16's range becomes its largest.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: a dtype is not one of the above.

    Reference: Hendrycks & Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415.
    """
    return call("bias_gelu", x, bias)


def _check(x: Tensor, bias: Tensor) -> None:
    require_floating(x=x)
    require_dims(x, "x", "[T, N]")
    check_parameters("x", x, x.shape[1], bias=bias)


def _check_backward(grad: Tensor, x: Tensor, bias: Tensor) -> None:
    _check(x, bias)
    require_floating(x=x, grad=grad)
    if grad.shape != x.shape:
        raise ValueError(f"grad must be {list(x.shape)} as x, got shape {list(grad.shape)}")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return call("bias_gelu_backward", grad, *ctx.saved_tensors, checked=True)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


define("bias_gelu(Tensor x, Tensor bias) -> Tensor", check=_check, fake=lambda x, bias: x.new_empty(x.shape))
define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    check=_check_backward,
    fake=lambda grad, x, bias: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)
differentiable("bias_gelu", _backward, _setup, by="bias_gelu_backward")
