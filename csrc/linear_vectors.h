// linear.h by the register tile of gemm.h.
#pragma once

#include <array>

#include "amx.h"
#include "operand.h"

#if !defined(TRITON_ST_AMX)

namespace triton_st {

// A weight [N, K] as the right operand of products: of x · Wᵀ (forward) or of y · W (backward).
template <class C>
class PackedWeight {
 public:
  // The right operand of x · Wᵀ, x [M, K].
  void transposed(Matrix<const float> weight) { reserve(weight.cols, weight.rows), forward_ = true, weight_ = weight; }
  // The right operand of y · W, y [M, N].
  void plain(Matrix<const float> weight) { reserve(weight.rows, weight.cols), forward_ = false, weight_ = weight; }

  int64_t panels() const { return ceil_div(columns_, kPanel); }
  int64_t steps() const { return steps_; }
  int64_t panel_lanes() const { return steps_ * kPanel; }
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

#endif
