// Products of activations with weights that are packed once. Every result is summed in an order that the inner dimension
// alone decides, whatever the rows beside it, so that the bits of a row depend on that row alone.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "encoder_narrow.h"
#include "encoder_precision.h"

namespace triton_st {

// --- the register tile ---

// sums[kRows][2] = a[kRows, steps] · b[steps, kVecs · kWidth]. Lane (row, step) of a is at row · a_stride + step, or,
// kDepthMajor, at step · a_stride + row; step s of b begins at s · b_stride. With every step what lies kAhead bytes from
// it is asked for.
template <class P, bool kDepthMajor, int kVecs, int64_t kAhead, int kRows>
void multiply(const float* a, int64_t a_stride, const typename P::Weight* b, int64_t b_stride, int64_t steps,
              typename P::Sum* sums) {
  typename P::Sum acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[r][v] = typename P::Sum{};
  }
  // Rows are reached from every third one: x86 adds 0, 1 or 2 strides for nothing, and so few pointers fit registers.
  const float* third[(kRows + 2) / 3];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r += 3) third[r / 3] = kDepthMajor ? a + r : a + r * a_stride;
  for (int64_t step = 0; step < steps; ++step) {
    Vec w[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) w[v] = load(b + v * kWidth);
    if constexpr (kAhead > 0) {
      prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(b) + kAhead), kVecs * kWidth * sizeof(*b));
    }
    b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(third[r / 3] + (kDepthMajor ? r % 3 : r % 3 * a_stride));
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = P::multiply_add(x, w[v], acc[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r += 3) third[r / 3] += kDepthMajor ? a_stride : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) sums[2 * r + v] = acc[r][v];
  }
}

template <class P>
using Multiply = void (*)(const float*, int64_t, const typename P::Weight*, int64_t, int64_t, typename P::Sum*);

// The tile of `rows` ≤ kTileRows rows.
template <class P, bool kDepthMajor, int kVecs, int64_t kAhead = 0>
Multiply<P> multiply_of(int64_t rows) {
  static constexpr auto table = []<int... kRows>(std::integer_sequence<int, kRows...>) {
    return std::array<Multiply<P>, kTileRows>{&multiply<P, kDepthMajor, kVecs, kAhead, kRows + 1>...};
  }(std::make_integer_sequence<int, kTileRows>());
  return table[rows - 1];
}

// --- one dense layer ---

// y = x · Wᵀ + bias, W packed into panels of kPanel outputs; sizes are padded ones.
struct Dense {
  const void* panels;
  const float* bias;     // or null: zeros
  const float* scales;   // of each output, of weights of few bits
  const float* offsets;  // int8: of each output, see Operand
  int64_t inputs, outputs;
  int64_t panel_steps;  // from panel to panel
};

// Left operand of a product: lanes of 32 bits, slice_stride from slice to slice of a row; each row's scale and, of
// levels, its shift. As many times an output's offset are too much in the sums: the zero point times the sum of the
// weights, or, where sums are narrow, the sum of the row times what the weights are stored with.
struct Operand {
  const float* lanes;
  int64_t stride, slice_stride;
  const float* scales = nullptr;
  const float* shifts = nullptr;
  RowExcess* excess = nullptr;  // of each row, where sums are narrow
};

// Turns the sums of a panel's outputs into values: with the bias and the scales.
template <class P>
class Values {
 public:
  Values(const Dense& dense, const Operand& x, int64_t column) : x_(x) {
    for (int v = 0; v < kPanelVectors<P>; ++v) {
      bias_[v] = dense.bias ? load(dense.bias + column + v * kWidth) : Vec{};
      if constexpr (P::kScaled) scales_[v] = load(dense.scales + column + v * kWidth);
      if constexpr (P::kQuantised) offsets_[v] = load(dense.offsets + column + v * kWidth);
    }
  }
  // Of vector v of operand row `row`, whose sums stand at `sums`.
  Vec operator()(const typename P::Sum* sums, int v, int64_t row) const {
    if constexpr (P::kScaled) {
      Vec whole;
      if constexpr (P::kQuantised) {
        whole = fma(splat(-x_.shifts[row]), offsets_[v], __builtin_convertvector(sums[v], Vec));
      } else {
        whole = sum_of_orders(sums);
      }
      return fma(whole, scales_[v] * splat(x_.scales[row]), bias_[v]);
    } else {
      return sums[v] + bias_[v];
    }
  }

 private:
  // Of a row of multiply_slices' sums.
  static Vec sum_of_orders(const Ints* sums) {
    auto order = [&](int i) { return sums[i * kGroupRows<P>]; };
    Vec sum = __builtin_convertvector(order(4), Vec);
    sum = fma(sum, splat(1.f / 256), __builtin_convertvector(order(2) + order(3), Vec));
    sum = fma(sum, splat(1.f / 256), __builtin_convertvector(order(1), Vec));
    return fma(sum, splat(1.f / 256), __builtin_convertvector(order(0), Vec));
  }

  Operand x_;
  Vec bias_[2], scales_[2], offsets_[2];
};

// What lies beside the rows of a block; nothing where sums are wide.
template <class P>
auto excess_of_block(const Operand& x, int64_t row, int64_t rows) {
  if constexpr (P::kNarrowSums) {
    return BlockExcess(x.excess + row, rows);
  } else {
    return nullptr;
  }
}

// Bytes ahead that panels are asked for, one after the other as they lie. Unasked, with AVX-512 one text in float32 takes
// a quarter to a half longer.
inline constexpr int64_t kPanelsAhead = kWidth < 16 ? 4096 : 8192;

// consume(row, column, values...): vectors of the values of a panel's outputs, from `column` on, for each of `rows` rows
// from `row` on and each of `panels` panels from `panel` on.
template <class P, class Consume>
void dense_product(const Operand& x, int64_t row, int64_t rows, const Dense& dense, int64_t panel, int64_t panels,
                   Consume&& consume)
  requires(!P::kTiled)
{
  const int64_t steps = panel_steps<P>(dense.inputs);
  alignas(64) typename P::Sum sums[2 * kTileRows];
  [[maybe_unused]] const auto excess = excess_of_block<P>(x, row, rows);
  for (int64_t p = panel; p < panel + panels; ++p) {
    const auto* weights = static_cast<const typename P::Weight*>(dense.panels) + p * dense.panel_steps * kPanel;
    const Values<P> values(dense, x, p * kPanel);
    int64_t group_index = 0;
    for_row_groups(rows, [&](int64_t group, int64_t count) {
      const int64_t first = row + group;
      multiply_of<P, false, 2, kPanelsAhead>(count)(x.lanes + first * x.stride, x.stride, weights, kPanel, steps, sums);
      if constexpr (P::kNarrowSums) excess.template add<P>(group_index++, weights, sums);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = first + r;
        consume(at, p * kPanel, values(sums + 2 * r, 0, at), values(sums + 2 * r, 1, at));
      }
    });
  }
}

}  // namespace triton_st
