"""Dropout bits of Philox-4x32-10, the same as `triton_st.reference.philox` draws: four words for each call."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_st.reference.philox import dropout_factor


@triton.jit
def keep_bits(seed, stream, threshold, group):
    """Which of the four elements of each group (int64) are kept: bit w of the result stands for element w.

    `seed` is the loaded number, `threshold` the 32 bits of round(p · 2³²).
    """
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, low, high, stream, 0)
    least = threshold.to(tl.uint32, bitcast=True)
    low_bits = (word0 >= least).to(tl.int32) | (word1 >= least).to(tl.int32) << 1
    return low_bits | (word2 >= least).to(tl.int32) << 2 | (word3 >= least).to(tl.int32) << 3


@triton.jit
def keep_rows(seed, stream, threshold, row, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Whether the elements of rows [BLOCK_R] of a tensor [T, D] are kept: bool [BLOCK_R, BLOCK_D]."""
    group = tl.arange(0, BLOCK_D // 4)
    bits = keep_bits(seed, stream, threshold, row.to(tl.int64)[:, None] * ((D + 3) // 4) + group[None, :])
    kept = (bits[:, :, None] >> tl.arange(0, 4)[None, None, :]) & 1 != 0
    return tl.reshape(kept, [BLOCK_R, BLOCK_D])


def dropout_arguments(dropout_p: float, seed: Tensor | None, stream: int) -> dict[str, Any]:
    """What every kernel with dropout takes: the seed, and p as threshold and factor. `seed` None means no dropout."""
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)  # nothing is kept at p = 1: the factor is 0
    return {
        "seed": None if dropout_p == 0 else seed,
        "threshold": _signed(threshold),
        "factor": dropout_factor(dropout_p),
        "stream": _signed(stream & 0xFFFFFFFF),
    }


def _signed(word: int) -> int:
    """The same 32 bits as a signed number: one argument type, whatever the value."""
    return word - 2**32 if word >= 2**31 else word
