"""What the kernels of attention do to a tile: its keys, rows of one head, dropout bits, biases by relative position."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from triton_st.kernels.philox import keep_bits

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def first_slot(cu_seqlens, sequence, QUADS: tl.constexpr):
    """Slot of a sequence's first token: a multiple of 4 if QUADS, found without adding up rounded lengths."""
    start = tl.load(cu_seqlens + sequence).to(tl.int32)
    if QUADS:
        start = (start + 3 * sequence + 3) // 4 * 4
    return start


@triton.jit
def keys_of(slot_sequences, slot_tokens, first, end, BLOCK: tl.constexpr):
    """Tokens and sequences of a tile's slots before `end`, -1 and -2 past it; permuted for dropout."""
    column = tl.arange(0, BLOCK)
    if slot_tokens is None:
        slot = first + column
        inside = slot < end
        token = tl.where(inside, slot, -1)
    else:
        slot = first + column % (BLOCK // 4) * 4 + column // (BLOCK // 4)
        inside = slot < end
        token = tl.load(slot_tokens + slot, mask=inside, other=-1)
        inside = token >= 0
    return token, tl.load(slot_sequences + slot, mask=inside, other=-2)


@triton.jit
def load_rows(x, token, inside, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's rows of these tokens, from the head's first element of token 0 on. [tokens, BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dim < D)[None, :]
    return tl.load(x + token.to(tl.int64)[:, None] * STRIDE + dim[None, :], mask=mask, other=0)


@triton.jit
def store_rows(x, token, inside, value, STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same to memory: value [tokens, BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D != BLOCK_D:
        mask = mask & (dim < D)[None, :]
    tl.store(x + token.to(tl.int64)[:, None] * STRIDE + dim[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def kept_weights(seed, stream, threshold, row_group, first_slot, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Which weights of a tile are kept, its keys permuted as `_keys` does. bool [BLOCK_ROWS, BLOCK_KEYS]."""
    group = first_slot // 4 + tl.arange(0, BLOCK_KEYS // 4)
    bits = keep_bits(seed, stream, threshold, row_group[:, None] + group[None, :])
    kept = (bits[:, None, :] >> tl.arange(0, 4)[None, :, None]) & 1 != 0
    return tl.reshape(kept, [BLOCK_ROWS, BLOCK_KEYS])


@triton.jit
def kept_weights_transposed(
    seed, stream, threshold, row_group, first_slot, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """The same the other way round. bool [BLOCK_KEYS, BLOCK_ROWS]."""
    group = first_slot // 4 + tl.arange(0, BLOCK_KEYS // 4)
    bits = keep_bits(seed, stream, threshold, group[:, None] + row_group[None, :])
    kept = (bits[None, :, :] >> tl.arange(0, 4)[:, None, None]) & 1 != 0
    return tl.reshape(kept, [BLOCK_KEYS, BLOCK_ROWS])


@triton.jit
def query_group(cu_seqlens, sequence, token, inside, head, tokens, row_groups):
    """Number of the group of four weights that a query would have at slot 0. [queries], int64."""
    first = first_slot(cu_seqlens, tl.where(inside, sequence, 0), True)
    return (head.to(tl.int64) * tokens + token) * row_groups - first // 4


@triton.jit
def biases_of(bias, columns, head, distance, same):
    """What is added to scores, times log2 e, where two tokens are of the same sequence. `distance`: key - query."""
    middle = bias + head * columns + columns // 2
    return tl.load(middle + distance, mask=same, other=0) * LOG2_E
