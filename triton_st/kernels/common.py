"""Launching kernels, and the tile sizes that the launchers and the ahead-of-time check share."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TARGET_PROGRAMS = 512
"""Programs that fill a large GPU. Splits follow from shapes alone, so every GPU adds up in the same order."""

_recorded: deque[Launch] | None = None
_vendor: str | None = None


class Launch(NamedTuple):
    """One kernel launch, as a launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A launcher and arguments for it, as a module's `examples` gives them to the ahead-of-time check."""


EXAMPLE_WIDTH = 384
"""The width at which the ahead-of-time check compiles small and large products, and every option of the loss."""


def example_sizes(d: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of products for `examples`: of a small tile and a large one; at other widths a large one."""
    large = (8192, 16384)
    return ((128, 384), large) if d == EXAMPLE_WIDTH else (large,)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, for `examples`."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextlib.contextmanager
def recording(vendor: str, most: int | None = None) -> Iterator[deque[Launch]]:
    """Launch nothing inside the block: list instead what would be launched on a GPU of `vendor` ("cuda", "hip").

    Launchers read no values, so they run on meta tensors here. The last `most` launches are kept, with their tensors.
    """
    global _recorded, _vendor
    previous = _recorded, _vendor
    _recorded, _vendor = deque(maxlen=most), vendor
    try:
        yield _recorded
    finally:
        _recorded, _vendor = previous


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors; nothing where the grid is empty."""
    if 0 in grid:
        return
    arguments["enable_fp_fusion"] = True  # exact float32 products are chains of multiply-adds; Triton 3.10 will ask
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](**arguments)


def on_hip() -> bool:
    """Whether kernels are compiled for an AMD GPU."""
    return (_vendor or ("hip" if torch.version.hip else "cuda")) == "hip"


@functools.cache
def _has_tf32() -> bool:
    """Of AMD's GPUs, gfx942 alone multiplies in (nearly) tf32."""
    if _recorded is not None or not on_hip():
        return True
    return torch.cuda.get_device_properties().gcnArchName.startswith("gfx942")


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: tf32 only where the user allowed it. Means nothing for half operands."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and _has_tf32() else "ieee"


def register_limit(num_warps: int) -> dict[str, int]:
    """Option of a launch: ptxas may take all registers there are. Left alone, it at times stops earlier and spills."""
    return {} if on_hip() else {"maxnreg": min(255, 65536 // (32 * num_warps))}


class Tile(NamedTuple):
    """Block sizes of a matrix product [rows, depth] @ [depth, columns] and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of the launch."""
        if on_hip():
            return {"num_warps": self.num_warps, "num_stages": 2}
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def product_tile(dtype: torch.dtype, rows: int, columns: int, *, aligned: bool = True, epilogue: bool = False) -> Tile:
    """Tile for a product of `rows` × `columns` results.

    The small tile gives a batch of 128 queries and 384 documents 24 programs; the large one is taken as soon as it
    fills the GPU. 128 × 128 × 64 halves in 3 stages are 96 KiB of shared memory: within the 99 KiB of sm_86 and sm_89.
    Exact float32 products run on the ordinary units, whose operands sit in registers: small and shallow, and with
    ptxas told how many registers it may take (left alone it stops at 80 for the small tile and spills).

    Args:
        dtype: of the operands.
        rows: of the result.
        columns: of the result.
        aligned: rows of the operands are whole blocks of `depth`. Ragged rows need an address and a mask for every few
            bytes, and with them the largest tile spills.
        epilogue: each result is worked on further. 128 columns then take up to 255 registers and spill on sm_80 and
            sm_100; with 64 it is 109 on sm_90, so that two blocks share a multiprocessor and one multiplies while the
            other exponentiates.
    """
    large = triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= 96
    if dtype == torch.float32 and dot_precision(dtype) == "ieee":
        return Tile(128, 64, 16, 8, 2) if large and aligned else Tile(64, 32, 16, 4, 2, max_registers=255)
    depth = 32 if dtype == torch.float32 else 64
    if not large:
        return Tile(64, 32, depth, 4, 3)
    return Tile(128, 128 if aligned and not epilogue else 64, depth, 8, 3)


def padded_width(dtype: torch.dtype, d: int) -> int:
    """Width of rows that are copied for a product: whole blocks of `depth`, so that every load is 128 bits wide."""
    depth = product_tile(dtype, 1, 1).depth
    return triton.cdiv(d, depth) * depth


def splits(programs: int, steps: int, most: int = 256) -> int:
    """Into how many parts to cut a loop of `steps` steps, so that `programs` of them fill the GPU."""
    wanted = triton.cdiv(TARGET_PROGRAMS, max(programs, 1))
    per_part = triton.cdiv(max(steps, 1), max(1, min(wanted, steps, most)))
    return triton.cdiv(max(steps, 1), per_part)
