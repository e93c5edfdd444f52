"""Rows of all processes of torch.distributed, with their gradient, whatever the number of rows of each."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)


class Gathered(NamedTuple):
    """Rows of all processes, in order of rank."""

    rows: Tensor
    """[W, ...]; a gradient of them flows back to the processes that they come from, summed over all."""
    offset: int
    """Where this process' rows begin."""


def is_distributed() -> bool:
    """Whether there are other processes to gather from; says so, once, where a loss was told to gather in vain."""
    if dist.is_available() and dist.is_initialized():
        return True
    global _said
    if not _said:
        logger.warning("gather_across_devices: torch.distributed is not initialised; there is nothing to gather")
        _said = True
    return False


_said = False


def gather(rows: Tensor) -> Gathered:
    """Gather `rows` [B, ...] of every process; all but B must be the same everywhere. Every process must call it."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    return Gathered(_Gather.apply(rows, sizes), sum(sizes[: dist.get_rank()]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # In float32 at least: a sum over processes in half precision would round once for each.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total)
        begin = sum(ctx.sizes[: dist.get_rank()])
        return total[begin : begin + ctx.sizes[dist.get_rank()]].to(grad.dtype), None
