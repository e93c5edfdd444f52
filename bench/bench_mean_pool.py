"""Mean pooling against sentence-transformers' Pooling, plain PyTorch and torch.compile; the limit is memory.

`pytest bench/bench_mean_pool.py --benchmark-only`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from bench.conftest import DTYPES, Interleaved, Run, assert_close, dtype_name, training
from triton_st import ops, reference

# batch, length, width: 8 to 65,536 positions, of which about half hold a token.
SHAPES = [(1, 8, 384), (8, 16, 384), (32, 32, 384), (128, 64, 50), (64, 128, 384), (512, 128, 384), (512, 128, 50)]
PROBE_BYTES = 2 << 20  # of fewer bytes a probe of memory measures calls


def plain(hidden: Tensor, mask: Tensor) -> Tensor:
    """What one writes by hand."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


compiled = torch.compile(plain, dynamic=True)


def memory(read: Iterable[Tensor], written: Iterable[Tensor]) -> tuple[str, Run] | None:
    """Reading and writing as many bytes as the operator must, in one piece, in memory that is already mapped."""
    to_read, to_write = (sum(x.numel() * x.element_size() for x in each) // 4 for each in (read, written))
    if 4 * (to_read + to_write) < PROBE_BYTES:
        return None
    source, target = torch.zeros(to_read), torch.zeros(to_write)
    return "reading and writing as many bytes", lambda: (source.sum(), target.fill_(1.0))


def batch(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Padded states and their mask; the same tokens packed, and their offsets."""
    rows, length, dim = shape
    torch.manual_seed(0)
    lengths = torch.randint(1, length + 1, (rows,))
    lengths[0] = length
    mask = torch.arange(length) < lengths.unsqueeze(1)
    hidden = torch.randn(rows, length, dim).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths.tolist())], dtype=torch.int32)
    return hidden.to(device), mask.long().to(device), hidden[mask].to(device), cu_seqlens.to(device)


def peers(mask: Tensor, dim: int, hidden: Tensor, train: bool) -> dict[str, Run]:
    pooling = Pooling(dim)

    def sentence_transformers(states: Tensor) -> Tensor:
        return pooling({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]

    functions = {
        "sentence-transformers Pooling": sentence_transformers,
        "PyTorch": lambda states: plain(states, mask),
        "torch.compile": lambda states: compiled(states, mask),
    }
    if train:
        return {name: training(function, hidden) for name, function in functions.items()}
    return {name: lambda function=function: function(hidden) for name, function in functions.items()}  # type: ignore[misc]


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_mean_pool(
    interleaved: Interleaved,
    layout: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
) -> None:
    """Packed pooling has no peer: it is held against padded ones on the same sentences."""
    hidden, mask, tokens, cu_seqlens = batch(shape, dtype, device)
    train = direction != "forward"

    def masked(states: Tensor) -> Tensor:
        return ops.masked_mean_pool(states, mask)

    def packed(states: Tensor) -> Tensor:
        return ops.packed_mean_pool(states, cu_seqlens)

    ours, states, layout_tensor = (masked, hidden, mask) if layout == "masked" else (packed, tokens, cu_seqlens)
    pooled = hidden[:, 0]
    read, written = [tokens, layout_tensor], [pooled]
    if train:
        read, written = [*read, layout_tensor, pooled], [*written, states]
    with torch.set_grad_enabled(train):
        exact = reference.masked_mean_pool(hidden.double(), mask)
        assert_close(ours(states).detach(), exact)
        interleaved(
            training(ours, states) if train else lambda: ours(states),
            peers(mask, shape[2], hidden, train),
            limit=memory(read, written) if device.type == "cpu" else None,
            operator=f"{layout}_mean_pool",
            shape=dict(zip(("batch", "length", "width"), shape, strict=True)),
            dtype=dtype_name(dtype),
            direction=direction,
        )
