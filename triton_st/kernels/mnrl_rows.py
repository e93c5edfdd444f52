"""The contrastive loss row by row: the sweeps over the similarity matrix, panel by panel, and what is kept of them.

Copies of the rows, with norms of one size and widths that are whole blocks, are what both sweeps multiply.

Forward (one product): programs walk along stripes of columns with an online log-sum-exp of the candidates; the positive
is kept apart, so that loss = log(1 + exp(others − positive)) keeps its digits when it is small.

Gradients (three more): what a fused kernel would accumulate, [rows, D] in registers, does not fit them for D ≥ 256,
and cutting D makes it form every similarity again per cut. So a panel of the gradients by the logits, of at most
`PANEL_BYTES` (it stays in the L2 cache), is formed and serves two plain products, one for each side. The similarities
behind it are formed a second time. To keep them from the first sweep instead, which needs all columns of a row before
it is done, would take 4 · M bytes of a row: at M = 131,072 a panel of 16 MiB would hold 32 rows, and the sums of all
documents (8 · M · D bytes read and written for each panel) would move 825 GB at B = 65,536, D = 384. Where all columns
do fit, a similarity costs 8 bytes to store and load, 2.4 ps at 3.3 TB/s, and 2 · D flops to form again, 0.8 ps for
D = 384 at 990 TFLOP/s in half: below D = 1,200 the product is the cheaper of the two.

Each of `dims` is a pass of its own, longest first: unit rows, masks and weights are a prefix's own, and a projection
after the sum of prefixes would divide what is left by small differences.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from triton_st.kernels.common import (
    EXAMPLE_WIDTH,
    Call,
    Tile,
    dot_precision,
    example_sizes,
    launch,
    meta,
    padded_width,
    product_tile,
    splits,
)
from triton_st.kernels.mnrl_blocks import _sums_kernel, _weights_kernel
from triton_st.kernels.mnrl_reduce import LOSS_ROWS, _losses_kernel, positives, subtract_gathered
from triton_st.kernels.products import new_sums, weighted_sum
from triton_st.kernels.rows import COPY_EXPONENT, Scaled, copy_rows, project
from triton_st.reference.mnrl_rows import (
    ALL_NEGATIVES,
    DOC_TO_DOC,
    DOC_TO_QUERY,
    HARD_NEGATIVES,
    IN_BATCH_NEGATIVES,
    QUERY_TO_DOC,
    QUERY_TO_QUERY,
)

PANEL_BYTES = 16 << 20
"""Most that a panel of weights takes."""
PANEL_ROWS = 4096
COPY_BYTES = 20 << 20
"""Most that the copies of all rows may take; where they take more, a panel's rows are copied for that panel."""
MIN_COPIED_ROWS = 1024
SUM_BYTES = 6 << 20
"""Most that the parts of one split sum take."""

WEIGHT_EXPONENT = 12
"""The largest weight is stored as 2^12 · [1, 2), times (1, 2] · (1, 2] for the mantissas of two norms: at most 2^15 in
half, and what is 2^-26 of it still has all 11 bits."""


class _Set:
    """Rows, and the copies of all of them, or None where these would take too much; the sums behind their gradient."""

    def __init__(self, rows: Scaled, copies: Tensor | None) -> None:
        self.rows, self.copies = rows, copies
        self.sums = rows.rows.new_empty(0)
        self.summed = False

    def part(self, part: slice) -> Tensor:
        """Copies of these rows."""
        return copy_rows(self.rows[part], self.rows[:0])[0] if self.copies is None else self.copies[part]


class _Block(NamedTuple):
    """One direction's similarities: row i is row left_first + i of `left`, columns are all of `right`."""

    direction: int
    left: _Set
    left_first: int
    right: _Set
    own_group: bool
    hardness: int
    left_ids: Tensor | None
    left_twins: Tensor | None
    right_ids: Tensor | None
    right_twins: Tensor | None


class _Panel(NamedTuple):
    """Some rows and columns of a block, as numbers of the block's, and their copies."""

    rows: slice
    columns: slice
    left: Tensor
    right: Tensor


