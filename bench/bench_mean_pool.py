"""Mean pooling against sentence-transformers' Pooling, plain PyTorch and torch.compile; the limit is memory.

`pytest bench/bench_mean_pool.py --benchmark-only`
"""

from __future__ import annotations

import functools
import itertools
import mmap
from collections.abc import Callable, Iterable

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from bench.conftest import DTYPES, Interleaved, Limit, Run, assert_close, backward, dtype_name, training
from triton_st import ops, reference

# batch, length, width: 8 to 65,536 positions, of which about half hold a token.
SHAPES = [(1, 8, 384), (8, 16, 384), (32, 32, 384), (128, 64, 50), (64, 128, 384), (512, 128, 384), (512, 128, 50)]
MEMORY_BYTES = 2 << 20  # of fewer bytes a probe of memory measures calls
CACHE_BYTES = 64 << 20  # more than the caches hold
HUGE_PAGE = 2 << 20  # bytes

Pool = Callable[[Tensor], Tensor]


def plain(hidden: Tensor, mask: Tensor) -> Tensor:
    """What one writes by hand."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)


compiled = torch.compile(plain, dynamic=True)
torch._functorch.config.donated_buffer = False  # else a compiled function's backward runs only once


def in_turn(runs: Iterable[Run]) -> Run:
    """Calls one of them, the next one each time. Copies of the input then come from memory, not from a cache."""
    turn = itertools.cycle(runs)
    return lambda: next(turn)()


def copies(size: int) -> int:
    """How many inputs of `size` bytes are more than the caches hold; 1 if they are too small to ask for memory."""
    return -(-CACHE_BYTES // size) if size >= MEMORY_BYTES else 1


def read_memory(size: int) -> Run:
    """Reads `size` bytes in one piece."""
    return in_turn([torch.ones(size // 4).sum for _ in range(copies(size))])


def write_new(size: int) -> Tensor:
    """Makes a tensor of `size` bytes and writes it: what a gradient is, at the least."""
    return torch.empty(size // 4).fill_(1.0)


def write_new_huge_pages(size: int) -> Tensor:
    """The same for large memory, which is new to the process each time: mapping it takes longer than writing it."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE  # the system gives huge pages alone to nothing else
    memory = mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=size // 4).fill_(1.0)


def memory(read: Iterable[Tensor], written: Iterable[Tensor]) -> Limit | None:
    """Reading and writing as many bytes as the operator must; None where they are too few to be measured."""
    to_read, to_write = (sum(x.numel() * x.element_size() for x in each) for each in (read, written))
    if to_read + to_write < MEMORY_BYTES:
        return None
    reading = read_memory(to_read)
    return (
        "reading as many bytes and writing as many to a new tensor",
        lambda: (reading(), write_new(to_write)),
        lambda: (reading(), write_new_huge_pages(to_write)),
    )


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


def peers(mask: Tensor, dim: int) -> dict[str, Pool]:
    """What pools padded states today."""
    pooling = Pooling(dim)
    return {
        "sentence-transformers Pooling": lambda states: pooling({"token_embeddings": states, "attention_mask": mask})[
            "sentence_embedding"
        ],
        "PyTorch": lambda states: plain(states, mask),
        "torch.compile": lambda states: compiled(states, mask),
    }


def in_direction(direction: str, pool: Pool, states: Tensor) -> Run:
    if direction == "backward":
        return backward(pool, states)
    inputs = [states.clone() for _ in range(copies(states.numel() * states.element_size()))]
    if direction == "forward":
        return in_turn([functools.partial(pool, x) for x in inputs])
    return in_turn([training(pool, x) for x in inputs])


@pytest.mark.parametrize("direction", ["forward", "backward", "forward and backward"])
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

    def masked(states: Tensor) -> Tensor:
        return ops.masked_mean_pool(states, mask)

    def packed(states: Tensor) -> Tensor:
        return ops.packed_mean_pool(states, cu_seqlens)

    ours, states, layout_tensor = (masked, hidden, mask) if layout == "masked" else (packed, tokens, cu_seqlens)
    pooled = hidden[:, 0]
    forward, reverse = ([tokens, layout_tensor], [pooled]), ([pooled, layout_tensor], [states])
    limit = None
    if device.type == "cpu":
        moved = {"forward": forward, "backward": reverse}.get(
            direction, (forward[0] + reverse[0], forward[1] + reverse[1])
        )
        limit = memory(*moved)
    with torch.set_grad_enabled(direction != "forward"):
        exact = reference.masked_mean_pool(hidden.double(), mask)
        assert_close(ours(states).detach(), exact)
        interleaved(
            in_direction(direction, ours, states),
            {name: in_direction(direction, pool, hidden) for name, pool in peers(mask, shape[2]).items()},
            limit=limit,
            operator=f"{layout}_mean_pool",
            shape=dict(zip(("batch", "length", "width"), shape, strict=True)),
            dtype=dtype_name(dtype),
            direction=direction,
        )
