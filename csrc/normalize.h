// Rows of a matrix as unit vectors that are never written out: what each row must be multiplied by, and the gradient
// through that. The numbers are those of `reference.normalize`.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "tensor.h"
#include "vector.h"

namespace triton_st {

inline constexpr float kEps = 1e-12f;  // smallest norm that a row is divided by

// unit row = row · power · inverse. `power` is a power of two that keeps squares from overflowing; it is 1 for all rows
// but very large and very small ones. `divisor` is the norm of row · power, or what kEps comes to where that is larger,
// and `inverse` its inverse: 0 for a row of zeros, NaN for a row with an inf or a NaN.
struct RowScale {
  float power, inverse, divisor;
};

template <class T>
float sum_of_squares(const T* x, int64_t n, float power) {
  const Vec factor = splat(power);
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec a = load(x + i) * factor, b = load(x + i + kWidth) * factor;
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for (; i < n; i += kWidth) {
    const Vec a = (n - i >= kWidth ? load(x + i) : load(x + i, static_cast<int>(n - i))) * factor;
    even = fma(a, a, even);
  }
  return sum(even + odd);
}

template <class T>
RowScale row_scale(const T* x, int64_t n) {
  const float squares = sum_of_squares(x, n, 1.f);
  // Well inside fp32's range, so that neither these squares nor products of two such rows leave it.
  if (squares > 1e-16f && squares < 1e16f) {
    const float norm = std::sqrt(squares);
    return {1.f, 1.f / norm, norm};
  }
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  float most = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    const float size = std::fabs(static_cast<float>(x[i]));
    if (!(size <= std::numeric_limits<float>::max())) return {1.f, kNaN, kNaN};
    most = std::max(most, size);
  }
  if (most == 0.f) return {1.f, 0.f, 1.f};
  int exponent;
  std::frexp(most, &exponent);
  const float power = std::ldexp(1.f, -std::clamp(exponent, -100, 120));
  const float divisor = std::max(std::sqrt(sum_of_squares(x, n, power)), kEps * power);
  return {power, 1.f / divisor, divisor};
}

// The scales of all rows, each kind by itself; the arrays may be read kPadding floats beyond their ends.
class RowScales {
 public:
  template <class T>
  explicit RowScales(Matrix<const T> x) : rows_(x.rows), memory_(3 * (x.rows + kPadding)) {
    constexpr int64_t kGroup = 64;
    std::atomic<bool> unscaled{true};
    parallel(ceil_div(rows_, kGroup), rows_ * (20 + x.cols / 16), [&](int64_t unit) {
      for (int64_t i = unit * kGroup; i < std::min((unit + 1) * kGroup, rows_); ++i) {
        const RowScale scale = row_scale(x.row(i), x.cols);
        array(0)[i] = scale.power;
        array(1)[i] = scale.inverse;
        array(2)[i] = scale.divisor;
        if (scale.power != 1.f) unscaled.store(false, std::memory_order_relaxed);
      }
    });
    for (int kind = 0; kind < 3; ++kind) std::fill_n(array(kind) + rows_, kPadding, 0.f);
    unscaled_ = unscaled.load();
  }

  // The scales of the rows from `first` on.
  class Part {
   public:
    Part(const RowScales& all, int64_t first) : all_(&all), first_(first) {}
    const float* power() const { return all_->array(0) + first_; }
    const float* inverse() const { return all_->array(1) + first_; }
    bool unscaled() const { return all_->unscaled_; }  // all powers are 1

   private:
    const RowScales* all_;
    int64_t first_;
  };

  Part from(int64_t first) const { return {*this, first}; }
  const float* power() const { return array(0); }
  const float* inverse() const { return array(1); }
  RowScale operator[](int64_t i) const { return {array(0)[i], array(1)[i], array(2)[i]}; }

 private:
  static constexpr int64_t kPadding = 4 * kWidth;
  float* array(int kind) const { return memory_.get() + kind * (rows_ + kPadding); }
  int64_t rows_;
  Buffer memory_;
  bool unscaled_ = true;
};

// out = gain · the gradient of row x, where `gradient` is that of its unit row; n elements, `gradient` readable and
// writable up to a multiple of kWidth.
template <class T>
void project(float* gradient, const T* x, RowScale scale, float gain, T* out, int64_t n) {
  if (scale.inverse == 0.f) {
    std::fill_n(out, n, T(0.f));
    return;
  }
  // Divided, not multiplied by the inverse: a unit row that is off by one rounding leaves that much of the radial part
  // in.
  const Vec power = splat(scale.power), divisor = splat(scale.divisor);
  auto unit = [&](int64_t i) {
    return (n - i >= kWidth ? load(x + i) : load(x + i, static_cast<int>(n - i))) * power / divisor;
  };
  Vec dot{};
  for (int64_t i = 0; i < n; i += kWidth) dot = fma(load(gradient + i), unit(i), dot);
  // Where the row was divided by a constant, its gradient keeps the radial part.
  const Vec radial = splat(scale.divisor == kEps * scale.power ? 0.f : sum(dot)), gains = splat(gain);
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec result = (load(gradient + i) - unit(i) * radial) / divisor * power * gains;
    if (n - i >= kWidth) {
      store(out + i, result);
    } else {
      store(out + i, result, static_cast<int>(n - i));
    }
  }
}

}  // namespace triton_st