def _chunks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _panels(block: _Block, row_count: int, rows: int, columns: int) -> Iterator[_Panel]:
    """Panels of at most rows × columns, all columns of the same rows one after the other."""
    for row_part in _chunks(row_count, rows):
        left = block.left.part(_moved(row_part, block.left_first))
        for column_part in _chunks(len(block.right.rows), columns):
            yield _Panel(row_part, column_part, left, block.right.part(column_part))


def _stripes(tile: Tile, rows: int, columns: int, parts: int | None = None) -> tuple[int, int]:
    """Into how many stripes of columns to cut a panel, and how many columns make a stripe."""
    tiles = triton.cdiv(columns, tile.columns)
    parts = parts or splits(triton.cdiv(rows, tile.rows), tiles)
    return parts, triton.cdiv(tiles, parts) * tile.columns


class _Loss:
    """The loss of one prefix: everything that its two sweeps share."""

    def __init__(
        self,
        queries: Tensor,
        documents: Tensor,
        all_queries: Tensor | None,
        targets: Tensor | None,
        offset: int,
        scale: Tensor,
        row_weights: Tensor | None,
        normalized: bool,
        directions: int,
        joint: bool,
        hardness_mode: int,
        hardness_strength: float,
        ids: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        margin: float | None,
        relative_margin: bool,
        weight: float,
    ) -> None:
        self.joint, self.strength, self.targets, self.offset = joint, hardness_strength, targets, offset
        self.row_count, self.d = queries.shape
        self.dtype, self.normalized = queries.dtype, normalized
        self.width = padded_width(queries.dtype, self.d)
        self.queries, self.documents, self.all_queries = self._sets(queries, documents, all_queries)
        self.period = len(queries if all_queries is None else all_queries)
        self.blocks = list(self._blocks(directions, hardness_mode, ids))
        self.weight = weight / (1 if joint else len(self.blocks))
        self.positives, self.row_scales, self.coefficients, self.bounds = positives(
            queries, documents, targets, offset, scale, row_weights,
            normalized=normalized, weight=self.weight, margin=margin, relative=relative_margin,
        )  # fmt: skip
        self.largest = torch.zeros(1, dtype=torch.int32, device=queries.device)
        self.logsumexps = queries.new_empty(1 if joint else len(self.blocks), self.row_count, dtype=torch.float32)

    def _sets(self, queries: Tensor, documents: Tensor, all_queries: Tensor | None) -> tuple[_Set, _Set, _Set]:
        present = [x for x in (queries, documents, all_queries) if x is not None]
        q, d, *w = (Scaled(x, normalized=self.normalized) for x in present)
        row_bytes = self.width * self.dtype.itemsize
        self.copied_rows = max(MIN_COPIED_ROWS, COPY_BYTES // (2 * row_bytes) // 128 * 128)
        if sum(map(len, present)) * row_bytes > COPY_BYTES:
            sets = [_Set(rows, None) for rows in (q, d, *w)]
        else:
            q_copy, d_copy = copy_rows(q, d)
            sets = [_Set(q, q_copy), _Set(d, d_copy), *(_Set(rows, copy_rows(rows, rows[:0])[0]) for rows in w)]
        return sets[0], sets[1], sets[-1] if w else sets[0]

    def _blocks(
        self, directions: int, hardness: int, ids: tuple[Tensor, Tensor, Tensor, Tensor] | None
    ) -> Iterator[_Block]:
        q, d, w = self.queries, self.documents, self.all_queries
        query_ids, target_ids, document_ids, owner_ids = ids or (None, None, None, None)
        if self.targets is not None or len(d.rows) == self.period:  # no query has documents but its positive
            hardness = {IN_BATCH_NEGATIVES: ALL_NEGATIVES, HARD_NEGATIVES: 0}.get(hardness, hardness)
        against_documents = (query_ids, target_ids, document_ids, owner_ids)
        against_queries = (target_ids, query_ids, owner_ids, document_ids)
        if directions & QUERY_TO_DOC:
            yield _Block(QUERY_TO_DOC, q, 0, d, False, hardness, *against_documents)
        if directions & QUERY_TO_QUERY:
            yield _Block(QUERY_TO_QUERY, q, 0, w, True, 0, *against_queries)
        if directions & DOC_TO_QUERY:
            yield _Block(DOC_TO_QUERY, d, self.offset, w, True, 0, *against_queries)
        if directions & DOC_TO_DOC:
            yield _Block(DOC_TO_DOC, d, self.offset, d, True, 0, *against_documents)

    def _arguments(self, block: _Block, panel: _Panel, tile: Tile, parts: int) -> dict[str, object]:
        """What both sweeps' kernels take of a panel."""
        left, right = block.left.rows[_moved(panel.rows, block.left_first)], block.right.rows[panel.columns]
        _, part_columns = _stripes(tile, len(panel.left), len(panel.right), parts)
        return {
            "left": panel.left, "right": panel.right, "left_norm": left.norm, "right_norm": right.norm,
            "row_scales": self.row_scales, "positives": self.positives, "bounds": self.bounds, "targets": self.targets,
            "left_ids": block.left_ids, "left_twins": block.left_twins,
            "right_ids": block.right_ids, "right_twins": block.right_twins, "strength": self.strength,
            "own_first": self.offset, "row_first": panel.rows.start, "column_first": panel.columns.start,
            "period": self.period, "left_count": len(panel.left), "right_count": len(panel.right),
            "part_columns": part_columns, "row_count": self.row_count, "depth": self.width,
            "D": self.width, "BLOCK_Q": tile.rows, "BLOCK_M": tile.columns, "BLOCK_K": tile.depth,
            "PRECISION": dot_precision(self.dtype), "OWN_GROUP": block.own_group, "HARDNESS": block.hardness,
            **tile.options,
        }  # fmt: skip

    def sum_up(self, losses: Tensor, diagnostics: Tensor | None, *, accumulate: bool) -> None:
        """First sweep: adds to the losses [B], fills in the diagnostics [4, B]."""
        b = self.row_count
        plans = []
        slots = 0
        for block in self.blocks:
            rows = b if block.left.copies is not None else min(b, self.copied_rows)
            columns = len(block.right.rows)
            columns = columns if block.right.copies is not None else min(columns, self.copied_rows)
            # Left alone, ptxas stops at 128 registers on sm_80 and spills three.
            tile = product_tile(self.dtype, rows, columns, epilogue=True)._replace(max_registers=255)
            parts, _ = _stripes(tile, rows, columns)
            plans.append((block, rows, columns, tile, slots, parts))
            slots += parts
        tops, totals = self.row_scales.new_empty(2, slots, b)
        diagnosed = plans[0][-1] if diagnostics is not None else 0
        hardest = None if diagnostics is None else tops.new_empty(diagnosed, b)
        above = None if hardest is None else torch.empty_like(hardest, dtype=torch.int32)
        for block, rows, columns, tile, slot, parts in plans:
            facts = block.direction == QUERY_TO_DOC and diagnostics is not None
            for panel in _panels(block, b, rows, columns):
                launch(
                    _sums_kernel, (triton.cdiv(len(panel.left), tile.rows), parts),
                    **self._arguments(block, panel, tile, parts), tops=tops, totals=totals,
                    hardest=hardest if facts else None, above=above if facts else None,
                    slot=slot, fresh=int(panel.columns.start == 0),
                )  # fmt: skip
        copies = 2.0 if any(block.direction == DOC_TO_QUERY for block in self.blocks) else 1.0
        softmaxes = [(0, slots, copies)] if self.joint else [(plan[-2], plan[-1], 1.0) for plan in plans]
        for i, (slot, count, copies) in enumerate(softmaxes):
            launch(
                _losses_kernel, (triton.cdiv(b, LOSS_ROWS),),
                tops=tops, totals=totals, positives=self.positives, row_scales=self.row_scales,
                coefficients=self.coefficients, losses=losses, logsumexps=self.logsumexps[i], largest=self.largest,
                hardest=hardest if i == 0 else None, above=above if i == 0 else None,
                diagnostics=diagnostics if i == 0 else None,
                slot=slot, slots=count, row_count=b, diagnosed=diagnosed, accumulate=int(accumulate or i > 0),
                weight=self.weight, copies=copies, BLOCK=LOSS_ROWS, num_warps=4,
            )  # fmt: skip

    def differentiate(self, grad_q: Tensor, grad_d: Tensor, grad_w: Tensor | None, *, accumulate: bool) -> Tensor:
        """Second sweep: writes, or adds to, the gradients; gives that of each row's scale [B].

        With probabilities p, unit rows q̂, d̂ and r_i = Σ p over the candidates of row i other than the positive t, the
        gradient of q̂_i is in proportion to Σ p_ij d̂_j − r_i d̂_t, and r_i q̂_i is subtracted from that of d̂_t. So the
        positive's term stays in float32, and is a sum, not a difference from 1.
        """
        b, m = self.row_count, len(self.documents.rows)
        whole = all(x.copies is not None for x in (self.queries, self.documents, self.all_queries))
        most_rows = PANEL_ROWS if whole else min(PANEL_ROWS, self.copied_rows)
        rows = min(b, most_rows)
        columns = max(64, PANEL_BYTES // (rows * self.dtype.itemsize) // 64 * 64)
        columns = min(max(m, self.period), columns if whole else min(columns, self.copied_rows))
        stride = triton.cdiv(columns, 16) * 16  # lines and panels begin at multiples of 16 bytes
        # What follows the product takes registers, which exact ones in float32 have none left of in their larger tile:
        # not `aligned` asks for the smaller.
        tile = product_tile(self.dtype, rows, columns, aligned=False, epilogue=True)
        parts, _ = _stripes(tile, rows, columns)
        weights = self.queries.rows.rows.new_empty(rows, stride)
        shares, slopes = self.row_scales.new_zeros(2, parts, b)
        exponent = WEIGHT_EXPONENT + (2 * (COPY_EXPONENT + 1) if self.normalized else 0)
        in_place = not accumulate and self.width == self.d and grad_q.is_contiguous()
        room = functools.partial(new_sums, weights, self.width, most_bytes=SUM_BYTES)
        self.documents.sums = room(columns, rows, m, out=grad_d if in_place else None)
        self.queries.sums = room(rows, columns, b, out=grad_q if in_place else None)
        if grad_w is not None:
            self.all_queries.sums = room(columns, rows, len(grad_w), out=grad_w if in_place else None)
        for i, block in enumerate(self.blocks):
            left, right = block.left, block.right
            new_left, new_right = not left.summed, not right.summed
            left.summed = right.summed = True
            for panel in _panels(block, b, rows, columns):
                launch(
                    _weights_kernel, (triton.cdiv(len(panel.left), tile.rows), parts),
                    **self._arguments(block, panel, tile, parts),
                    logsumexps=self.logsumexps[0 if self.joint else i], coefficients=self.coefficients,
                    largest=self.largest, weights=weights, shares=shares, slopes=slopes,
                    weight_scale=2.0**exponent, stride=stride,
                )  # fmt: skip
                panel_weights = weights[: len(panel.left), : len(panel.right)]
                weighted_sum(
                    panel_weights, panel.right, left.sums[:, _moved(panel.rows, block.left_first)],
                    accumulate=not (new_left and panel.columns.start == 0),
                )  # fmt: skip
                weighted_sum(
                    panel_weights, panel.left, right.sums[:, panel.columns],
                    transposed=True, accumulate=not (new_right and panel.rows.start == 0),
                )  # fmt: skip
        q, d, undo = self.queries.rows, self.documents.rows, 2.0**-exponent
        finish = functools.partial(project, undo=undo, over_norm=True, largest=self.largest, accumulate=accumulate)
        if self.targets is None:
            finish(self.queries.sums, q, grad_q, partner=d[self.offset :], share=shares)
            finish(self.documents.sums, d, grad_d, partner=q, share=shares, pair_first=self.offset)
        else:
            subtract_gathered(self.documents.sums, d, q, self.targets, shares, self.largest, undo)
            finish(self.queries.sums, q, grad_q, partner=d, partner_rows=self.targets, share=shares)
            finish(self.documents.sums, d, grad_d)
        if grad_w is not None and self.all_queries.summed:
            finish(self.all_queries.sums, self.all_queries.rows, grad_w)
        return slopes.sum(0)


def mnrl_rows(
    queries: Tensor,
    documents: Tensor,
    all_queries: Tensor | None,
    targets: Tensor | None,
    offset: int,
    scale: Tensor,
    row_weights: Tensor | None,
    normalized: bool,
    directions: int,
    joint: bool,
    hardness_mode: int,
    hardness_strength: float,
    query_ids: Tensor | None,
    document_ids: Tensor | None,
    owner_ids: Tensor | None,
    margin: float | None,
    relative_margin: bool,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    gradients: bool,
    diagnostics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, gradients and diagnostics as `triton_st.reference.mnrl_rows` has them."""
    sets = queries.contiguous(), documents.contiguous(), None if all_queries is None else all_queries.contiguous()
    b, d = queries.shape
    new = functools.partial(queries.new_empty, dtype=torch.float32)
    losses, facts = new(b), new(4, b) if diagnostics else new(0)
    passes = list(zip(dims or [d], dim_weights or [1.0], strict=True))[::-1]
    grads = [new(0) if x is None or not gradients else new(x.shape) for x in sets]
    if gradients and (passes[0][0] < d or (all_queries is not None and directions & ~DOC_TO_DOC == QUERY_TO_DOC)):
        grads = [grad.zero_() for grad in grads]  # what no pass writes
    grad_scale = new(b).zero_() if gradients else new(0)
    ids = None
    if query_ids is not None and document_ids is not None and owner_ids is not None:
        target_ids = document_ids[offset : offset + b] if targets is None else document_ids[targets]
        ids = query_ids.contiguous(), target_ids.contiguous(), document_ids.contiguous(), owner_ids.contiguous()
    for i, (dim, weight) in enumerate(passes):
        q, docs, others = (x if x is None else x[:, :dim] for x in sets)
        assert q is not None
        assert docs is not None
        prefix = _Loss(
            q, docs, others, targets, offset, scale, row_weights, normalized,
            directions, joint, hardness_mode, hardness_strength, ids, margin, relative_margin, weight,
        )  # fmt: skip
        prefix.sum_up(losses, facts if diagnostics and i == 0 else None, accumulate=i > 0)
        if gradients:
            grad_q, grad_d, grad_w = grads[0][:, :dim], grads[1][:, :dim], None if others is None else grads[2][:, :dim]
            grad_scale += prefix.differentiate(grad_q, grad_d, grad_w, accumulate=i > 0)
    return losses, grads[0], grads[1], grads[2], grad_scale, facts


def examples(dtype: torch.dtype, d: int) -> Iterator[Call]:
    """What the ahead-of-time check compiles: the plain form, and at one width forms with every option."""
    scale, ids = meta(dtype=torch.float32), meta(8192, dtype=torch.int64)
    plain: tuple[Any, ...]
    for b, m in example_sizes(d):
        pairs = meta(b, d, dtype=dtype), meta(m, d, dtype=dtype)
        plain = (None, None, 0, scale, None, True, QUERY_TO_DOC, True, 0, 0.0, None, None, None, None, False, [], [])
        yield mnrl_rows, (*pairs, *plain, True, False)
    if d != EXAMPLE_WIDTH or dtype == torch.bfloat16:
        return
    queries, documents = meta(8192, d, dtype=dtype), meta(16384, d, dtype=dtype)
    document_ids, weights = meta(16384, dtype=torch.int64), meta(8192, dtype=torch.float32)
    every_direction = QUERY_TO_DOC | QUERY_TO_QUERY | DOC_TO_QUERY | DOC_TO_DOC
    dims = [128, d] if dtype == torch.float16 else [d]
    yield mnrl_rows, (
        queries, documents, queries, None, 0, scale, weights, True, every_direction, True, IN_BATCH_NEGATIVES, 9.0,
        ids, document_ids, document_ids, 0.1, True, dims, [1.0] * len(dims), True, True,
    )  # fmt: skip
    if dtype == torch.float16:
        yield mnrl_rows, (
            queries, documents, None, ids, 0, weights, None, False, QUERY_TO_DOC, True, ALL_NEGATIVES, 9.0,
            None, None, None, None, False, [], [], True, False,
        )  # fmt: skip
