"""The matrix of cosines of the rows of two matrices."""

from __future__ import annotations

from torch import Tensor

from triton_st.reference.normalize import normalize, normalize_backward, widen


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b. a [M, D], b [N, D] -> [M, N]."""
    return (normalize(a) @ normalize(b).T).to(a.dtype)


def cosine_similarity_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """grad [M, N] -> gradients of a [M, D] and of b [N, D]."""
    grad = widen(grad)
    return normalize_backward(grad @ normalize(b), a), normalize_backward(grad.T @ normalize(a), b)
