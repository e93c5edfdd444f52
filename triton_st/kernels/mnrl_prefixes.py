"""The sweeps of the loss of several prefixes of the rows, the Matryoshka dims."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from triton_st.kernels.common import Tile, dot_precision, launch, on_hip
from triton_st.kernels.mnrl_panels import Block, Panel, moved
from triton_st.kernels.mnrl_prefix_blocks import _prefix_products_kernel, _prefix_sums_kernel, _prefix_weights_kernel
from triton_st.kernels.mnrl_prefix_rows import PrefixRows, pair_factors, project_prefixes
from triton_st.kernels.mnrl_reduce import subtract_gathered_prefixes
from triton_st.kernels.mnrl_sweeps import Sweeps

WEIGHTS_ROWS, WEIGHTS_COLUMNS = 32, 64
"""Of a block of the kernel that turns products into weights."""


class PrefixSweeps(Sweeps):
    """`Sweeps` of several prefixes: as many products as for one."""

    def _scaled(self, rows: Tensor) -> PrefixRows:
        return PrefixRows(rows, self.prefixes, normalized=self.normalized)

    def _operands(self, panel: Panel, tile: Tile) -> dict[str, object]:
        return super()._operands(panel, tile) | {"ENDS": self.segments.ends(tile.depth)}

    def _facts(self, block: Block, panel: Panel) -> dict[str, object]:
        return super()._facts(block, panel) | {"PREFIXES": self.prefixes} | self._ratios(block, panel)

    def _ratios(self, block: Block, panel: Panel) -> dict[str, object]:
        left, right = block.left.rows[moved(panel.rows, block.left_first)], block.right.rows[panel.columns]
        assert isinstance(left, PrefixRows)
        assert isinstance(right, PrefixRows)
        return {
            "left_ratio": left.ratio, "right_ratio": right.ratio, "left_lines": left.lines, "right_lines": right.lines
        }  # fmt: skip

    def _sums_tile(self, tile: Tile) -> Tile:
        # With every option, exact products and the running sums of more than eight prefixes spill in larger tiles.
        exact = self.dtype == torch.float32 and dot_precision(self.dtype) == "ieee" and not on_hip()
        if exact or self.prefixes > 8:
            return tile._replace(rows=64, columns=32, num_warps=8)
        return tile

    def _sum_panel(self, grid: tuple[int, int], arguments: dict[str, object], slots: int) -> None:
        launch(_prefix_sums_kernel, grid, **arguments, slots=slots, LANES=triton.next_power_of_2(self.prefixes))

    def _panel_bytes(self) -> int:
        # Products lie beside the weights. Both may take half as much again as weights alone: smaller panels would be
        # launched faster than they are computed.
        return max(1, self.prefixes * (self.dtype.itemsize + torch.float32.itemsize) * 2 // 3)

    def _sum_edges(self) -> tuple[int, ...]:
        return self.segments.edges  # widened, all segments might take far more than the gradient

    def _start_weights(self, tile: Tile, rows: int, columns: int) -> None:
        parts = triton.cdiv(columns, WEIGHTS_COLUMNS)
        new = self.row_scales.new_zeros
        self.shares, self.slopes = new(self.prefixes, parts, self.row_count), new(parts, self.row_count)
        self.products = torch.empty_like(self.weights, dtype=torch.float32)
        if self.normalized:
            for x in (self.queries, self.documents, self.all_queries):
                x.along = new(self.prefixes, len(x.rows))
            self.query_along, self.target_along = new(2, self.prefixes, parts, self.row_count)

    def _weigh(self, block: Block, panel: Panel, tile: Tile, arguments: dict[str, object]) -> None:
        rows, columns = len(panel.left), len(panel.right)
        blocks = triton.cdiv(rows, WEIGHTS_ROWS)
        left_along = right_along = None
        if self.normalized:
            left_along = self.query_along if block.left is self.queries else self.target_along
            right_along = self.products.new_empty(blocks, self.prefixes, columns)
        where = {"products": self.products, "panel": self.products.stride(0)}
        launch(
            _prefix_products_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)),
            **self._operands(panel, tile), **self._ratios(block, panel), **where, stride=arguments["stride"],
            left_count=rows, right_count=columns, PREFIXES=self.prefixes,
        )  # fmt: skip
        launch(
            _prefix_weights_kernel, (blocks, triton.cdiv(columns, WEIGHTS_COLUMNS)), **arguments, **where,
            left_along=left_along, right_along=right_along, parts=self.shares.shape[1],
            STILL=self.normalized and self.segments.edges[1] == 1,
            BLOCK_Q=WEIGHTS_ROWS, BLOCK_M=WEIGHTS_COLUMNS, num_warps=8,
        )  # fmt: skip
        if right_along is not None:
            block.right.along[:, panel.columns] += right_along.sum(0)

    def _finish(self, grad_q: Tensor, grad_d: Tensor, grad_w: Tensor | None) -> None:
        q, d, w = self.queries.rows, self.documents.rows, self.all_queries.rows
        assert isinstance(q, PrefixRows)
        assert isinstance(d, PrefixRows)
        assert isinstance(w, PrefixRows)
        undo, shares = 2.0**-self.exponent, self.shares.sum(1)
        radials, factors = shares * self.positives, pair_factors(shares, q, d, self.targets, self.offset)
        along = [x.along if self.normalized else None for x in (self.queries, self.documents, self.all_queries)]
        if self.normalized:
            self.queries.along += self.query_along.sum(1)
            self.documents.along[:, self.offset : self.offset + self.row_count] += self.target_along.sum(1)
        finish = functools.partial(
            project_prefixes, segments=self.segments, undo=undo, largest=self.largest, factors=factors, radials=radials
        )
        if self.targets is None:
            finish(self.queries.sums, q, along[0], grad_q, partner=d[self.offset :])
            finish(self.documents.sums, d, along[1], grad_d, partner=q, pair_first=self.offset)
        else:
            subtract_gathered_prefixes(
                self.documents.sums, along[1], q, self.targets, factors, radials, self.segments, self.largest, undo
            )
            finish(self.queries.sums, q, along[0], grad_q, partner=d, partner_rows=self.targets)
            finish(self.documents.sums, d, along[1], grad_d)
        if grad_w is not None and self.all_queries.summed:
            finish(self.all_queries.sums, w, along[2], grad_w)
