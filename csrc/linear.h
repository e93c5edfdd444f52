// Products of activations with weights: weights packed once per call, an epilogue that meets each strip of results
// while it is in the first-level cache, and weight gradients. Sums are fp32, in an order that the shapes alone decide.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemm.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

// What activations of type T are as operands: bf16 where the processor multiplies it, else fp32.
template <class T>
using Operand = std::conditional_t<kPairs<T>, BFloat16, float>;

// Elements from one row of an operand to the next: whole vectors, and no multiple of the cache's period.
template <class C>
constexpr int64_t operand_stride(int64_t cols) {
  constexpr int64_t kElements = sizeof(float) / sizeof(C) * kWidth;
  const int64_t stride = round_up(cols, kElements);
  return stride % (4 * kElements) ? stride : stride + kElements;
}

// Floats that an operand of this shape takes.
template <class C>
constexpr int64_t operand_floats(int64_t rows, int64_t cols) {
  return rows * operand_stride<C>(cols) / static_cast<int64_t>(sizeof(float) / sizeof(C));
}

template <class C>
Matrix<C> new_operand(Buffer& memory, int64_t rows, int64_t cols) {
  return {reinterpret_cast<C*>(memory.reserve(operand_floats<C>(rows, cols))), rows, cols, operand_stride<C>(cols)};
}

// Columns [column, column + kPanel) of an operand's row; those past its end, up to whole vectors, are for zeros.
inline void store_strip(float* row, int64_t n, Vec low, Vec high) {
  store(row, low);
  if (n > kWidth) store(row + kWidth, high);
}
#if defined(TRITON_ST_BF16_DOT)
inline void store_strip(BFloat16* row, int64_t, Vec low, Vec high) {
  store(reinterpret_cast<float*>(row), pair_adjacent(low, high));
}
#endif

// At most n of a strip's kPanel elements.
template <class T>
inline void store_exactly(T* row, int64_t n, Vec low, Vec high) {
  store_some(row, low, n);
  store_some(row + kWidth, high, n - kWidth);
}

// Activations as an operand: themselves if they are lanes as they lie in memory, else a copy.
template <class C, class T>
Matrix<const C> as_operand(Matrix<const T> x, Buffer& memory) {
  if constexpr (std::is_same_v<C, float> && std::is_same_v<T, float>) {
    return x;
  } else {
    if constexpr (std::is_same_v<C, T>) {
      if (x.cols % 2 == 0 && x.stride % 2 == 0) return x;
    }
    const Matrix<C> copy = new_operand<C>(memory, x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) {
      const T* from = x.row(r);
      for (int64_t k = 0; k < x.cols; k += kPanel) {
        const int64_t n = x.cols - k;
        store_strip(copy.row(r) + k, n, load_some(from + k, n), load_some(from + k + kWidth, n - kWidth));
      }
    }
    return {copy.data, copy.rows, copy.cols, copy.stride};
  }
}

// A weight [N, K] as the right operand of products: of x · Wᵀ (forward) or of y · W (backward).
template <class C>
class PackedWeight {
 public:
  // The right operand of x · Wᵀ, x [M, K].
  void transposed(Matrix<const float> weight) { reserve(weight.cols, weight.rows), forward_ = true, weight_ = weight; }
  // The right operand of y · W, y [M, N].
  void plain(Matrix<const float> weight) { reserve(weight.rows, weight.cols), forward_ = false, weight_ = weight; }

  int64_t panels() const { return ceil_div(columns_, kPanel); }
  int64_t columns() const { return columns_; }
  int64_t steps() const { return steps_; }
  const float* panel(int64_t p) const { return memory_.get() + p * steps_ * kPanel; }

  void pack_panel(int64_t p) {
    static constexpr auto kOnes = [] {
      std::array<float, kPanel> ones{};
      ones.fill(1.f);
      return ones;
    }();
    const int64_t first = p * kPanel, count = std::min<int64_t>(kPanel, columns_ - first);
    float* out = memory_.get() + p * steps_ * kPanel;
    if (forward_) {
      pack_transposed<kPaired, float>({weight_.row(first), count, weight_.cols, weight_.stride}, kOnes.data(), out);
    } else {
      pack_depth<kPaired, float>({weight_.data + first, weight_.rows, count, weight_.stride}, nullptr, out, 0, kPanel);
    }
  }

