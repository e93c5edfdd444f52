"""The matrix of cosine similarities between two sets of vectors, normalisation fused into the product."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triton_st.ops._library import call, define, differentiable, require_dims, require_floating


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a with every row of b, as sentence-transformers' `util.cos_sim`.

    Neither input is ever written out normalised; products are summed in float32. A row is divided by
    max(‖row‖, 1e-12), added up without overflow at any finite size; a zero row has similarity 0 and gradient 0.

    Args:
        a: [M, D]; float32, float16, bfloat16 (float64 by the reference).
        b: [N, D], a's dtype and device.

    Returns:
        Similarities [M, N] in a's dtype.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: dtypes are not floating or differ.
    """
    return call("cosine_similarity", a, b)


def _check(a: Tensor, b: Tensor) -> None:
    require_floating(a=a, b=b)
    require_dims(a, "a", "[M, D]")
    require_dims(b, "b", "[N, D]")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have rows of one length D, got {a.shape[1]} and {b.shape[1]}")


def _check_backward(grad: Tensor, a: Tensor, b: Tensor) -> None:
    _check(a, b)
    require_floating(a=a, grad=grad)
    if grad.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"grad must be {[a.shape[0], b.shape[0]]}, got shape {list(grad.shape)}")


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return call("cosine_similarity_backward", grad, *ctx.saved_tensors, checked=True)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


define(
    "cosine_similarity(Tensor a, Tensor b) -> Tensor",
    check=_check,
    fake=lambda a, b: a.new_empty(a.shape[0], b.shape[0]),
)
define(
    "cosine_similarity_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)",
    check=_check_backward,
    fake=lambda grad, a, b: (a.new_empty(a.shape), b.new_empty(b.shape)),
)
differentiable("cosine_similarity", _backward, _setup, by="cosine_similarity_backward")
