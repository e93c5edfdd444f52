"""BERT's embeddings in one pass: word, position and token-type rows gathered, summed, normalised and dropped out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_st.ops._checks import check_dropout, check_eps, check_parameters
from triton_st.ops._library import DTYPES, call, define, differentiable, require_device, require_dims, require_floating
from triton_st.ops.mean_pool import check_cu_seqlens, check_cu_seqlens_values


def embedding_layer_norm(
    input_ids: Tensor,
    cu_seqlens: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    token_type_ids: Tensor | None = None,
    position_offset: int = 0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[id] + position[place in its sequence + position_offset] + token_type[type])).

    Element (t, k) drops as number t · round_up(D, 4) + k: see `triton_st.reference.philox`. The gradients are float32
    sums in the order of tokens, repeatable bit for bit.

    Args:
        input_ids: [T], int64 or int32.
        cu_seqlens: [B + 1], int32 or int64: 0, then the running total of sequence lengths, ending at T.
        word: [V, D], float32 (float64 by the reference).
        position: [P, D], as word.
        token_type: [N, D], as word; None for models that have none.
        weight: LayerNorm's scale [D], as word.
        bias: LayerNorm's offset [D], as word.
        eps: added to the variance, in float32.
        token_type_ids: [T], int64 or int32; all 0 by default.
        position_offset: row of a sequence's first token: padding_idx + 1 for RoBERTa, else 0.
        dropout_p: probability of dropping an element of the result.
        seed: int64, one element, on word's device; needed where dropout_p is not 0.
        stream: names the place in the model, so that no two places drop alike under one seed.
        dtype: of the result; word's by default.

    Returns:
        [T, D] in `dtype`. A finite value past float16's range becomes its largest.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, dropout_p is no probability; on CPU also if
            cu_seqlens is not as above, or an id, type or position lies outside its table (on a GPU that check would
            wait for the device). TypeError: a dtype is not one of the above.

    Reference: Devlin et al., "BERT", https://arxiv.org/abs/1810.04805.
    """
    if dtype is None and isinstance(word, Tensor):
        dtype = word.dtype
    return call(
        "embedding_layer_norm_forward",
        word,
        position,
        token_type,
        weight,
        bias,
        input_ids,
        cu_seqlens,
        token_type_ids,
        seed,
        position_offset,
        eps,
        dropout_p,
        stream,
        dtype,
    )[0]


_IDS = (torch.int64, torch.int32)


def _check_tables(word: Tensor, position: Tensor, token_type: Tensor | None) -> None:
    tables = {"word": word, "position": position}
    if token_type is not None:
        tables["token_type"] = token_type
    require_floating(**tables)
    if word.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"word must be float32 or float64, got {word.dtype}; half precision is chosen by dtype")
    for name, table in tables.items():
        require_dims(table, name, "[rows, D]")
        if table.shape[1] != word.shape[1]:
            raise ValueError(f"{name} must have rows of {word.shape[1]} elements as word, got {table.shape[1]}")
    if word.shape[1] == 0:
        raise ValueError(f"word must have rows of at least one element, got shape {list(word.shape)}")


def _check_ids(word: Tensor, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None) -> None:
    for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
        if ids.dtype not in _IDS:
            raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
        require_dims(ids, name, "[T]")
        if ids.shape != input_ids.shape:
            raise ValueError(f"{name} must be {list(input_ids.shape)} as input_ids, got shape {list(ids.shape)}")
        require_device("word", word, **{name: ids})
    check_cu_seqlens(cu_seqlens)
    require_device("word", word, cu_seqlens=cu_seqlens)


def _check(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    eps: float,
    dropout_p: float,
    stream: int,
    dtype: torch.dtype,
) -> None:
    _check_tables(word, position, token_type)
    check_parameters("word", word, word.shape[1], weight=weight, bias=bias)
    _check_ids(word, input_ids, cu_seqlens, token_type_ids)
    if position_offset < 0:
        raise ValueError(f"position_offset must be at least 0, got {position_offset}")
    check_eps(eps)
    check_dropout(dropout_p, seed, word.device)
    if dtype not in DTYPES or torch.promote_types(dtype, torch.float32) != word.dtype:
        raise TypeError(f"dtype must be floating-point of 16 bits or {word.dtype} with word in it, got {dtype}")


