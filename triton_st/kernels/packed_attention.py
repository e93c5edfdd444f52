"""Attention within each sequence of a packed batch, with an online softmax; nothing quadratic is ever stored.

A program owns a run of tokens, whatever sequences they belong to, and walks along the keys of those sequences and no
others; a mask by sequence makes the tile block-diagonal. So short sequences share a tile and long ones waste none.

Weight 0 times NaN is NaN: what is not finite in one sequence can make those that share its tile NaN too, which the
C++ kernels keep apart. Doing such tiles again sequence by sequence costs up to a hundred spilled registers.

Dropout draws four neighbouring keys with one call of Philox. For that keys are laid out in slots: each sequence begins
at a slot that is a multiple of 4. Within a tile, keys are permuted (softmax does not mind) so that the four words stand
a quarter of the tile apart: there each thread of a matrix product already holds what belongs together.

Backward: one kernel owns queries (their gradients), one owns keys and values; each sums in a fixed order. A bias by
relative position has a third for its gradient, which walks along distances instead of keys: a sum along the diagonals
of a tile would need atomics, or the tile in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_st.kernels.common import Call, Tile, dot_precision, launch, meta, on_hip
from triton_st.kernels.packed_attention_tiles import (
    LOG2_E,
    biases_of,
    first_slot,
    kept_weights,
    kept_weights_transposed,
    keys_of,
    load_rows,
    query_group,
    store_rows,
)
from triton_st.kernels.philox import dropout_arguments, keep_bits
from triton_st.kernels.rows import floor_log2, power_of_two
from triton_st.kernels.storing import saturate

_LN_2 = tl.constexpr(math.log(2))
BLOCK_PLACES = 128
BLOCK_BIASED = 32
GRADIENT_EXPONENT = -3
"""In half, scores' gradients are formed from a result's gradient whose largest entry is in [2^-3, 2^-2): with heads of
128 elements they stay finite for values up to 2000, and they keep 11 bits down to 2^-11 of the largest."""
_GRADIENT_EXPONENT = tl.constexpr(GRADIENT_EXPONENT)


@triton.jit
def _places_kernel(
    cu_seqlens,  # [B + 1]
    sequences,  # [T]: each token's sequence
    slot_sequences, slot_tokens,  # [slots] or None: each slot's sequence and token, -1 where it has none
    BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int32)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int32) - start
    place = tl.arange(0, BLOCK)
    for done in range(0, length, BLOCK):
        tl.store(sequences + start + done + place, tl.zeros([BLOCK], tl.int32) + sequence, mask=done + place < length)
    if slot_tokens is not None:
        first = first_slot(cu_seqlens, sequence, True)
        slots = first_slot(cu_seqlens, sequence + 1, True) - first
        for done in range(0, slots, BLOCK):
            inside = done + place < slots
            token = tl.where(done + place < length, start + done + place, -1)
            tl.store(slot_tokens + first + done + place, token, mask=inside)
            tl.store(slot_sequences + first + done + place, tl.zeros([BLOCK], tl.int32) + sequence, mask=inside)


@triton.jit(do_not_specialize=["tokens", "row_groups", "threshold", "stream"])
def _attention_kernel(
    qkv,  # [T, 3, H, D]
    cu_seqlens, sequences, slot_sequences, slot_tokens,
    out, logsumexp,  # [T, H, D], [H, T]
    bias, columns,  # [H, columns] or None
    seed, threshold, factor, stream,
    tokens, row_groups,  # T; groups of four keys that a row of weights is counted as
    scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_OWNED: tl.constexpr, BLOCK_PASSED: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_OWNED
    token = first + tl.arange(0, BLOCK_OWNED)
    inside = token < tokens
    sequence = tl.load(sequences + token, mask=inside, other=-1)
    first_sequence = tl.load(sequences + first)
    last_sequence = tl.load(sequences + tl.minimum(first + BLOCK_OWNED, tokens) - 1)
    qkv += head * D
    q = load_rows(qkv, token, inside, 3 * H * D, D, BLOCK_D)
    if seed is not None:
        seed_value = tl.load(seed)
        row_group = query_group(cu_seqlens, sequence, token, inside, head, tokens, row_groups)
    begin = first_slot(cu_seqlens, first_sequence, slot_tokens is not None)
    end = first_slot(cu_seqlens, last_sequence + 1, slot_tokens is not None)
    top = tl.full([BLOCK_OWNED], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_OWNED], tl.float32)
    acc = tl.zeros([BLOCK_OWNED, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_PASSED):
        key, key_sequence = keys_of(slot_sequences, slot_tokens, start, end, BLOCK_PASSED)
        k = load_rows(qkv + H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        same = sequence[:, None] == key_sequence[None, :]
        if bias is not None:
            scores += biases_of(bias, columns, head, key[None, :] - token[:, None], same)
        scores = tl.where(same, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        top = new_top
        if seed is not None:
            kept = kept_weights(seed_value, stream, threshold, row_group, start, BLOCK_OWNED, BLOCK_PASSED)
            p = tl.where(kept, p, 0.0)
        v = load_rows(qkv + 2 * H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    total = tl.where(inside, total, 1.0)
    normaliser = 1.0 / total
    if seed is not None:
        normaliser *= factor
    store_rows(
        out + head * D, token, inside, saturate(acc * normaliser[:, None], out.dtype.element_ty), H * D, D, BLOCK_D
    )
    tl.store(logsumexp + head.to(tl.int64) * tokens + token, (top + tl.log2(total)) * _LN_2, mask=inside)


@triton.jit(do_not_specialize=["tokens", "row_groups", "threshold", "stream"])
def _query_grad_kernel(
    grad, qkv, out, logsumexp,  # [T, H, D], [T, 3, H, D], [T, H, D], [H, T]
    cu_seqlens, sequences, slot_sequences, slot_tokens,
    grad_qkv, delta,  # [T, 3, H, D]: the queries' part is written; [H, T]: grad · out
    largest,  # [1] int32 or None: raised to the bits of the largest |grad|
    bias, columns,
    seed, threshold, factor, stream,
    tokens, row_groups,
    scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_OWNED: tl.constexpr, BLOCK_PASSED: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_OWNED
    token = first + tl.arange(0, BLOCK_OWNED)
    inside = token < tokens
    sequence = tl.load(sequences + token, mask=inside, other=-1)
    first_sequence = tl.load(sequences + first)
    last_sequence = tl.load(sequences + tl.minimum(first + BLOCK_OWNED, tokens) - 1)
    qkv += head * D
    row = head.to(tl.int64) * tokens + token
    grad_out = load_rows(grad + head * D, token, inside, H * D, D, BLOCK_D)
    result = load_rows(out + head * D, token, inside, H * D, D, BLOCK_D)
    row_delta = tl.sum(grad_out.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + row, row_delta, mask=inside)
    row_logsumexp = tl.load(logsumexp + row, mask=inside, other=0) * LOG2_E
    power = tl.full([BLOCK_OWNED], 1.0, tl.float32)
    if largest is not None:
        row_largest = tl.max(tl.abs(grad_out.to(tl.float32)), 1)
        tl.atomic_max(largest, tl.max(row_largest.to(tl.int32, bitcast=True)))
        power = _gradient_power(row_largest)
    q = load_rows(qkv, token, inside, 3 * H * D, D, BLOCK_D)
    if seed is not None:
        seed_value = tl.load(seed)
        row_group = query_group(cu_seqlens, sequence, token, inside, head, tokens, row_groups)
    begin = first_slot(cu_seqlens, first_sequence, slot_tokens is not None)
    end = first_slot(cu_seqlens, last_sequence + 1, slot_tokens is not None)
    acc = tl.zeros([BLOCK_OWNED, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_PASSED):
        key, key_sequence = keys_of(slot_sequences, slot_tokens, start, end, BLOCK_PASSED)
        k = load_rows(qkv + H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        same = sequence[:, None] == key_sequence[None, :]
        if bias is not None:
            scores += biases_of(bias, columns, head, key[None, :] - token[:, None], same)
        p = tl.exp2(scores - row_logsumexp[:, None])
        p = tl.where(same, p, 0.0)
        v = load_rows(qkv + 2 * H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if seed is not None:
            kept = kept_weights(seed_value, stream, threshold, row_group, start, BLOCK_OWNED, BLOCK_PASSED)
            grad_p = tl.where(kept, grad_p * factor, 0.0)
        grad_scores = p * (grad_p - row_delta[:, None]) * power[:, None]
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    store_rows(grad_qkv + head * D, token, inside, acc * (scale / power)[:, None], 3 * H * D, D, BLOCK_D)


@triton.jit
def _gradient_power(largest):
    """Power of two that brings numbers of at most `largest` to the size that suits half; 1 for inf, NaN and 0."""
    exponent = floor_log2(largest)
    ordinary = (exponent < 128) & (largest > 0)
    return tl.where(ordinary, power_of_two(tl.where(ordinary, _GRADIENT_EXPONENT - exponent, 0)), 1.0)


@triton.jit(do_not_specialize=["tokens", "slots", "row_groups", "threshold", "stream"])
def _key_grad_kernel(
    grad, qkv, logsumexp, delta,  # [T, H, D], [T, 3, H, D], [H, T], [H, T]
    cu_seqlens, sequences, slot_sequences, slot_tokens,
    grad_qkv,  # [T, 3, H, D]: the keys' and values' parts are written
    largest,
    bias, columns,
    seed, threshold, factor, stream,
    tokens, slots, row_groups,
    scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_OWNED: tl.constexpr, BLOCK_PASSED: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_OWNED
    key, key_sequence = keys_of(slot_sequences, slot_tokens, first, slots, BLOCK_OWNED)
    first_sequence = tl.load(slot_sequences + first)
    last_sequence = tl.load(slot_sequences + tl.minimum(first + BLOCK_OWNED, slots) - 1)
    qkv += head * D
    grad += head * D
    logsumexp += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens
    k = load_rows(qkv + H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
    v = load_rows(qkv + 2 * H * D, key, key >= 0, 3 * H * D, D, BLOCK_D)
    if seed is not None:
        seed_value = tl.load(seed)
    power = 1.0
    if largest is not None:
        power = _gradient_power(tl.load(largest).to(tl.float32, bitcast=True))
    grad_qkv += head * D
    begin = tl.load(cu_seqlens + first_sequence).to(tl.int32)
    end = tl.load(cu_seqlens + last_sequence + 1).to(tl.int32)
    grad_k = tl.zeros([BLOCK_OWNED, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_OWNED, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_PASSED):
        token = start + tl.arange(0, BLOCK_PASSED)
        inside = token < end
        sequence = tl.load(sequences + token, mask=inside, other=-1)
        q = load_rows(qkv, token, inside, 3 * H * D, D, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)  # [BLOCK_OWNED, BLOCK_PASSED]
        same = key_sequence[:, None] == sequence[None, :]
        if bias is not None:
            scores += biases_of(bias, columns, head, key[:, None] - token[None, :], same)
        p = tl.exp2(scores - (tl.load(logsumexp + token, mask=inside, other=0) * LOG2_E)[None, :])
        p = tl.where(same, p, 0.0)
        grad_out = load_rows(grad, token, inside, H * D, D, BLOCK_D)
        grad_p = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        dropped = p
        if seed is not None:
            row_group = query_group(cu_seqlens, sequence, token, inside, head, tokens, row_groups)
            kept = kept_weights_transposed(seed_value, stream, threshold, row_group, first, BLOCK_PASSED, BLOCK_OWNED)
            grad_p = tl.where(kept, grad_p * factor, 0.0)
            dropped = tl.where(kept, p, 0.0)
        grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        row_delta = tl.load(delta + token, mask=inside, other=0)
        grad_scores = p * (grad_p - row_delta[None, :]) * power
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    if seed is not None:
        grad_v *= factor
    store_rows(grad_qkv + H * D, key, key >= 0, grad_k * (scale / power), 3 * H * D, D, BLOCK_D)
    store_rows(grad_qkv + 2 * H * D, key, key >= 0, grad_v, 3 * H * D, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "row_groups", "threshold", "stream"])
def _bias_grad_kernel(
    grad, qkv, logsumexp, delta,  # [T, H, D], [T, 3, H, D], [H, T], [H, T]
    cu_seqlens, sequences,
    bias, columns,  # [H, columns]
    parts,  # [programs, H, columns], zeros: each program's sums
    seed, threshold, factor, stream,
    tokens, row_groups,
    scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK
    token = first + tl.arange(0, BLOCK)
    inside = token < tokens
    sequence = tl.load(sequences + token, mask=inside, other=-1)
    begin = tl.load(cu_seqlens + tl.load(sequences + first)).to(tl.int32)
    end = tl.load(cu_seqlens + tl.load(sequences + tl.minimum(first + BLOCK, tokens) - 1) + 1).to(tl.int32)
    row = head.to(tl.int64) * tokens + token
    row_logsumexp = tl.load(logsumexp + row, mask=inside, other=0) * LOG2_E
    row_delta = tl.load(delta + row, mask=inside, other=0)
    qkv += head * D
    q = load_rows(qkv, token, inside, 3 * H * D, D, BLOCK_D).to(tl.float32) * (scale * LOG2_E)
    grad_out = load_rows(grad + head * D, token, inside, H * D, D, BLOCK_D).to(tl.float32)
    if seed is not None:
        seed_value = tl.load(seed)
        place = token - tl.load(cu_seqlens + sequence, mask=inside, other=0).to(tl.int32)
    bias += head * columns + columns // 2
    parts += (tl.program_id(0).to(tl.int64) * H + head) * columns + columns // 2
    reach = columns // 2
    for distance in range(tl.maximum(begin - first - BLOCK + 1, -reach), tl.minimum(end - first, reach + 1)):
        key = token + distance
        known = inside & (key >= begin) & (key < end)
        same = tl.load(sequences + key, mask=known, other=-2) == sequence
        k = load_rows(qkv + H * D, key, same, 3 * H * D, D, BLOCK_D).to(tl.float32)
        v = load_rows(qkv + 2 * H * D, key, same, 3 * H * D, D, BLOCK_D).to(tl.float32)
        p = tl.exp2(tl.sum(q * k, 1) + tl.load(bias + distance) * LOG2_E - row_logsumexp)
        grad_p = tl.sum(grad_out * v, 1)
        if seed is not None:
            key_place = place + distance
            bits = keep_bits(seed_value, stream, threshold, row * row_groups + key_place // 4)
            grad_p = tl.where((bits >> (key_place & 3)) & 1 != 0, grad_p * factor, 0.0)
        tl.store(parts + distance, tl.sum(tl.where(same, p * (grad_p - row_delta), 0.0), 0))


class Places(NamedTuple):
    """Where tokens lie: `sequences` [T]; of slots, as many as there are keys, `slot_sequences` and `slot_tokens`."""

    sequences: Tensor
    slot_sequences: Tensor
    slot_tokens: Tensor | None

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: int, quads: bool) -> Places:
        """Two launches' worth of searching saved for every tile; `quads`: sequences begin at multiples of 4 slots."""
        batch = len(cu_seqlens) - 1
        sequences = torch.empty(tokens, dtype=torch.int32, device=cu_seqlens.device)
        slots = torch.empty(2, (tokens + 3 * batch + 3) // 4 * 4, dtype=torch.int32, device=cu_seqlens.device)
        places = Places(sequences, slots[0], slots[1]) if quads else Places(sequences, sequences, None)
        launch(
            _places_kernel, (batch,),
            cu_seqlens=cu_seqlens, sequences=sequences, slot_sequences=slots[0] if quads else None,
            slot_tokens=places.slot_tokens, BLOCK=BLOCK_PLACES, num_warps=1,
        )  # fmt: skip
        return places


def _tile(dtype: torch.dtype, d: int, *, backward: bool = False, biased: bool = False) -> Tile:
    """Rows that a program owns × rows that it passes at a time, and the padded head size.

    64 × 64 in backward needs more than 255 registers with heads of 64 elements and dropout, as it does in forward with
    heads of 32 and a bias. Float32 is not pipelined: the predicates of the copies in flight make ptxas spill; with
    short heads, and with a bias in backward, it does so unless told of all registers.
    """
    depth = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        if depth > 32 and dot_precision(dtype) == "ieee":  # whose operands sit in registers
            warps = 8 if backward and not on_hip() else 4  # AMD's are twice as wide: 8 would load 64 bits a lane
            return Tile(16 if backward else 32, 16, depth, warps, 1, max_registers=255)
        crowded = backward and biased
        columns = 16 if depth > 64 or crowded else 32
        return Tile(32, columns, depth, 4, 1, max_registers=255 if depth == 16 or crowded else None)
    return Tile(64, 32 if backward or depth > 64 or (biased and depth > 16) else 64, depth, 4, 2)


def _constants(qkv: Tensor, tile: Tile, max_seqlen: int) -> dict[str, object]:
    tokens, _, heads, d = qkv.shape
    return {
        "tokens": tokens, "row_groups": triton.cdiv(max_seqlen, 4), "scale": 1 / math.sqrt(d), "H": heads, "D": d,
        "BLOCK_OWNED": tile.rows, "BLOCK_PASSED": tile.columns, "BLOCK_D": tile.depth,
        "PRECISION": dot_precision(qkv.dtype), **tile.options,
    }  # fmt: skip


def _bias_arguments(relative_bias: Tensor | None) -> dict[str, Any]:
    if relative_bias is None:
        return {"bias": None, "columns": 0}
    return {"bias": relative_bias.contiguous(), "columns": relative_bias.shape[1]}


def packed_attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, d] -> the result [T, H · d] and each row's log-sum-exp [H, T]."""
    qkv, cu_seqlens = qkv.contiguous(), cu_seqlens.contiguous()
    tokens, _, heads, d = qkv.shape
    out, logsumexp = qkv.new_empty(tokens, heads * d), qkv.new_empty(heads, tokens, dtype=torch.float32)
    places = Places.of(cu_seqlens, tokens, dropout_p > 0)
    tile = _tile(qkv.dtype, d, biased=relative_bias is not None)
    launch(
        _attention_kernel, (triton.cdiv(tokens, tile.rows), heads),
        qkv=qkv, cu_seqlens=cu_seqlens, **places._asdict(), out=out, logsumexp=logsumexp,
        **_bias_arguments(relative_bias), **dropout_arguments(dropout_p, seed, stream),
        **_constants(qkv, tile, max_seqlen),
    )  # fmt: skip
    return out, logsumexp


