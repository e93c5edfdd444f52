"""GELU of a product's result plus its bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from triton_st.reference.normalize import saturate, widen


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact (erf) GELU. x [T, N], bias [N] -> [T, N]."""
    return saturate(F.gelu(widen(x) + bias), x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, N] and bias [N]."""
    grad_x = aten.gelu_backward(widen(grad), widen(x) + bias)
    return grad_x.to(x.dtype), grad_x.sum(0)