 private:
  static constexpr bool kPaired = std::is_same_v<C, BFloat16>;
  void reserve(int64_t depth, int64_t columns) {
    steps_ = lanes<kPaired>(depth);
    columns_ = columns;
    memory_.reserve(panels() * kPanel * steps_);
  }

  Buffer memory_;
  Matrix<const float> weight_{};
  int64_t steps_ = 0, columns_ = 0;
  bool forward_ = true;
};

// Packs several weights, on all threads.
template <class C>
void pack_all(std::initializer_list<PackedWeight<C>*> weights) {
  int64_t units = 0, lanes = 0;
  for (const PackedWeight<C>* weight : weights) {
    units += weight->panels();
    lanes += weight->panels() * kPanel * weight->steps();
  }
  parallel(units, lanes / 4, [&](int64_t unit) {
    for (PackedWeight<C>* weight : weights) {
      if (unit < weight->panels()) return weight->pack_panel(unit);
      unit -= weight->panels();
    }
  });
}

// Products of the rows of x with a packed weight, kPanel columns at a time: epilogue(column, strip) finds the result of
// row r and column + c at strip[r · kPanel + c].
template <class C, class Epilogue>
void multiply(Matrix<const C> x, const PackedWeight<C>& weight, Buffer& strip_memory, Epilogue&& epilogue) {
  constexpr bool kPaired = std::is_same_v<C, BFloat16>;
  const int64_t steps = weight.steps(), stride = x.stride / (kPaired ? 2 : 1);
  const int64_t parts = std::max<int64_t>(ceil_div(steps, kSumSteps), 1);
  const float* left = reinterpret_cast<const float*>(x.data);
  float* strip = strip_memory.reserve(x.rows * kPanel);
  for (int64_t p = 0; p < weight.panels(); ++p) {
    const float* panel = weight.panel(p);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t step = steps * part / parts, count = steps * (part + 1) / parts - step;
      for_row_groups(x.rows, [&](int64_t row, int64_t rows) {
        tile_of<kPaired, false>(rows)(left + row * stride + step, stride, panel + step * kPanel, kPanel, count,
                                      strip + row * kPanel, kPanel, part > 0);
      });
    }
    epilogue(p * kPanel, strip);
  }
}

// sums[N, round_up(K, kPanel)] = (or, onto them, +=) dᵀ · x, the rows of d [M, N] and of x [M, K] being the steps: a
// weight's gradient. At most kBlockDepth rows are summed in one run.
template <class C, class S>
void accumulate_outer(Matrix<const C> d, Matrix<const S> x, float* sums, int64_t sums_stride, bool onto) {
  constexpr bool kPaired = std::is_same_v<C, BFloat16>;
  const int64_t panels = ceil_div(x.cols, kPanel), most_steps = lanes<kPaired>(std::min(d.rows, kBlockDepth));
  float* right = product_scratch.right.reserve(panels * kPanel * most_steps);
  for (int64_t k = 0; k < d.rows; k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, d.rows - k), steps = lanes<kPaired>(depth);
    const float* left = reinterpret_cast<const float*>(d.row(k));
    int64_t left_stride = d.stride;
    if constexpr (kPaired) {
      left_stride = operand_stride<float>(round_up(d.cols, kPanel));
      float* packed = product_scratch.left.reserve(left_stride * most_steps);
      pack_depth<true, C>({d.row(k), depth, d.cols, d.stride}, nullptr, packed, kPanel, left_stride);
      left = packed;
    }
    pack_depth<kPaired, S>({x.row(k), depth, x.cols, x.stride}, nullptr, right, steps * kPanel, kPanel);
    for (int64_t p = 0; p < panels; ++p) {
      for_row_groups(d.cols, [&](int64_t row, int64_t rows) {
        tile_of<kPaired, true>(rows)(left + row, left_stride, right + p * kPanel * steps, kPanel, steps,
                                     sums + row * sums_stride + p * kPanel, sums_stride, onto || k > 0);
      });
    }
  }
}

}  // namespace triton_st
