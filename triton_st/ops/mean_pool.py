"""Mean pooling of token states into sentence embeddings, for padded and for packed batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_st.ops._library import call, define, differentiable, require_device, require_dims, require_floating


def masked_mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Average the token states whose mask is not 0, as sentence-transformers' mean pooling does.

    Padding is never read: neither its cost nor its values (inf, NaN) reach the result. Sums are formed in float32.

    Args:
        hidden: token states [B, L, D]; float32, float16, bfloat16 (float64 by the reference).
        attention_mask: [B, L], bool or integer; 0 marks padding.

    Returns:
        Embeddings [B, D] in hidden's dtype; 0 for a row with no token.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: a dtype is not one of the above.

    Reference: Reimers & Gurevych, "Sentence-BERT", https://arxiv.org/abs/1908.10084, section 3.
    """
    return call("masked_mean_pool", hidden, attention_mask)


def packed_mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average each sequence of a packed batch: rows cu_seqlens[i] … cu_seqlens[i+1] − 1 give embedding i.

    Args:
        hidden: token states [T, D]; float32, float16, bfloat16 (float64 by the reference).
        cu_seqlens: [B + 1], int32 or int64: 0, then the running total of sequence lengths, ending at T.

    Returns:
        Embeddings [B, D] in hidden's dtype; 0 for an empty sequence.

    Raises:
        ValueError: shapes or devices do not fit; on CPU also if cu_seqlens does not start at 0, descends, or does not
            end at T (on a GPU that check would wait for the device). TypeError: a dtype is not one of the above.
    """
    return call("packed_mean_pool", hidden, cu_seqlens)


def _check_mask(attention_mask: Tensor) -> None:
    require_dims(attention_mask, "attention_mask", "[B, L]")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integer, got {attention_mask.dtype}")


def _check_masked(hidden: Tensor, attention_mask: Tensor) -> None:
    require_floating(hidden=hidden)
    require_dims(hidden, "hidden", "[B, L, D]")
    _check_mask(attention_mask)
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(f"attention_mask must be {list(hidden.shape[:2])}, got shape {list(attention_mask.shape)}")
    require_device("hidden", hidden, attention_mask=attention_mask)


def _check_masked_backward(grad: Tensor, attention_mask: Tensor) -> None:
    require_floating(grad=grad)
    require_dims(grad, "grad", "[B, D]")
    _check_mask(attention_mask)
    if grad.shape[0] != attention_mask.shape[0]:
        raise ValueError(f"grad must have {attention_mask.shape[0]} rows, got {grad.shape[0]}")


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """cu_seqlens is a vector of int32 or int64 with at least one entry; else ValueError or TypeError."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    require_dims(cu_seqlens, "cu_seqlens", "[B + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have at least one entry (0), got none")


def _check_packed(hidden: Tensor, cu_seqlens: Tensor) -> None:
    require_floating(hidden=hidden)
    require_dims(hidden, "hidden", "[T, D]")
    check_cu_seqlens(cu_seqlens)
    require_device("hidden", hidden, cu_seqlens=cu_seqlens)


def _check_packed_backward(grad: Tensor, cu_seqlens: Tensor, total_tokens: int) -> None:
    require_floating(grad=grad)
    require_dims(grad, "grad", "[B, D]")
    check_cu_seqlens(cu_seqlens)
    if grad.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(f"grad must have {cu_seqlens.shape[0] - 1} rows, got {grad.shape[0]}")


def check_cu_seqlens_values(cu_seqlens: Tensor, total_tokens: int) -> int:
    """The longest sequence; ValueError unless cu_seqlens starts at 0, never descends and ends at `total_tokens`."""
    offsets = cu_seqlens.numpy()  # numpy looks at a few numbers in a third of the time that torch takes
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
    if offsets[-1] != total_tokens:
        raise ValueError(f"cu_seqlens must end at {total_tokens}, the number of tokens, got {offsets[-1]}")
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError("cu_seqlens must not descend")
    return int((offsets[1:] - offsets[:-1]).max(initial=0))


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return call("packed_mean_pool_backward", grad, cu_seqlens, ctx.total_tokens, checked=True), None


def _packed_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    hidden, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.total_tokens = hidden.shape[0]


def _masked_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (attention_mask,) = ctx.saved_tensors
    return call("masked_mean_pool_backward", grad, attention_mask, checked=True), None


def _masked_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


define(
    "masked_mean_pool(Tensor hidden, Tensor attention_mask) -> Tensor",
    check=_check_masked,
    kernel_checks=True,
    fake=lambda hidden, attention_mask: hidden.new_empty(hidden.shape[0], hidden.shape[2]),
)
define(
    "masked_mean_pool_backward(Tensor grad, Tensor attention_mask) -> Tensor",
    check=_check_masked_backward,
    fake=lambda grad, attention_mask: grad.new_empty(*attention_mask.shape, grad.shape[1]),
)
differentiable("masked_mean_pool", _masked_backward, _masked_setup, by="masked_mean_pool_backward")

define(
    "packed_mean_pool(Tensor hidden, Tensor cu_seqlens) -> Tensor",
    check=_check_packed,
    check_values=lambda hidden, cu_seqlens: check_cu_seqlens_values(cu_seqlens, len(hidden)),
    kernel_checks=True,
    fake=lambda hidden, cu_seqlens: hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1]),
)
define(
    "packed_mean_pool_backward(Tensor grad, Tensor cu_seqlens, SymInt total_tokens) -> Tensor",
    check=_check_packed_backward,
    check_values=lambda grad, cu_seqlens, total_tokens: check_cu_seqlens_values(cu_seqlens, total_tokens),
    fake=lambda grad, cu_seqlens, total_tokens: grad.new_empty(total_tokens, grad.shape[1]),
)
differentiable("packed_mean_pool", _packed_backward, _packed_setup, by="packed_mean_pool_backward")