def packed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    dropout_p: float,
    stream: int,
    relative_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """grad [T, H · d] -> gradients of qkv [T, 3, H, d] and of the bias, [H, 0] where there is none."""
    grad, qkv, out, cu_seqlens = grad.contiguous(), qkv.contiguous(), out.contiguous(), cu_seqlens.contiguous()
    tokens, _, heads, d = qkv.shape
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(logsumexp)
    half = qkv.dtype == torch.float16
    largest = torch.zeros(1, dtype=torch.int32, device=qkv.device) if half else None
    places = Places.of(cu_seqlens, tokens, dropout_p > 0)
    tile = _tile(qkv.dtype, d, backward=True, biased=relative_bias is not None)
    shared = {
        "grad": grad, "qkv": qkv, "logsumexp": logsumexp, "delta": delta, "cu_seqlens": cu_seqlens, "largest": largest,
        "grad_qkv": grad_qkv, **places._asdict(), **_bias_arguments(relative_bias),
        **dropout_arguments(dropout_p, seed, stream), **_constants(qkv, tile, max_seqlen),
    }  # fmt: skip
    launch(_query_grad_kernel, (triton.cdiv(tokens, tile.rows), heads), out=out, **shared)
    slots = len(places.slot_sequences)
    launch(_key_grad_kernel, (triton.cdiv(slots, tile.rows), heads), slots=slots, **shared)
    if relative_bias is None:
        return grad_qkv, delta.new_empty(heads, 0)
    programs = triton.cdiv(tokens, BLOCK_BIASED)
    parts = delta.new_zeros(programs, *relative_bias.shape)
    launch(
        _bias_grad_kernel, (programs, heads),
        parts=parts, BLOCK=BLOCK_BIASED, num_warps=2,
        **{name: shared[name] for name in _BIAS_GRAD_ARGUMENTS},
    )  # fmt: skip
    return grad_qkv, parts.sum(0)


