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

Several prefixes (Matryoshka dims) take the same four products: a prefix's dot products are partial sums of the longest
one's, and a segment's columns are multiplied with the sum of all weights that reach them. Norms, masks, logits and the
online log-sum-exp are each prefix's own, and so is what lies along the rows: it is summed from weights and similarities
as they are formed, because the sums of several prefixes do not tell it apart. With one prefix none of this is compiled:
that form has its own kernels, in `mnrl_blocks` and `rows`; those of several are in `mnrl_prefix_blocks` and
`mnrl_prefix_rows`. Weights are summed up from the longest prefix on, dot products from the shortest: so a panel's
products of all prefixes are stored in float32, and turned into weights by a kernel of their own. (Kept in registers
instead, four prefixes' spilled on every NVIDIA GPU.) Panels of both together take half as much again as `PANEL_BYTES`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from triton_st.kernels.common import Tile, dot_precision, launch, product_tile
from triton_st.kernels.mnrl_blocks import _sums_kernel, _weights_kernel
from triton_st.kernels.mnrl_panels import Block, Panel, RowSet, moved, panels, stripes
from triton_st.kernels.mnrl_prefix_rows import PrefixRows, Segments
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


class Sweeps:
    """Both sweeps of the loss, and what they share; where only the first `dims[0]` columns are compared."""

    weights: Tensor
    """Of a panel: [prefixes, rows, columns], one for the product of each segment."""
    shares: Tensor
    """Of each prefix, part and row: coefficient · Σ probability, [prefixes, parts, B]."""
    slopes: Tensor
    """Of each part and row: gradient of the row's scale, [parts, B]."""
    exponent: int
    """Weights are stored times 2 to this power."""

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
        dims: Sequence[int],
        dim_weights: Sequence[float],
    ) -> None:
        self.joint, self.strength, self.targets, self.offset = joint, hardness_strength, targets, offset
        self.row_count, self.d = len(queries), dims[-1]
        self.dtype, self.normalized = queries.dtype, normalized
        self.segments = Segments.of(queries.dtype, dims)
        self.prefixes, self.width = len(dims), self.segments.width
        self.queries, self.documents, self.all_queries = self._sets(queries, documents, all_queries)
        self.period = len(queries if all_queries is None else all_queries)
        self.blocks = list(self._blocks(directions, hardness_mode, ids))
        self.dim_weights = [weight / (1 if joint else len(self.blocks)) for weight in dim_weights]
        new = functools.partial(queries.new_empty, dtype=torch.float32)
        facts = new(3 if margin is None else 4, self.prefixes, self.row_count)
        for p, (dim, weight) in enumerate(zip(dims, self.dim_weights, strict=True)):
            positives(
                queries[:, :dim], documents[:, :dim], targets, offset, scale, row_weights,
                normalized=normalized, weight=weight, margin=margin, relative=relative_margin, out=facts[:, p],
            )  # fmt: skip
        self.positives, self.row_scales, self.coefficients = facts[0], facts[1, 0], facts[2]
        self.bounds = None if margin is None else facts[3]
        self.largest = torch.zeros(1, dtype=torch.int32, device=queries.device)
        self.logsumexps = new(1 if joint else len(self.blocks), self.prefixes, self.row_count)

    def _sets(self, queries: Tensor, documents: Tensor, all_queries: Tensor | None) -> tuple[RowSet, RowSet, RowSet]:
        sets = [
            RowSet(self._scaled(x[:, : self.d]), self.segments)
            for x in (queries, documents, all_queries)
            if x is not None
        ]
        row_bytes = self.width * self.dtype.itemsize
        self.copied_rows = max(MIN_COPIED_ROWS, COPY_BYTES // (2 * row_bytes) // 128 * 128)
        if sum(len(x.rows) for x in sets) * row_bytes <= COPY_BYTES:
            q, d = sets[0], sets[1]
            if isinstance(q.rows, Scaled) and isinstance(d.rows, Scaled):  # both in one launch
                q.copies, d.copies = copy_rows(q.rows, d.rows)
            for x in sets:
                x.copies = x.copied() if x.copies is None else x.copies
        return sets[0], sets[1], sets[-1] if all_queries is not None else sets[0]

    def _scaled(self, rows: Tensor) -> Scaled | PrefixRows:
        return Scaled(rows, normalized=self.normalized)

    def _blocks(
        self, directions: int, hardness: int, ids: tuple[Tensor, Tensor, Tensor, Tensor] | None
    ) -> Iterator[Block]:
        q, d, w = self.queries, self.documents, self.all_queries
        query_ids, target_ids, document_ids, owner_ids = ids or (None, None, None, None)
        if self.targets is not None or len(d.rows) == self.period:  # no query has documents but its positive
            hardness = {IN_BATCH_NEGATIVES: ALL_NEGATIVES, HARD_NEGATIVES: 0}.get(hardness, hardness)
        against_documents = (query_ids, target_ids, document_ids, owner_ids)
        against_queries = (target_ids, query_ids, owner_ids, document_ids)
        if directions & QUERY_TO_DOC:
            yield Block(QUERY_TO_DOC, q, 0, d, False, hardness, *against_documents)
        if directions & QUERY_TO_QUERY:
            yield Block(QUERY_TO_QUERY, q, 0, w, True, 0, *against_queries)
        if directions & DOC_TO_QUERY:
            yield Block(DOC_TO_QUERY, d, self.offset, w, True, 0, *against_queries)
        if directions & DOC_TO_DOC:
            yield Block(DOC_TO_DOC, d, self.offset, d, True, 0, *against_documents)

    def _operands(self, panel: Panel, tile: Tile) -> dict[str, object]:
        """What kernels that form dot products take of a panel."""
        return {
            "left": panel.left, "right": panel.right, "D": self.width,
            "BLOCK_Q": tile.rows, "BLOCK_M": tile.columns, "BLOCK_K": tile.depth,
            "PRECISION": dot_precision(self.dtype), **tile.options,
        }  # fmt: skip

    def _facts(self, block: Block, panel: Panel) -> dict[str, object]:
        """What kernels that turn dot products into logits take of a panel."""
        left, right = block.left.rows[moved(panel.rows, block.left_first)], block.right.rows[panel.columns]
        return {
            "left_norm": left.norm, "right_norm": right.norm,
            "row_scales": self.row_scales, "positives": self.positives, "bounds": self.bounds, "targets": self.targets,
            "left_ids": block.left_ids, "left_twins": block.left_twins,
            "right_ids": block.right_ids, "right_twins": block.right_twins, "strength": self.strength,
            "own_first": self.offset, "row_first": panel.rows.start, "column_first": panel.columns.start,
            "period": self.period, "left_count": len(panel.left), "right_count": len(panel.right),
            "row_count": self.row_count, "OWN_GROUP": block.own_group, "HARDNESS": block.hardness,
        }  # fmt: skip

    def sum_up(self, losses: Tensor, diagnostics: Tensor | None) -> None:
        """First sweep: fills in the losses [B] and the diagnostics [4, B]."""
        b = self.row_count
        plans = []
        slots = 0
        for block in self.blocks:
            rows = b if block.left.copies is not None else min(b, self.copied_rows)
            columns = len(block.right.rows)
            columns = columns if block.right.copies is not None else min(columns, self.copied_rows)
            # Left alone, ptxas stops at 128 registers on sm_80 and spills three.
            tile = self._sums_tile(product_tile(self.dtype, rows, columns, epilogue=True)._replace(max_registers=255))
            parts, _ = stripes(tile, rows, columns)
            plans.append((block, rows, columns, tile, slots, parts))
            slots += parts
        tops, totals = self.row_scales.new_empty(2, self.prefixes, slots, b)
        diagnosed = plans[0][-1] if diagnostics is not None else 0
        hardest = None if diagnostics is None else tops.new_empty(diagnosed, b)
        above = None if hardest is None else torch.empty_like(hardest, dtype=torch.int32)
        for block, rows, columns, tile, slot, parts in plans:
            facts = block.direction == QUERY_TO_DOC and diagnostics is not None
            for panel in panels(block, b, rows, columns):
                self._sum_panel(
                    (triton.cdiv(len(panel.left), tile.rows), parts),
                    self._operands(panel, tile) | self._facts(block, panel) | {
                        "tops": tops, "totals": totals,
                        "part_columns": stripes(tile, len(panel.left), len(panel.right), parts)[1],
                        "hardest": hardest if facts else None, "above": above if facts else None,
                        "slot": slot, "fresh": int(panel.columns.start == 0),
                    },
                    slots,
                )  # fmt: skip
        copies = 2.0 if any(block.direction == DOC_TO_QUERY for block in self.blocks) else 1.0
        softmaxes = [(0, slots, copies)] if self.joint else [(plan[-2], plan[-1], 1.0) for plan in plans]
        for p, weight in enumerate(self.dim_weights):
            for i, (slot, count, copies) in enumerate(softmaxes):
                facts = p == self.prefixes - 1 and i == 0
                launch(
                    _losses_kernel, (triton.cdiv(b, LOSS_ROWS),),
                    tops=tops[p], totals=totals[p], positives=self.positives[p], row_scales=self.row_scales,
                    coefficients=self.coefficients[p], losses=losses, logsumexps=self.logsumexps[i, p],
                    largest=self.largest, hardest=hardest if facts else None, above=above if facts else None,
                    diagnostics=diagnostics if facts else None,
                    slot=slot, slots=count, row_count=b, diagnosed=diagnosed, accumulate=int(p + i > 0),
                    weight=weight, copies=copies, BLOCK=LOSS_ROWS, num_warps=4,
                )  # fmt: skip

    def _sums_tile(self, tile: Tile) -> Tile:
        return tile

    def _sum_panel(self, grid: tuple[int, int], arguments: dict[str, object], slots: int) -> None:
        launch(_sums_kernel, grid, **arguments, depth=self.width)

    def differentiate(self, grad_q: Tensor, grad_d: Tensor, grad_w: Tensor | None) -> Tensor:
        """Second sweep: writes the gradients; gives that of each row's scale [B].

        With probabilities p, unit rows q̂, d̂ and r_i = Σ p over the candidates of row i other than the positive t, the
        gradient of q̂_i is in proportion to Σ p_ij d̂_j − r_i d̂_t, and r_i q̂_i is subtracted from that of d̂_t. So the
        positive's term stays in float32, and is a sum, not a difference from 1.
        """
        b, m = self.row_count, len(self.documents.rows)
        whole = all(x.copies is not None for x in (self.queries, self.documents, self.all_queries))
        most_rows = PANEL_ROWS // math.isqrt(self.prefixes)
        rows = min(b, most_rows if whole else min(most_rows, self.copied_rows))
        columns = max(64, PANEL_BYTES // (rows * self._panel_bytes()) // 64 * 64)
        columns = min(max(m, self.period), columns if whole else min(columns, self.copied_rows))
        stride = triton.cdiv(columns, 16) * 16  # lines and panels begin at multiples of 16 bytes
        weights = self.weights = self.queries.rows.rows.new_empty(self.prefixes, rows, stride)
        exponent = WEIGHT_EXPONENT - (self.prefixes - 1).bit_length()
        self.exponent = exponent + (2 * (COPY_EXPONENT + 1) if self.normalized else 0)
        starts, edges = self.segments.starts, self._sum_edges()
        in_place = edges[-1] == self.d and grad_q.is_contiguous()
        room = functools.partial(new_sums, weights, starts, width=edges[-1], most_bytes=SUM_BYTES)
        self.documents.sums = room(columns, rows, m, out=grad_d if in_place else None)
        self.queries.sums = room(rows, columns, b, out=grad_q if in_place else None)
        if grad_w is not None:
            self.all_queries.sums = room(columns, rows, len(grad_w), out=grad_w if in_place else None)
        # What follows the product takes registers, which exact ones in float32 have none left of in their larger tile:
        # not `aligned` asks for the smaller.
        tile = product_tile(self.dtype, rows, columns, aligned=False, epilogue=True)
        self._start_weights(tile, rows, columns)
        for i, block in enumerate(self.blocks):
            left, right = block.left, block.right
            new_left, new_right = not left.summed, not right.summed
            left.summed = right.summed = True
            for panel in panels(block, b, rows, columns):
                self._weigh(
                    block, panel, tile,
                    self._facts(block, panel) | {
                        "logsumexps": self.logsumexps[0 if self.joint else i], "coefficients": self.coefficients,
                        "largest": self.largest, "weights": weights, "shares": self.shares, "slopes": self.slopes,
                        "weight_scale": 2.0**self.exponent, "stride": stride,
                    },
                )  # fmt: skip
                panel_weights = weights[:, : len(panel.left), : len(panel.right)]
                weighted_sum(
                    panel_weights, panel.right, left.sums[:, moved(panel.rows, block.left_first)],
                    starts=starts, edges=edges, accumulate=not (new_left and panel.columns.start == 0),
                )  # fmt: skip
                weighted_sum(
                    panel_weights, panel.left, right.sums[:, panel.columns],
                    starts=starts, edges=edges, transposed=True, accumulate=not (new_right and panel.rows.start == 0),
                )  # fmt: skip
        self._finish(grad_q, grad_d, grad_w)
        return self.slopes.sum(0)

    def _panel_bytes(self) -> int:
        """Of `PANEL_BYTES`, what one row and column takes."""
        return self.dtype.itemsize

    def _sum_edges(self) -> tuple[int, ...]:
        """Where segments of the sums begin and end: widened like copies, for one product writes them all."""
        return self.segments.starts

    def _start_weights(self, tile: Tile, rows: int, columns: int) -> None:
        """Makes room for what the weights' kernel sums up in panels of at most rows × columns."""
        parts, _ = stripes(tile, rows, columns)
        self.shares = self.row_scales.new_zeros(1, parts, self.row_count)
        self.slopes = self.row_scales.new_zeros(parts, self.row_count)

    def _weigh(self, block: Block, panel: Panel, tile: Tile, arguments: dict[str, object]) -> None:
        """Fills in the weights of a panel."""
        rows, columns = len(panel.left), len(panel.right)
        parts, part_columns = stripes(tile, rows, columns, self.shares.shape[1])
        launch(
            _weights_kernel, (triton.cdiv(rows, tile.rows), parts),
            **self._operands(panel, tile), **arguments, part_columns=part_columns, depth=self.width,
        )  # fmt: skip

    def _finish(self, grad_q: Tensor, grad_d: Tensor, grad_w: Tensor | None) -> None:
        """Gradients from what the panels have summed up."""
        q, d, w = self.queries.rows, self.documents.rows, self.all_queries.rows
        assert isinstance(q, Scaled)
        assert isinstance(d, Scaled)
        assert isinstance(w, Scaled)
        undo, shares = 2.0**-self.exponent, self.shares[0]
        finish = functools.partial(project, undo=undo, over_norm=True, largest=self.largest)
        if self.targets is None:
            finish(self.queries.sums, q, grad_q, partner=d[self.offset :], share=shares)
            finish(self.documents.sums, d, grad_d, partner=q, share=shares, pair_first=self.offset)
        else:
            subtract_gathered(self.documents.sums, d, q, self.targets, shares, self.largest, undo)
            finish(self.queries.sums, q, grad_q, partner=d, partner_rows=self.targets, share=shares)
            finish(self.documents.sums, d, grad_d)
        if grad_w is not None and self.all_queries.summed:
            finish(self.all_queries.sums, w, grad_w)
