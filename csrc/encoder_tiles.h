// Products with packed weights by AMX's tiles, which the caller holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "encoder_product.h"

namespace triton_st {

// What a thread holds while it forms products of a precision.
struct NoTiles {};
#if defined(TRITON_ST_AMX)
template <class P>
using Tiles = std::conditional_t<P::kTiled, AmxTiles, NoTiles>;
#else
template <class P>
using Tiles = NoTiles;
#endif

#if defined(TRITON_ST_AMX)

// Sums of kGroupRows rows of an operand, of which the first `rows` count, by a panel.
template <class P, class Between>
void multiply_group(const Operand& x, int64_t row, int64_t rows, const float* panel, int64_t chunks,
                    typename P::Sum* sums, Between&& between) {
  const float* a = x.lanes + row * x.stride;
  if constexpr (P::kSliced) {
    multiply_slices<P::kWeightSlices>(a, x.stride, x.slice_stride, panel, chunks, sums, between);
  } else if (rows > kAmxRows) {
    multiply_tiles<typename P::Sum, 1, true, true>(a, x.stride, 0, panel, chunks, sums, between);
  } else {
    multiply_tiles<typename P::Sum, 1, false, true>(a, x.stride, 0, panel, chunks, sums, between);
  }
}

// The dense_product of encoder_product.h. The values of one group's sums are made and consumed while tiles form the next.
template <class P, class Consume>
void dense_product(const Operand& x, int64_t row, int64_t rows, const Dense& dense, int64_t panel, int64_t panels,
                   Consume&& consume)
  requires(P::kTiled)
{
  using Sum = typename P::Sum;
  constexpr int64_t kRows = kGroupRows<P>, kVectors = kPanelVectors<P>;
  if (rows == 0) return;
  const int64_t chunks = row_lanes<P>(dense.inputs) / kAmxLanes;
  struct Group {
    int64_t row, rows, column;
    const Sum* sums;
  };
  alignas(64) Sum sums[2][P::kSliced ? kOrderSums * kRows : kVectors * kRows];
  std::optional<Group> before;
  auto finish = [&](const Group& group, int64_t begin, int64_t end) {
    const Values<P> values(dense, x, group.column);
    auto finish_row = [&](int64_t r) {
      const Sum* row_sums = group.sums + kVectors * r;
      const int64_t at = group.row + r;
      if constexpr (kVectors == 1) {
        consume(at, group.column, values(row_sums, 0, at));
      } else {
        consume(at, group.column, values(row_sums, 0, at), values(row_sums, 1, at));
      }
    };
    constexpr int64_t kBeside = 4 - kVectors;  // rows that hide what each other waits for
    end = std::min(end, group.rows);
    int64_t r = begin;
    for (; r + kBeside <= end; r += kBeside) {
#pragma GCC unroll 3
      for (int64_t i = 0; i < kBeside; ++i) finish_row(r + i);
    }
    for (; r < end; ++r) finish_row(r);
  };
  // While a panel is multiplied the next one comes from memory, some of it between every two chunks.
  const int64_t panel_lanes = dense.panel_steps * kPanelColumns<P>;
  const int64_t used_lanes = panel_steps<P>(dense.inputs) * kPanelColumns<P>, rows_a_chunk = ceil_div(kRows, chunks);
  const int64_t fetched =
      round_up(ceil_div(used_lanes, ceil_div(rows, kRows) * chunks), kLine / static_cast<int64_t>(sizeof(float)));
  int next = 0;
  for (int64_t p = panel; p < panel + panels; ++p) {
    const float* weights = static_cast<const float*>(dense.panels) + p * panel_lanes;
    const float* fetch = p + 1 < panel + panels ? weights + panel_lanes : nullptr;
    for (int64_t group = 0; group < rows; group += kRows) {
      const int64_t first = row + group, count = std::min(kRows, rows - group);
      multiply_group<P>(x, first, count, weights, chunks, sums[next], [&](int64_t chunk) {
        if (fetch) {
          prefetch<2>(fetch, fetched * static_cast<int64_t>(sizeof(float)));
          fetch += fetched;
        }
        if (before) finish(*before, chunk * rows_a_chunk, (chunk + 1) * rows_a_chunk);
      });
      before = Group{first, count, p * kPanelColumns<P>, sums[next]};
      next = 1 - next;
    }
  }
  if (before) finish(*before, 0, before->rows);
}

#endif

}  // namespace triton_st
