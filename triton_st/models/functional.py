"""The encoder's products: linear layers and the feed-forward block.

One rule serves every precision: parameters are float32 masters, activations are stored in the activation dtype, and
sums run in float32. On CPU:

* float32 products go to oneDNN, which is twice as fast as MKL's `F.linear` on AMD processors and as fast on others;
* float16 products are emulated by both libraries (20 GFLOP/s), so float16 is storage only: the operand is widened,
  the product and the weight gradient are float32;
* bfloat16 has a native product with float32 accumulation; it rounds a weight gradient once, after accumulating.

On other devices the weight is cast to the activation dtype and the library's own product runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_st import ops
from triton_st.ops._library import call
from triton_st.reference.normalize import widen

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_WEIGHT_GRADIENT_SIZE = 128 * 1024
"""Weights with more elements get their gradient from oneDNN; below, transposing for it costs more than it saves."""

_SIDE_BY_SIDE_SIZE = 32 * 1024
"""Fewer elements are copied faster than the place of each part is looked up."""

_LARGEST_HALF = torch.finfo(torch.float16).max


def _compute_dtype(x: Tensor) -> torch.dtype:
    """dtype in which a product of x runs; float16 on CPU is storage only."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _use_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # torch.compile picks a product by itself, and cannot lower this one at all sizes
        return False
    return _ONEDNN and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias."""
    if _use_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, N], x [T, K] -> float32 (or float64) [N, K]."""
    if _use_onednn(x) and x.dtype == torch.float32 and grad.shape[1] * x.shape[1] > _ONEDNN_WEIGHT_GRADIENT_SIZE:
        return torch.ops.mkldnn._linear_pointwise(grad.t(), x.t(), None, "none", [], "")
    return widen(grad.t() @ x)


def store(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to the storage dtype. A finite value past float16's range is stored as its largest; inf and NaN stay."""
    if dtype == torch.float16 and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        low, high = x.aminmax()
        if _LARGEST_HALF < max(-low.item(), high.item()) < float("inf"):
            x = x.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return x.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        compute = _compute_dtype(x)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        bias = None if bias is None else bias.to(compute)
        return store(_product(x.to(compute), weight.to(compute), bias), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        compute = _compute_dtype(x)
        grad = grads[0].to(compute)
        grad_x = _product(grad, weight.to(compute).t()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad, x.to(compute)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0, dtype=weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, as_computed: bool = False) -> Tensor:
    """x @ weight.T + bias with float32 parameters and activations in any dtype.

    Args:
        x: activations [T, K], any floating dtype.
        weight: [N, K], float32 (float64 if x is).
        bias: [N], as weight.
        as_computed: the result in the dtype of the product, which on CPU is float32 for float16: for what is about to
            be added to something, so that no sum overflows.

    Returns:
        [T, N] in x's dtype. Weight and bias gradients are accumulated in and returned as the parameters' dtype.
    """
    return _Linear.apply(x, weight, bias, _compute_dtype(x) if as_computed else x.dtype)


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        return _side_by_side(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0].split(ctx.rows)


def joined(*parts: Tensor) -> Tensor:
    """Parameters one below the other, as `torch.cat` gives them, without copying large ones at every step.

    The first call lays the parameters' data side by side in one memory, where it stays: an optimizer works on it in
    place. Moving or loading parameters takes it apart, and the next call lays it anew. Three weights of [384, 384] take
    12 µs so and 210 µs by copying, with their gradients 490 and 1,340 µs (measured on two cores).

    Args:
        parts: [n_i, ...], of one dtype on one device, equal in all dimensions but the first.

    Returns:
        [sum of n_i, ...]; its gradient reaches the parts as slices of one tensor.
    """
    small = sum(part.numel() for part in parts) < _SIDE_BY_SIDE_SIZE
    if small or torch.compiler.is_compiling():  # which sees no addresses
        return torch.cat(parts)
    return _Joined.apply(*parts)


def _side_by_side(parts: tuple[Tensor, ...]) -> Tensor:
    first = parts[0]
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    if not _are_side_by_side(parts):
        with torch.inference_mode(False):  # the parameters are to be trained
            together = torch.cat([part.detach() for part in parts])
            for part, data in zip(parts, together.split([len(part) for part in parts]), strict=True):
                part.data = data
        return together
    return first.detach().as_strided(shape, first.stride())


def _are_side_by_side(parts: tuple[Tensor, ...]) -> bool:
    storage = parts[0].untyped_storage().data_ptr()
    address = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != address or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return False
        address += part.numel() * part.element_size()
    return True


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        compute = _compute_dtype(x)
        pre = _product(x.to(compute), w1.to(compute))
        ctx.save_for_backward(x, store(pre, x.dtype), w1, b1, w2)
        return _product(ops.bias_gelu(pre, b1), w2.to(compute))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, w1, b1, w2 = ctx.saved_tensors
        compute = _compute_dtype(x)
        grad, pre = grads[0].to(compute), pre.to(compute)
        grad_w2 = _weight_gradient(grad, ops.bias_gelu(pre, b1)).to(w2.dtype)
        grad_pre, grad_b1 = call("bias_gelu_backward", _product(grad, w2.to(compute).t()), pre, b1, checked=True)
        grad_w1 = _weight_gradient(grad_pre, x.to(compute)).to(w1.dtype)
        grad_x = _product(grad_pre, w1.to(compute).t()).to(x.dtype)
        return grad_x, grad_w1, grad_b1, grad_w2


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """gelu(x @ w1.T + b1) @ w2.T with the exact (erf) GELU; its last bias is for the caller to add.

    Only x and the first product are kept for backward, in x's dtype; the activation is recomputed.

    Args:
        x: activations [T, D], any floating dtype.
        w1, b1: [I, D], [I]; w2: [D, I]; float32 (float64 if x is).

    Returns:
        [T, D] in the dtype of the product, which on CPU is float32 for float16, so that no sum overflows.

    Reference: Hendrycks & Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415.
    """
    return _FeedForward.apply(x, w1, b1, w2)


class _FixedRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()  # it may be shared, or one number expanded
        grad[ctx.row] = 0
        return grad, None


def fixed_row(table: Tensor, row: int | None, ids: Tensor) -> Tensor:
    """The table [V, D], whose `row` gets no gradient: `nn.Embedding`'s padding_idx, for operators.

    The gradient is copied for it, so the table itself is returned where the rows that are looked up, `ids`, are known
    not to hold `row`: on CPU, where looking costs nothing.
    """
    if row is None or not table.requires_grad:
        return table
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((ids == row).any()):
        return table
    return _FixedRow.apply(table, row)
