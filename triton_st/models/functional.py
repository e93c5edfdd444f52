"""The dense inner parts of the encoder: products, feed-forward, and dropout + residual + LayerNorm.

One rule serves every precision: parameters are float32 masters, activations are stored in the activation dtype, and
arithmetic that loses digits (LayerNorm, residual sums, GELU) runs in float32. On CPU:

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

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_WEIGHT_GRADIENT_SIZE = 128 * 1024
"""Weights with more elements get their gradient from oneDNN; below, transposing for it costs more than it saves."""

_LARGEST_HALF = torch.finfo(torch.float16).max


def widen(x: Tensor) -> Tensor:
    """Half precision as float32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _compute_dtype(x: Tensor) -> torch.dtype:
    """dtype in which a product of x runs; float16 on CPU is storage only."""
    return torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype


def _use_onednn(x: Tensor) -> bool:
    if torch.compiler.is_compiling():  # torch.compile picks a product by itself, and cannot lower this one at all sizes
        return False
    return _ONEDNN and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias; `activation` is "none" or "gelu" (erf)."""
    if _use_onednn(x):
        algorithm = "none" if activation == "gelu" else ""
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if activation == "gelu" else y


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype) -> Tensor:
        compute = _compute_dtype(x)
        ctx.save_for_backward(x, weight)
        return store(_product(x.to(compute), weight.to(compute), bias.to(compute)), out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        compute = _compute_dtype(x)
        grad = grads[0].to(compute)
        grad_x = _product(grad, weight.to(compute).t()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x.to(compute)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x @ weight.T + bias with float32 parameters and activations in any dtype.

    Args:
        x: activations [T, K], any floating dtype.
        weight: [N, K], float32 (float64 if x is).
        bias: [N], as weight.
        out_dtype: dtype of the result; x's by default.

    Returns:
        [T, N]. Weight and bias gradients are accumulated in and returned as the parameters' dtype.
    """
    return _Linear.apply(x, weight, bias, x.dtype if out_dtype is None else out_dtype)


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
    """Parameters one below the other, as `torch.cat` gives them, without copying them at every step.

    The first call lays the parameters' data side by side in one memory, where it stays: an optimizer works on it in
    place. Moving or loading parameters takes it apart, and the next call lays it anew.

    Args:
        parts: [n_i, ...], of one dtype on one device, equal in all dimensions but the first.

    Returns:
        [sum of n_i, ...]; its gradient reaches the parts as slices of one tensor.
    """
    if torch.compiler.is_compiling():  # which sees no addresses
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
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out_dtype: torch.dtype, keep: bool
    ) -> Tensor:
        compute = _compute_dtype(x)
        w1c, b1c, w2c, b2c = (p.to(compute) for p in (w1, b1, w2, b2))
        if not keep:  # nothing to remember: GELU runs as the first product's epilogue
            return store(_product(_product(x.to(compute), w1c, b1c, "gelu"), w2c, b2c), out_dtype)
        pre = _product(x.to(compute), w1c, b1c)
        y = store(_product(F.gelu(pre), w2c, b2c), out_dtype)
        ctx.save_for_backward(x, store(pre, x.dtype), w1, w2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, w1, w2 = ctx.saved_tensors
        compute = _compute_dtype(x)
        grad, pre = grads[0].to(compute), pre.to(compute)
        grad_w2 = _weight_gradient(grad, F.gelu(pre)).to(w2.dtype)
        grad_b2 = grad.sum(0, dtype=w2.dtype)
        grad_pre = torch.ops.aten.gelu_backward(_product(grad, w2.to(compute).t()), pre)
        grad_w1 = _weight_gradient(grad_pre, x.to(compute)).to(w1.dtype)
        grad_b1 = grad_pre.sum(0, dtype=w1.dtype)
        grad_x = _product(grad_pre, w1.to(compute).t()).to(x.dtype)
        return grad_x, grad_w1, grad_b1, grad_w2, grad_b2, None, None


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """gelu(x @ w1.T + b1) @ w2.T + b2 with the exact (erf) GELU.

    Only x and the pre-activation are kept for backward, in x's dtype; the activation is recomputed.

    Args:
        x: activations [T, D], any floating dtype.
        w1, b1: [I, D], [I]; w2, b2: [D, I], [D]; float32 (float64 if x is).
        out_dtype: dtype of the result; x's by default.

    Returns:
        [T, D].

    Reference: Hendrycks & Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415.
    """
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2))
    return _FeedForward.apply(x, w1, b1, w2, b2, x.dtype if out_dtype is None else out_dtype, keep)