def _check_range(name: str, ids: Tensor, size: int, table: str) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must be from 0 to {size - 1}, the rows of {table}, got {low if low < 0 else high}")


def _check_values(
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    position_offset: int,
) -> None:
    longest = check_cu_seqlens_values(cu_seqlens, len(input_ids))
    if longest and longest + position_offset > len(position):
        raise ValueError(
            f"cu_seqlens must give sequences of at most {max(len(position) - position_offset, 0)} tokens (position has "
            f"{len(position)} rows, position_offset is {position_offset}), got one of {longest}"
        )
    _check_range("input_ids", input_ids, len(word), "word")
    if token_type is not None:
        if token_type_ids is not None:
            _check_range("token_type_ids", token_type_ids, len(token_type), "token_type")
        elif len(token_type) == 0 and len(input_ids):
            raise ValueError("token_type must have at least one row, got none")


def _check_forward_values(word: Tensor, position: Tensor, token_type: Tensor | None, *rest: Any) -> None:
    input_ids, cu_seqlens, token_type_ids, _, position_offset = rest[2:7]
    _check_values(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset)


def _check_backward_values(grad: Tensor, word: Tensor, position: Tensor, token_type: Tensor | None, *rest: Any) -> None:
    input_ids, cu_seqlens, token_type_ids, _, position_offset = rest[3:8]
    _check_values(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset)


def _check_backward(
    grad: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None,
    seed: Tensor | None,
    position_offset: int,
    dropout_p: float,
    stream: int,
) -> None:
    _check_tables(word, position, token_type)
    check_parameters("word", word, word.shape[1], weight=weight)
    _check_ids(word, input_ids, cu_seqlens, token_type_ids)
    check_parameters("word", word, input_ids.shape[0], mean=mean, rstd=rstd)
    check_dropout(dropout_p, seed, word.device)
    require_floating(grad=grad)
    require_device("word", word, grad=grad)
    if list(grad.shape) != [input_ids.shape[0], word.shape[1]]:
        raise ValueError(f"grad must be {[input_ids.shape[0], word.shape[1]]}, got shape {list(grad.shape)}")


def _fake(word: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    input_ids, dtype = rest[4], rest[-1]
    tokens = input_ids.shape[0]
    return word.new_empty(tokens, word.shape[1], dtype=dtype), word.new_empty(tokens), word.new_empty(tokens)


def _fake_backward(
    grad: Tensor, word: Tensor, position: Tensor, token_type: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    rows = 0 if token_type is None else token_type.shape[0]
    return (
        word.new_empty(word.shape),
        position.new_empty(position.shape),
        word.new_empty(rows, word.shape[1]),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    word, position, token_type, weight, _, input_ids, cu_seqlens, token_type_ids, seed = inputs[:9]
    position_offset, _, dropout_p, stream, _ = inputs[9:]
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(word, position, token_type, weight, mean, rstd, input_ids, cu_seqlens, token_type_ids, seed)
    ctx.settings = position_offset, dropout_p, stream
    ctx.has_token_type = token_type is not None


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = call("embedding_layer_norm_backward", grad, *ctx.saved_tensors, *ctx.settings, checked=True)
    return *grads[:2], grads[2] if ctx.has_token_type else None, *grads[3:], *(None,) * 9


define(
    "embedding_layer_norm_forward(Tensor word, Tensor position, Tensor? token_type, Tensor weight, Tensor bias,"
    " Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor? seed, int position_offset, float eps,"
    " float dropout_p, int stream, ScalarType dtype) -> (Tensor out, Tensor mean, Tensor rstd)",
    check=_check,
    check_values=_check_forward_values,
    fake=_fake,
)
define(
    "embedding_layer_norm_backward(Tensor grad, Tensor word, Tensor position, Tensor? token_type, Tensor weight,"
    " Tensor mean, Tensor rstd, Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor? seed,"
    " int position_offset, float dropout_p, int stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_backward,
    check_values=_check_backward_values,
    fake=_fake_backward,
)
differentiable("embedding_layer_norm_forward", _backward, _setup, by="embedding_layer_norm_backward")
