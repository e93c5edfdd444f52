"""Dropout from Philox-4x32-10: which elements are kept is a function of a seed and of where they stand, never stored.

Element `i` of a tensor belongs to group `i // 4`. Key: the seed's low and high 32 bits. Counter: the group's low and
high 32 bits, `stream`, 0. Of the four words that come out, element `i` takes word `i % 4` and is kept if that is at
least round(p · 2³²). Rows are counted as if padded to a multiple of 4 elements, so that a row begins with a group.

Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox(seed: Tensor, stream: int, group: Tensor) -> Tensor:
    """Four random words for each group. seed int64 scalar, group int64 [...] -> int64 [..., 4], each in [0, 2³²)."""
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    word0, word1 = group & _LOW, (group >> 32) & _LOW
    word2, word3 = torch.full_like(group, stream & _LOW), torch.zeros_like(group)
    for _ in range(_ROUNDS):
        # int64 wraps round; its bits are those of the unsigned product
        even, odd = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = ((odd >> 32) & _LOW) ^ word1 ^ key0
        word2 = ((even >> 32) & _LOW) ^ word3 ^ key1
        word1, word3 = odd & _LOW, even & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return torch.stack([word0, word1, word2, word3], -1)


def keep_mask(seed: Tensor, stream: int, rows: Tensor, columns: int, width: int, dropout_p: float) -> Tensor:
    """Which of the first `columns` elements of each row are kept.

    Args:
        seed: int64, one element.
        stream: names the place in the model.
        rows: row numbers, int64 [...].
        columns: how many elements of each row are asked for.
        width: elements of a whole row, before padding.
        dropout_p: probability of dropping an element.

    Returns:
        bool [..., columns].
    """
    groups = (width + 3) // 4
    group = rows.unsqueeze(-1) * groups + torch.arange((columns + 3) // 4, device=rows.device)
    words = philox(seed.reshape(()), stream, group).flatten(-2)
    return words[..., :columns] >= round(dropout_p * 2**32)


def dropout_factor(dropout_p: float) -> float:
    """What a kept element is multiplied by; 0 where nothing is kept."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """x [T, D] with dropped elements 0 and the others times 1 / (1 − p); x itself for p = 0."""
    if dropout_p == 0:
        return x
    assert seed is not None
    rows = torch.arange(len(x), device=x.device)
    kept = keep_mask(seed, stream, rows, x.shape[1], x.shape[1], dropout_p)
    return torch.where(kept, x * dropout_factor(dropout_p), 0)
