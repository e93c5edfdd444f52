// From token states to what encode returns: pooled vectors, normalised and cut, or the states themselves.
#pragma once

#include "encoder_product.h"
#include "normalize.h"

namespace triton_st {

// Ways to pool. Several are asked for as octal digits, the first in the lowest, and laid side by side in that order.
enum Pooling : int64_t { kCls = 1, kMax, kMean, kMeanSqrtLen, kWeightedMean, kLastToken };

struct Output {
  float* data;
  int64_t stride, columns;
  int64_t pooling;        // 0: token states
  int64_t prompt_length;  // leading tokens that do not take part in pooling
  bool normalise;         // pooled vectors, before they are cut to `columns`
};

// x /= |x|; zeros stay zeros.
inline void normalise_vector(float* x, int64_t n) {
  const RowScale scale = row_scale(x, n);
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * scale.power * scale.inverse;
}

// One pooled vector of n values (a multiple of kWidth) of tokens [first, last) of the states. Of no tokens at all the
// result is 0; where only a prompt is left, the first and last token are its own and the maximum is −inf.
inline void pool_tokens(const float* states, int64_t stride, int64_t first, int64_t last, int64_t n, Pooling pooling,
                        float* out) {
  const int64_t count = last - first;
  if (count == 0 && pooling != kCls && pooling != kLastToken) {
    std::fill_n(out, n, pooling == kMax ? -std::numeric_limits<float>::infinity() : 0.f);
    return;
  }
  if (pooling == kCls || pooling == kLastToken) {
    const int64_t token = pooling == kLastToken ? last - 1 : count > 0 ? first : 0;
    if (last == 0) {
      std::fill_n(out, n, 0.f);
    } else {
      std::copy_n(states + token * stride, n, out);
    }
    return;
  }
  float divisor = static_cast<float>(count);
  if (pooling == kMeanSqrtLen) divisor = std::sqrt(divisor);
  if (pooling == kWeightedMean) divisor = static_cast<float>((first + 1 + last) * count / 2);
  for (int64_t i = 0; i < n; i += kWidth) {
    const float* column = states + first * stride + i;
    Vec total = pooling == kMax ? load(column) : Vec{};
    for (int64_t t = 0; t < count; ++t, column += stride) {
      const Vec x = load(column);
      if (pooling == kMax) {
        total = total > x ? total : (total == total ? x : total);  // a NaN stays
      } else if (pooling == kWeightedMean) {
        total = fma(x, splat(static_cast<float>(first + 1 + t)), total);
      } else {
        total += x;
      }
    }
    store(out + i, pooling == kMax ? total : total / divisor);
  }
}

// Writes the result of sequence `s`, whose states begin at `states` and whose first token is the `begin`-th, to its
// place.
inline void write_output(const Output& output, int64_t s, const float* states, int64_t stride, int64_t begin,
                         int64_t length, int64_t hidden, Buffer& memory) {
  if (output.pooling == 0) {
    for (int64_t t = 0; t < length; ++t) {
      std::copy_n(states + t * stride, output.columns, output.data + (begin + t) * output.stride);
    }
    return;
  }
  int64_t columns = 0;
  for (int64_t left = output.pooling; left; left >>= 3) columns += hidden;
  float* whole = memory.reserve(columns + kPanel);
  float* next = whole;
  for (int64_t left = output.pooling; left; left >>= 3, next += hidden) {
    pool_tokens(states, stride, std::min(output.prompt_length, length), length, round_up(hidden, kWidth),
                static_cast<Pooling>(left & 7), next);
  }
  if (output.normalise) normalise_vector(whole, columns);
  std::copy_n(whole, output.columns, output.data + s * output.stride);
}

}  // namespace triton_st
