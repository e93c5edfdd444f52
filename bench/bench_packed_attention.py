"""Packed attention against what one runs on padded batches: SDPA with a mask; and against SDPA one by one.

`pytest bench/bench_packed_attention.py --benchmark-only`
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import DTYPES, Interleaved, assert_close, dtype_name, training
from triton_st import ops

# Sentences, median length of each, heads, head size: a batch of the reference recipe, MiniLM's, long texts, one text.
SHAPES = [(384, 22, 5, 10), (384, 22, 12, 32), (192, 22, 12, 64), (16, 512, 12, 32), (1, 12, 12, 32)]
DROPOUT = 0.1


def sentence_lengths(count: int, median: int) -> list[int]:
    """Lengths as natural texts have them: log-normal, of 3 tokens to 4 medians; all 512 where texts are cut there."""
    if median >= 512:
        return [512] * count
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count, generator=generator).mul(0.5).exp() * median
    return spread.clamp(3, 4 * median).long().tolist()


def padded_peer(
    lengths: list[int], heads: int, size: int, dropout_p: float, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Attention of padded qkv [B, L, 3, H, d] -> [B, L, H · d], L the longest length: padding itself is not timed."""
    longest = max(lengths)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    bias = mask[:, None, None, :]

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p).transpose(1, 2).flatten(2)

    return attend


@pytest.mark.parametrize(
    ("direction", "dropout_p"),
    [("forward", 0.0), ("forward and backward", 0.0), ("forward and backward", DROPOUT)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_attention(
    interleaved: Interleaved,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    direction: str,
    dropout_p: float,
    device: torch.device,
) -> None:
    count, median, heads, size = shape
    lengths = sentence_lengths(count, median)
    tokens, longest = sum(lengths), max(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    qkv = torch.randn(tokens, 3, heads, size, device=device).to(dtype)
    mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    padded = torch.zeros(count, longest, 3, heads, size, dtype=dtype, device=device)
    padded[mask] = qkv
    seed = torch.tensor(42, device=device)

    def packed(x: Tensor) -> Tensor:
        return ops.packed_attention(x, offsets, longest, dropout_p, seed)

    def alone(x: Tensor) -> Tensor:
        pieces = []
        for piece in x.split(lengths):
            q, k, v = piece.permute(1, 2, 0, 3)
            pieces.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(0, 1).flatten(1))
        return torch.cat(pieces)

    peer = padded_peer(lengths, heads, size, dropout_p, device)
    train = direction != "forward"
    with torch.set_grad_enabled(train):
        exact = padded_peer(lengths, heads, size, 0.0, device)(padded.double())[mask]
        assert_close(ops.packed_attention(qkv, offsets, longest), exact)
        functions = {"SDPA, padded": (peer, padded), "SDPA, one by one": (alone, qkv)}
        interleaved(
            training(packed, qkv) if train else lambda: packed(qkv),
            {
                name: training(f, x) if train else (lambda f=f, x=x: f(x))  # type: ignore[misc]
                for name, (f, x) in functions.items()
            },
            operator="packed_attention",
            shape={"sentences": count, "tokens": tokens, "heads": heads, "head size": size, "dropout": dropout_p},
            dtype=dtype_name(dtype),
            direction=direction,
        )
