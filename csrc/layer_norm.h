// LayerNorm(dropout(x + x_bias) + residual), row by row, forward and backward. Rows come in fp32, fp16 or bf16; what is
// computed with is fp32 rows in memory of the caller's, which have room for round_up(d, kWidth) numbers.
//
//   forward:   residual_sum → row_statistics → write_normalised
//   backward:  residual_sum → to_unit_row → layer_norm_backward_row → write_gradients
//
// Gradients of parameters are sums over rows: of kFewRows rows (RowSums), of kNormRows rows at a time, whoever computes
// them, then of those partial sums in their order (ParameterSums). So they depend on neither the number of threads nor
// chance.
#pragma once

#include <cmath>
#include <cstdint>

#include "gemm.h"
#include "philox.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

inline constexpr int64_t kNormRows = 64;
inline constexpr int64_t kFewRows = 16;

// Calls f(k, n) for all vectors of a row of d elements: k is its first element, n how many there are (or more).
template <class F>
inline void for_vectors(int64_t d, F&& f) {
  for (int64_t k = 0; k < d; k += kWidth) f(k, d - k);
}

// x in the first n lanes, 0 in the others.
inline Vec first_lanes_of(Vec x, int64_t n) {
  if (n >= kWidth) return x;
#if defined(TRITON_ST_AVX512)
  return _mm512_maskz_mov_ps(first_lanes(static_cast<int>(n)), x);
#else
  Ints lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? x : Vec{};
#endif
}

// The bits that a run of rows drops by: those of row r begin at element r · round_up(d, 4).
class RowDropout {
 public:
  // For `rows` rows of d elements from row `first_row` of a tensor on.
  void draw(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t d) {
    active_ = dropout.active();
    stride_ = 4 * groups_of(d);
    factor_ = splat(dropout.factor());
    if (active_) bits_.draw(dropout, first_row * groups_of(d), rows * groups_of(d));
  }

  // The vector x from element k of row r on, dropped out.
  Vec operator()(Vec x, int64_t r, int64_t k) const {
    return active_ ? bits_.apply(r * stride_ + k, x * factor_) : x;
  }

 private:
  KeepBits bits_;
  int64_t stride_ = 0;
  Vec factor_{};
  bool active_ = false;
};

// total = dropout(x + x_bias) + residual, filled up with zeros; x_bias may be null. `row` counts within `dropout`.
template <class X, class R>
inline void residual_sum(const X* x, const float* x_bias, const R* residual, const RowDropout& dropout, int64_t row,
                         int64_t d, float* total) {
  for_vectors(d, [&](int64_t k, int64_t n) {
    Vec value = load_some(x + k, n);
    if (x_bias) value += load_some(x_bias + k, n);
    store(total + k, dropout(value, row, k) + load_some(residual + k, n));
  });
}

struct RowStatistics {
  float mean, rstd;
};

inline RowStatistics row_statistics(const float* row, int64_t d, float eps) {
  Vec total{}, squares{};
  for_vectors(d, [&](int64_t k, int64_t) { total += load(row + k); });
  const float mean = sum(total) / static_cast<float>(d);
  for_vectors(d, [&](int64_t k, int64_t n) {
    const Vec x = first_lanes_of(load(row + k) - mean, n);
    squares = fma(x, x, squares);
  });
  return {mean, 1 / std::sqrt(sum(squares) / static_cast<float>(d) + eps)};
}

// Calls f(k, n, y) with the vectors of (row − mean) · rstd · weight + bias.
template <class F>
inline void for_normalised(const float* row, RowStatistics statistics, const float* weight, const float* bias,
                           int64_t d, F&& f) {
  for_vectors(d, [&](int64_t k, int64_t n) {
    const Vec unit = (load(row + k) - statistics.mean) * statistics.rstd;
    f(k, n, fma(unit, load_some(weight + k, n), load_some(bias + k, n)));
  });
}

template <class T>
inline void write_normalised(const float* row, RowStatistics statistics, const float* weight, const float* bias,
                             int64_t d, T* out) {
  for_normalised(row, statistics, weight, bias, d,
                 [&](int64_t k, int64_t n, Vec y) { store_some(out + k, saturated<T>(y), n); });
}

// row becomes (row − mean) · rstd, filled up with zeros.
inline void to_unit_row(float* row, RowStatistics statistics, int64_t d) {
  for_vectors(d, [&](int64_t k, int64_t n) {
    store(row + k, first_lanes_of((load(row + k) - statistics.mean) * statistics.rstd, n));
  });
}

// From `unit`, the normalised row before weight and bias, which becomes the gradient of the row before normalisation;
// adds to the sums of the gradients of weight and bias, which have room for whole vectors; bias_sum may be null.
template <class G>
inline void layer_norm_backward_row(const G* grad, float* unit, float rstd, const float* weight, int64_t d,
                                    float* weight_sum, float* bias_sum) {
  Vec plain{}, radial{};
  for_vectors(d, [&](int64_t k, int64_t n) {
    const Vec g = load_some(grad + k, n), u = load(unit + k), weighted = g * load_some(weight + k, n);
    store(weight_sum + k, fma(g, u, load(weight_sum + k)));
    if (bias_sum) store(bias_sum + k, load(bias_sum + k) + g);
    plain += weighted;
    radial = fma(weighted, u, radial);
  });
  const Vec mean = splat(sum(plain) / static_cast<float>(d)), slope = splat(sum(radial) / static_cast<float>(d));
  for_vectors(d, [&](int64_t k, int64_t n) {
    const Vec weighted = load_some(grad + k, n) * load_some(weight + k, n);
    store(unit + k, (weighted - mean - load(unit + k) * slope) * rstd);
  });
}

