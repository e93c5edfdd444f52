"""Rows of length 1, the base of every similarity; and the widening that all of the reference shares."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
"""Smallest norm that a vector is divided by, as `torch.nn.functional.normalize` and sentence-transformers have it."""


def widen(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; a finite value past float16's range becomes its largest, inf and NaN stay. For activations alone:
    a gradient that overflows must show, so that loss scaling sees it.
    """
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        x = torch.where(x.isinf(), x, x.clamp(-largest, largest))
    return x.to(dtype)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x times a power of two that brings each near 1, so that no square overflows; and those powers [N, 1]."""
    x = widen(x)
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    exponent = torch.frexp(largest.nan_to_num(0, 0, 0)).exponent.clamp(-100, 120)
    power = torch.ldexp(torch.ones_like(largest), -exponent)
    return x * power, power


def normalize(x: Tensor) -> Tensor:
    """x / max(‖x‖₂, EPS) row by row, widened. A zero row stays zero and has gradient zero."""
    scaled, power = _scaled(x)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, scaled / norm.clamp_min(EPS * power))


def normalize_backward(grad_unit: Tensor, x: Tensor) -> Tensor:
    """Gradient of x [N, D] from the gradient of `normalize(x)`, in x's dtype."""
    scaled, power = _scaled(x)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    floor = EPS * power
    unit = scaled / norm.clamp_min(floor)
    radial = torch.where(norm < floor, 0, (grad_unit * unit).sum(-1, keepdim=True))
    grad = (grad_unit - unit * radial) / norm.clamp_min(floor) * power
    return torch.where(norm == 0, 0, grad).to(x.dtype)