def keep_mask(
    shape: tuple[int, ...] | torch.Size,
    p: float,
    seed: Tensor | None,
    stream: int,
    device: torch.device,
    offset: int = 0,
) -> tuple[Tensor, float]:
    """A dropout mask: True keeps. Returns it with the factor 1 / P(keep) that keeps the mean.

    The mask is a function of `seed` (an int64 scalar), `stream` (which place in the model) and `offset` alone, so that
    it can be drawn again. 16 random bits decide an element, drawn eight bytes at a time (`bernoulli_` draws one element
    at a time on one thread and took a third of a training step), so that P(drop) is p to within 2^-17; the factor is
    exact for it.
    """
    if seed is None:
        raise ValueError("seed: expected an int64 scalar tensor where dropout_p is not 0, got None")
    dropped = round(p * 65536)
    if dropped == 65536:
        return torch.zeros(shape, dtype=torch.bool, device=device), 0.0
    count = torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(hash((int(seed), stream, offset)) & (2**63 - 1))
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    mask = words.view(torch.int16)[:count].view(shape) >= dropped - 32768
    return mask, 65536 / (65536 - dropped)


def dropout(x: Tensor, p: float, seed: Tensor | None = None, stream: int = 0) -> Tensor:
    """Zero each element with probability p and scale the rest by 1 / (1 - p). Returns x itself for p = 0."""
    if p == 0.0:
        return x
    mask, factor = keep_mask(x.shape, p, seed, stream, x.device)
    return _Masked.apply(x, mask, factor)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.factor = factor
        return (x * mask).mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).mul_(ctx.factor), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        mask: Tensor | None,
        factor: float,
        keep: bool,
    ) -> Tensor:
        x_wide = widen(x)
        total = torch.add(residual, x_wide if mask is None else x_wide * mask, alpha=factor)
        y, mean, rstd = torch.ops.aten.native_layer_norm(total, [total.shape[1]], weight, bias, eps)
        if keep:
            if residual.dtype == total.dtype:
                ctx.save_for_backward(weight, bias, mask, total, mean, rstd)
            else:  # the normalised sum fits every half type, whatever the sum's range
                ctx.save_for_backward(weight, bias, mask, ((total - mean) * rstd).to(residual.dtype), None, rstd)
            ctx.factor = factor
            ctx.dtypes = x.dtype, residual.dtype
        return store(y, residual.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, mask, total, mean, rstd = ctx.saved_tensors
        grad = grads[0].to(rstd.dtype)
        shape = [total.shape[1]]
        native = torch.ops.aten.native_layer_norm_backward
        if mean is not None:
            grad_total, grad_weight, grad_bias = native(grad, total, shape, mean, rstd, weight, bias, [True] * 3)
        else:
            zeros, ones = torch.zeros_like(rstd), torch.ones_like(rstd)
            normalised = total.to(rstd.dtype)
            grad_total, grad_weight, grad_bias = native(grad, normalised, shape, zeros, ones, weight, bias, [True] * 3)
            grad_total = grad_total * rstd
        grad_x = grad_total
        if mask is not None:
            grad_x = (grad_total * mask).mul_(ctx.factor)
        x_dtype, residual_dtype = ctx.dtypes
        return grad_x.to(x_dtype), grad_total.to(residual_dtype), grad_weight, grad_bias, None, None, None, None


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """LayerNorm(dropout(x) + residual); the sum and the statistics are float32 and never stored in half.

    Args:
        x: [T, D], any floating dtype; float32 keeps a product's full range.
        residual: [T, D]; its dtype is the result's.
        weight, bias: [D], float32 (float64 if x is).
        eps: added to the variance, in float32.
        dropout_p: probability of dropping an element of x.
        seed, stream: of the random numbers, see `keep_mask`.

    Returns:
        [T, D] in residual's dtype.
    """
    mask, factor = keep_mask(x.shape, dropout_p, seed, stream, x.device) if dropout_p > 0.0 else (None, 1.0)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight, bias))
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, mask, factor, keep)