// The gradients of x and of the residual from that of their sum; x_bias_sum may be null.
template <class X, class R>
inline void write_gradients(const float* grad_total, const RowDropout& dropout, int64_t row, int64_t d, X* grad_x,
                            R* grad_residual, float* x_bias_sum) {
  for_vectors(d, [&](int64_t k, int64_t n) {
    const Vec g = load(grad_total + k), kept = dropout(g, row, k);
    store_some(grad_residual + k, g, n);
    store_some(grad_x + k, kept, n);
    if (x_bias_sum) store(x_bias_sum + k, load(x_bias_sum + k) + kept);
  });
}

// Vectors summed over rows, of kFewRows rows at a time: a long running sum loses digits, most of all that of equal
// numbers (as the gradients of a mean are), every step of which rounds to the same side.
class RowSums {
 public:
  // Adds to total [floats], whole vectors, until it ends. A thread has one at a time.
  RowSums(float* total, int64_t floats) : total_(total), floats_(floats) {
    thread_local Buffer memory;
    few_ = memory.reserve(floats);
    std::fill_n(few_, floats, 0.f);
  }
  ~RowSums() { add(); }
  RowSums(const RowSums&) = delete;
  RowSums& operator=(const RowSums&) = delete;

  float* get() const { return few_; }  // what a row is added to
  void row_added() {
    if (++rows_ % kFewRows == 0) add();
  }

 private:
  void add() {
    for (int64_t i = 0; i < floats_; i += kWidth) {
      store(total_ + i, load(total_ + i) + load(few_ + i));
      store(few_ + i, Vec{});
    }
  }

  float *total_, *few_;
  int64_t floats_, rows_ = 0;
};

// Sums over rows for `kinds` vectors of d parameters, in parts of kNormRows rows.
class ParameterSums {
 public:
  ParameterSums(int64_t rows, int kinds, int64_t d)
      : parts_(ceil_div(rows, kNormRows)), width_(round_up(d, kWidth)), d_(d), stride_(kinds * width_) {
    memory_.reserve(parts_ * stride_ + 1);
  }

  int64_t parts() const { return parts_; }

  // The part's sums, of the first kind; those of the next one are width() further. Set to 0 here.
  float* start(int64_t part) {
    float* sums = memory_.get() + part * stride_;
    std::fill_n(sums, stride_, 0.f);
    return sums;
  }
  int64_t width() const { return width_; }
  int64_t floats() const { return stride_; }  // of all kinds

  // out [d] = the sum of one kind over all parts, added in their order.
  void finish(int kind, float* out) const {
    constexpr int64_t kColumns = 64;
    parallel(ceil_div(d_, kColumns), parts_ * d_ / 4, [&](int64_t unit) {
      double total[kColumns] = {};
      const int64_t first = unit * kColumns, count = std::min(kColumns, d_ - first);
      for (int64_t part = 0; part < parts_; ++part) {
        const float* sums = memory_.get() + part * stride_ + kind * width_ + first;
        for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
      }
      for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(total[i]);
    });
  }

 private:
  int64_t parts_, width_, d_, stride_;
  Buffer memory_;
};

// --- what the operators over such rows share ---

// A vector of d fp32 parameters, dense.
class ParameterVector {
 public:
  ParameterVector(const std::optional<Tensor>& x, int64_t d, const char* name) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 1 && x->size(0) == d, name,
                    " must be float32, one for each column");
    tensor_ = torch::stable::contiguous(*x);
    data_ = static_cast<const float*>(tensor_->const_data_ptr());
  }
  operator const float*() const { return data_; }  // null where there is none

 private:
  std::optional<Tensor> tensor_;
  const float* data_ = nullptr;
};

// Calls f(x, residual) with values of their C++ types: residual's is x's, or x is fp32.
template <class F>
auto dispatch_sum(const Tensor& x, const Tensor& residual, F&& f) {
  STD_TORCH_CHECK(x.scalar_type() == residual.scalar_type() || x.scalar_type() == ScalarType::Float,
                  "x must have residual's dtype or float32");
  STD_TORCH_CHECK(x.dim() == 2 && residual.dim() == 2 && x.size(0) == residual.size(0) &&
                      x.size(1) == residual.size(1) && x.size(1) > 0,
                  "x and residual must be [T, D]");
  return dispatch(residual.scalar_type(), [&](auto r) {
    if (x.scalar_type() == ScalarType::Float) return f(float(), r);
    return f(r, r);
  });
}

inline constexpr double kNanosecondsPerNormed = 0.3;  // of an element, forward

inline int64_t norm_cost(int64_t rows, int64_t d) {
  return static_cast<int64_t>(kNanosecondsPerNormed * static_cast<double>(rows) * static_cast<double>(d));
}

}  // namespace triton_st
