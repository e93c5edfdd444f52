"""A whole transformer layer in one operator: on CPU, a few sequences at a time go through it while in the caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_st import backend
from triton_st.ops._checks import check_dropout, check_eps, check_max_seqlen
from triton_st.ops._library import call, define, differentiable, require_device, require_dims, require_floating
from triton_st.ops.bias_gelu import bias_gelu
from triton_st.ops.dropout_add_layer_norm import dropout_add_layer_norm
from triton_st.ops.layer_norm_mean_pool import layer_norm_mean_pool
from triton_st.ops.mean_pool import check_cu_seqlens, check_cu_seqlens_values, packed_mean_pool
from triton_st.ops.packed_attention import (
    MAX_HEAD_SIZE,
    check_relative_bias,
    empty_bias_gradient,
    packed_attention,
)
from triton_st.reference.bert_layer import BertLayerParameters

_COUNT = len(BertLayerParameters._fields)
_KEPT = ("qkv", "lse", "attended", "norm1", "rstd1", "pre", "norm2", "rstd2")
_IN_BACKWARD = tuple(
    name for name in BertLayerParameters._fields if name.endswith("weight") or name == "attention_norm_bias"
)


def bert_layer(
    hidden: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    parameters: BertLayerParameters,
    heads: int,
    eps: float,
    *,
    attention_dropout_p: float = 0.0,
    projection_dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    pool: bool = False,
    relative_bias: Tensor | None = None,
) -> Tensor:
    """Self-attention and the feed-forward block, each with dropout, residual sum and LayerNorm after it.

    Sums, softmax, GELU and statistics are float32; products have weights rounded to hidden's dtype (float16 on CPU: not
    rounded). On CPU one operator does it all. Kept for its gradient, per token and in hidden's dtype: queries, keys
    and values (3 · D), attention's result (D), both sums normalised (2 · D) and the input of GELU (I); GELU, the first
    LayerNorm's result, scores and dropout are computed again. On a GPU the layer is composed of the operators
    `packed_attention`, `dropout_add_layer_norm` and `bias_gelu`; with `pool` it ends in `layer_norm_mean_pool`, and the
    hidden states are never written.

    Args:
        hidden: [T, D]; float32, float16, bfloat16 (float64 by the reference).
        cu_seqlens: [B + 1], int32 or int64: 0, then the running total of sequence lengths, ending at T.
        max_seqlen: at least the longest sequence's length.
        parameters: float32 (float64 if hidden is); shapes as `BertLayerParameters` has them.
        heads: number of attention heads, a divisor of D; heads of at most 128 elements.
        eps: added to LayerNorm's variances, in float32.
        attention_dropout_p, projection_dropout_p, hidden_dropout_p: probabilities of dropping an attention weight, an
            element of the attention block's result and one of the feed-forward block's.
        seed: int64, one element, on hidden's device; needed where a probability is not 0.
        stream: names the layer: attention drops at stream, the projection at stream + 1, the feed-forward block at
            stream + 2.
        pool: give the mean of each sequence instead: of a model's last layer, all that its embeddings need.
        relative_bias: [H, 2 P - 1], added to attention's scores: see `packed_attention`.

    Returns:
        [T, D] in hidden's dtype; with `pool` [B, D], 0 for an empty sequence.

    Raises:
        ValueError: shapes or devices do not fit, heads do not divide D, a probability is none; on CPU also if
            cu_seqlens or max_seqlen are not as above. TypeError: a dtype is not one of the above.

    Reference: Devlin et al., "BERT", https://arxiv.org/abs/1810.04805.
    """
    settings = (attention_dropout_p, projection_dropout_p, hidden_dropout_p, stream)
    if hidden.device.type == "cpu" and (torch.compiler.is_compiling() or backend.select(hidden) != "triton"):
        keep = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (hidden, relative_bias, *parameters)
        )
        out = call(
            "bert_layer_forward", hidden, cu_seqlens, seed, *parameters, max_seqlen, heads, eps, *settings, keep,
            relative_bias,
        )[0]  # fmt: skip
        return packed_mean_pool(out, cu_seqlens) if pool else out
    _check(hidden, cu_seqlens, seed, *parameters, max_seqlen, heads, eps, *settings, True, relative_bias)
    p = parameters
    qkv = F.linear(hidden, p.qkv_weight.to(hidden.dtype), p.qkv_bias.to(hidden.dtype))
    qkv = qkv.view(hidden.shape[0], 3, heads, hidden.shape[1] // heads)
    attended = packed_attention(qkv, cu_seqlens, max_seqlen, attention_dropout_p, seed, stream, relative_bias)
    middle = dropout_add_layer_norm(
        F.linear(attended, p.projection_weight.to(hidden.dtype)),
        hidden,
        p.attention_norm_weight,
        p.attention_norm_bias,
        eps,
        x_bias=p.projection_bias,
        dropout_p=projection_dropout_p,
        seed=seed,
        stream=stream + 1,
    )
    activated = bias_gelu(F.linear(middle, p.up_weight.to(hidden.dtype)), p.up_bias)
    down = F.linear(activated, p.down_weight.to(hidden.dtype))
    norm = (p.output_norm_weight, p.output_norm_bias, eps)
    end: dict[str, Any] = {"x_bias": p.down_bias, "dropout_p": hidden_dropout_p, "seed": seed, "stream": stream + 2}
    if pool:
        return layer_norm_mean_pool(down, middle, *norm, cu_seqlens, **end)
    return dropout_add_layer_norm(down, middle, *norm, **end)


def _parameter_shapes(hidden: int, inner: int) -> dict[str, list[int]]:
    d, n = hidden, inner
    shapes = ([3 * d, d], [3 * d], [d, d], [d], [d], [d], [n, d], [n], [d, n], [d], [d], [d])
    return dict(zip(BertLayerParameters._fields, shapes, strict=True))


def _check_parameters(hidden: Tensor, inner: int, parameters: dict[str, Tensor]) -> None:
    dtype, shapes = torch.promote_types(hidden.dtype, torch.float32), _parameter_shapes(hidden.shape[1], inner)
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
        if parameter.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} with hidden in {hidden.dtype}, got {parameter.dtype}")
        if list(parameter.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got shape {list(parameter.shape)}")
        require_device("hidden", hidden, **{name: parameter})


def _check(hidden: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *rest: Any) -> None:
    parameters = BertLayerParameters(*rest[:_COUNT])
    max_seqlen, heads, eps, *dropouts, _, _, relative_bias = rest[_COUNT:]
    require_floating(hidden=hidden)
    require_dims(hidden, "hidden", "[T, D]")
    check_cu_seqlens(cu_seqlens)
    require_device("hidden", hidden, cu_seqlens=cu_seqlens)
    check_max_seqlen(max_seqlen)
    if heads < 1 or hidden.shape[1] == 0 or hidden.shape[1] % heads:
        raise ValueError(f"heads must divide hidden's row length {hidden.shape[1]}, got {heads}")
    if hidden.shape[1] // heads > MAX_HEAD_SIZE:
        raise ValueError(f"heads must have at most {MAX_HEAD_SIZE} elements, got {hidden.shape[1] // heads}")
    require_dims(parameters.up_weight, "up_weight", "[I, D]")
    _check_parameters(hidden, parameters.up_weight.shape[0], parameters._asdict())
    check_eps(eps)
    check_relative_bias(relative_bias, heads, max_seqlen, hidden, "hidden")
    for p in dropouts:
        check_dropout(p, seed, hidden.device)


def _check_values(hidden: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *rest: Any) -> None:
    longest, max_seqlen = check_cu_seqlens_values(cu_seqlens, len(hidden)), rest[_COUNT]
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the longest sequence's length, got {max_seqlen}")


def _kept_shapes(hidden: Tensor, inner: int, heads: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    size = hidden.shape[1]
    rows, row = (tokens, size), (tokens,)
    return (tokens, 3, heads, size // heads), (heads, tokens), rows, rows, row, (tokens, inner), rows, row


def _fake(hidden: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    up_weight, heads, keep = BertLayerParameters(*rest[:_COUNT]).up_weight, rest[_COUNT + 1], rest[-2]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shapes = _kept_shapes(hidden, up_weight.shape[0], heads, hidden.shape[0] if keep else 0)
    dtypes = [wide if name in ("lse", "rstd1", "rstd2") else hidden.dtype for name in _KEPT]
    kept = (hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return hidden.new_empty(hidden.shape), *kept


def _check_backward(grad: Tensor, hidden: Tensor, *rest: Any) -> None:
    kept, (cu_seqlens, seed), rest = rest[: len(_KEPT)], rest[len(_KEPT) : len(_KEPT) + 2], rest[len(_KEPT) + 2 :]
    parameters = dict(zip(_IN_BACKWARD, rest[: len(_IN_BACKWARD)], strict=True))
    max_seqlen, *dropouts, _, relative_bias = rest[len(_IN_BACKWARD) :]
    require_floating(hidden=hidden, grad=grad)
    require_dims(hidden, "hidden", "[T, D]")
    if grad.shape != hidden.shape:
        raise ValueError(f"grad must be {list(hidden.shape)} as hidden, got shape {list(grad.shape)}")
    check_cu_seqlens(cu_seqlens)
    check_max_seqlen(max_seqlen)
    require_dims(kept[0], "qkv", "[T, 3, H, d]")
    require_dims(parameters["up_weight"], "up_weight", "[I, D]")
    inner = parameters["up_weight"].shape[0]
    _check_parameters(hidden, inner, parameters)
    shapes = _kept_shapes(hidden, inner, kept[0].shape[2], hidden.shape[0])
    for name, tensor, shape in zip(_KEPT, kept, shapes, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {list(tensor.shape)}")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = wide if name in ("lse", "rstd1", "rstd2") else hidden.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} with hidden in {hidden.dtype}, got {tensor.dtype}")
        require_device("hidden", hidden, **{name: tensor})
    check_relative_bias(relative_bias, kept[0].shape[2], max_seqlen, hidden, "hidden")
    for p in dropouts:
        check_dropout(p, seed, hidden.device)


def _check_backward_values(grad: Tensor, hidden: Tensor, *rest: Any) -> None:
    longest, max_seqlen = (
        check_cu_seqlens_values(rest[len(_KEPT)], len(hidden)),
        rest[len(_KEPT) + 2 + len(_IN_BACKWARD)],
    )
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the longest sequence's length, got {max_seqlen}")


def _fake_backward(grad: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters = dict(zip(_IN_BACKWARD, rest[len(_KEPT) + 2 :], strict=False))
    up_weight, size = parameters["up_weight"], hidden.shape[1]
    shapes = _parameter_shapes(size, up_weight.shape[0])
    grads = (up_weight.new_empty(shape) for shape in shapes.values())
    return hidden.new_empty(hidden.shape), *grads, empty_bias_gradient(rest[-1], rest[0].shape[2], hidden)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, cu_seqlens, seed, *rest = inputs
    parameters = BertLayerParameters(*rest[:_COUNT])._asdict()
    max_seqlen, _, _, *dropouts, stream, _, relative_bias = rest[_COUNT:]
    ctx.settings = (max_seqlen, *dropouts, stream)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, *output[1:], cu_seqlens, seed, *(parameters[name] for name in _IN_BACKWARD), relative_bias
    )


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return (None,) * (3 + _COUNT) + nothing + (None,)
    *saved, relative_bias = ctx.saved_tensors
    grad_hidden, *grads, grad_bias = call(
        "bert_layer_backward", grad, *saved, *ctx.settings, relative_bias, checked=True
    )
    return grad_hidden, None, None, *grads, *nothing, None if relative_bias is None else grad_bias


def _tensors(names: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor {name}" for name in names)


define(
    f"bert_layer_forward(Tensor hidden, Tensor cu_seqlens, Tensor? seed, {_tensors(BertLayerParameters._fields)},"
    " SymInt max_seqlen, int heads, float eps, float attention_dropout_p, float projection_dropout_p,"
    f" float hidden_dropout_p, int stream, bool keep, Tensor? relative_bias) -> (Tensor out, {_tensors(_KEPT)})",
    check=_check,
    check_values=_check_values,
    fake=_fake,
)
define(
    f"bert_layer_backward(Tensor grad, Tensor hidden, {_tensors(_KEPT)}, Tensor cu_seqlens, Tensor? seed,"
    f" {_tensors(_IN_BACKWARD)}, SymInt max_seqlen, float attention_dropout_p, float projection_dropout_p,"
    f" float hidden_dropout_p, int stream, Tensor? relative_bias) -> ({', '.join(['Tensor'] * (2 + _COUNT))})",
    check=_check_backward,
    check_values=_check_backward_values,
    fake=_fake_backward,
)
differentiable("bert_layer_forward", _backward, _setup, by="bert_layer_backward")
