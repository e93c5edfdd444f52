"""How the contrastive loss is cut up: rows and their copies, blocks of the similarity matrix, panels of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_st.kernels.common import Tile, splits
from triton_st.kernels.mnrl_prefix_rows import PrefixRows, Segments, copy_prefixes
from triton_st.kernels.rows import Scaled, copy_rows


class RowSet:
    """Rows, and the copies of all of them, or None where these would take too much; the sums behind their gradient.

    Of several prefixes, also how much of these sums lies `along` the rows [prefixes, N].
    """

    def __init__(self, rows: Scaled | PrefixRows, segments: Segments) -> None:
        self.rows, self.segments = rows, segments
        self.copies: Tensor | None = None
        self.sums = self.along = rows.rows.new_empty(0, dtype=torch.float32)
        self.summed = False

    def copied(self, part: slice = slice(None)) -> Tensor:
        """Copies of some rows, made now."""
        rows = self.rows[part]
        return copy_prefixes(rows, self.segments) if isinstance(rows, PrefixRows) else copy_rows(rows, rows[:0])[0]

    def part(self, part: slice) -> Tensor:
        """Copies of some rows."""
        return self.copied(part) if self.copies is None else self.copies[part]


class Block(NamedTuple):
    """One direction's similarities: row i is row left_first + i of `left`, columns are all of `right`."""

    direction: int
    left: RowSet
    left_first: int
    right: RowSet
    own_group: bool
    hardness: int
    left_ids: Tensor | None
    left_twins: Tensor | None
    right_ids: Tensor | None
    right_twins: Tensor | None


class Panel(NamedTuple):
    """Some rows and columns of a block, as numbers of the block's, and their copies."""

    rows: slice
    columns: slice
    left: Tensor
    right: Tensor


def _chunks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def moved(part: slice, by: int) -> slice:
    """The part, `by` further on."""
    return slice(part.start + by, part.stop + by)


def panels(block: Block, row_count: int, rows: int, columns: int) -> Iterator[Panel]:
    """Panels of at most rows × columns, all columns of the same rows one after the other."""
    for row_part in _chunks(row_count, rows):
        left = block.left.part(moved(row_part, block.left_first))
        for column_part in _chunks(len(block.right.rows), columns):
            yield Panel(row_part, column_part, left, block.right.part(column_part))


def stripes(tile: Tile, rows: int, columns: int, parts: int | None = None) -> tuple[int, int]:
    """Into how many stripes of columns to cut a panel, and how many columns make a stripe."""
    tiles = triton.cdiv(columns, tile.columns)
    parts = parts or splits(triton.cdiv(rows, tile.rows), tiles)
    return parts, triton.cdiv(tiles, parts) * tile.columns