_BIAS_GRAD_ARGUMENTS = (
    "grad", "qkv", "logsumexp", "delta", "cu_seqlens", "sequences", "bias", "columns", "seed", "threshold", "factor",
    "stream", "tokens", "row_groups", "scale", "H", "D", "BLOCK_D",
)  # fmt: skip


PROMISES = {
    "_places_kernel": (),  # reads a few numbers of each sequence
    "_attention_kernel": ("tensor cores", "wide loads"),
    "_query_grad_kernel": ("tensor cores", "wide loads"),
    "_key_grad_kernel": ("tensor cores", "wide loads"),
    "_bias_grad_kernel": ("wide loads",),
}


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles: heads of 10, 32 and 64 elements."""
    tokens, batch = 9000, 384
    cu_seqlens, seed = meta(batch + 1, dtype=torch.int32), meta(dtype=torch.int64)
    for size in {50: (10,), 384: (32, 64)}.get(d, ()):
        heads = d // size
        qkv, grad = meta(tokens, 3, heads, size, dtype=dtype), meta(tokens, d, dtype=dtype)
        logsumexp = meta(heads, tokens, dtype=torch.float32)
        for dropout_p in (0.0, 0.1):
            yield packed_attention_forward, (qkv, cu_seqlens, seed, 512, dropout_p, 8)
        bias = meta(heads, 1023, dtype=torch.float32)
        yield packed_attention_forward, (qkv, cu_seqlens, seed, 512, 0.1, 8, bias)
        for relative_bias in (None, bias):
            yield (
                packed_attention_backward,
                (grad, qkv, grad, logsumexp, cu_seqlens, seed, 512, 0.1, 8, relative_bias),
            )
