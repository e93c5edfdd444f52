"""The one batch format: texts laid end to end in a flat run of tokens, with no padding anywhere.

Packed features are a plain dict: `input_ids` int64 [T], `cu_seqlens` int32 [B+1] (starts at 0, ends at T,
non-decreasing), `max_seqlen` (Python int) and, optionally, `token_type_ids` int64 [T]. `cu_seqlens` and `max_seqlen`
are the names that FlashAttention gave them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Features = dict[str, Any]


def pack(token_ids: Sequence[Sequence[int]]) -> Features:
    """Lay token-id lists end to end.

    Args:
        token_ids: B lists of token ids; a list may be empty, and so may the batch.

    Returns:
        Packed features on the CPU.
    """
    cu_seqlens = np.zeros(len(token_ids) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in token_ids], out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])
    if total > torch.iinfo(torch.int32).max:
        raise ValueError(f"token_ids: a batch holds at most 2**31 - 1 tokens, got {total}")
    flat = np.fromiter(itertools.chain.from_iterable(token_ids), dtype=np.int64, count=total)
    return {
        "input_ids": torch.from_numpy(flat),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "max_seqlen": int(np.diff(cu_seqlens).max(initial=0)),
    }


def concatenate(columns: Sequence[Features]) -> Features:
    """Join packed batches into one, in order, so that several columns ride in one forward.

    Args:
        columns: packed features, on one device.

    Returns:
        Packed features with the columns' texts one after another. `token_type_ids` is present if any column has it
        (zeros for those that have not).

    Raises:
        ValueError: `columns` is empty.
    """
    if not columns:
        raise ValueError("columns: expected at least one packed batch, got none")
    if len(columns) == 1:
        return dict(columns[0])
    offsets = itertools.accumulate((column["input_ids"].numel() for column in columns), initial=0)
    cu_seqlens = [columns[0]["cu_seqlens"][:1]]
    cu_seqlens += [column["cu_seqlens"][1:] + offset for column, offset in zip(columns, offsets, strict=False)]
    joined: Features = {
        "input_ids": torch.cat([column["input_ids"] for column in columns]),
        "cu_seqlens": torch.cat(cu_seqlens),
        "max_seqlen": max(column["max_seqlen"] for column in columns),
    }
    if any(column.get("token_type_ids") is not None for column in columns):
        types = [column.get("token_type_ids") for column in columns]
        joined["token_type_ids"] = torch.cat(
            [
                torch.zeros_like(column["input_ids"]) if ids is None else ids
                for column, ids in zip(columns, types, strict=True)
            ]
        )
    return joined


def to_device(features: Features, device: torch.device | str) -> Features:
    """Copy packed features to a device; what is no tensor is kept as it is."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


def check_packed(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> list[int]:
    """Check that a batch is packed as this module says, and return the length of every sequence.

    `max_seqlen` may be None, for what has no use for it.

    Raises:
        TypeError: a tensor of another dtype, or `max_seqlen` is no int.
        ValueError: another shape, or `cu_seqlens` does not start at 0, descends, or does not end at T, or a sequence is
            longer than `max_seqlen`.
    """
    require_integers("input_ids", input_ids, "int64")
    require_integers("cu_seqlens", cu_seqlens, "int32")
    if max_seqlen is not None and not isinstance(max_seqlen, int):
        raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids: expected a flat run of tokens [T], got shape {tuple(input_ids.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected shape [B+1], got {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {bounds[0]}")
    if bounds[-1] != input_ids.numel():
        raise ValueError(
            f"cu_seqlens: expected to end at T = {input_ids.numel()}, the number of tokens, got {bounds[-1]}"
        )
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"cu_seqlens: expected ascending offsets, got {bounds[at]} before {bounds[at + 1]}")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {max(lengths)}, the longest sequence, got {max_seqlen}")
    return lengths


def require_integers(name: str, ids: Tensor, usual: str) -> None:
    """`ids` is a tensor of int64 or int32, of which `usual` is the usual one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected {usual}, got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}")
