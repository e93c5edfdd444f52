// Attention of one head over one sequence, for inference: scores lie keys by queries, so that the softmax runs down the
// keys and no sum crosses a vector's lanes.
#pragma once

#include "encoder_product.h"

namespace triton_st {

#if defined(TRITON_ST_AVX512)
// 2^x within 3e-6 of itself, for values that are rounded to bf16 next.
inline Vec exp2_short(Vec x) {
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = x - n;
  Vec p = splat(9.58284e-3f);
  p = fma(p, r, splat(5.590646e-2f));
  p = fma(p, r, splat(2.4024099e-1f));
  p = fma(p, r, splat(6.9312419e-1f));
  p = fma(p, r, splat(1.0f));
  return _mm512_scalef_ps(p, n);
}
#endif

struct AttentionScratch {
  Buffer queries, scores, values;
};
inline thread_local AttentionScratch attention_scratch;

// One head's part of the packed activations: rows of queries, keys and values `stride` elements apart, `size` elements
// each (a multiple of kWidth).
template <class T>
struct Head {
  const T *queries, *keys, *values;
  int64_t stride, size, length;
};

// Transposed queries of one panel, from `first` on: lane (step, query); queries past the last are zeros.
template <class T>
void pack_queries(const Head<T>& head, int64_t first, float* out) {
  constexpr int64_t kStep = 4 / sizeof(T);
  const int64_t steps = head.size / kStep;
  for (int64_t q = 0; q < kPanel; q += kWidth) {
    for (int64_t step = 0; step < steps; step += kWidth) {
      Vec square[kWidth];
      const int64_t n = std::min<int64_t>(kWidth, steps - step);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const float* lanes = reinterpret_cast<const float*>(head.queries + (first + q + i) * head.stride) + step;
        square[i] = first + q + i < head.length ? load_some(lanes, n) : Vec{};
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) store(out + (step + i) * kPanel + q, square[i]);
    }
  }
}

// Scores to weights, for `vectors` vectors of queries: scores [keys][kPanel] become exp(score · scale + bias −
// largest), in fp32 or as pairs of adjacent keys; sums[v] becomes their sum. Key k of query i has bias[i − k].
template <bool kPaired, bool kBiased>
void soften(float* scores, int64_t keys, int vectors, float scale, const float* bias, Vec* sums) {
  for (int v = 0; v < vectors; ++v) {
    float* column = scores + v * kWidth;
    Vec most = splat(-std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < keys; ++k) {
      Vec x = load(column + k * kPanel);
      if constexpr (kBiased) {
        x = fma(x, splat(scale), load(bias + v * kWidth - k));
        store(column + k * kPanel, x);
      }
      most = maximum(x, most);
    }
    const Vec factor = splat(kBiased ? 1.f : scale);
    Vec total{};
#if defined(TRITON_ST_BF16_DOT)
    if constexpr (kPaired) {
      const Vec base_2 = factor * 1.44269504f;
      auto weight = [&](int64_t k) { return exp2_short((load(column + k * kPanel) - most) * base_2); };
      for (int64_t k = 0; k < keys; k += 2) {
        const Vec first = weight(k), second = k + 1 < keys ? weight(k + 1) : Vec{};
        total += first;
        total += second;
        store(column + k / 2 * kPanel, pair_across(first, second));
      }
      sums[v] = total;
      continue;
    }
#endif
    for (int64_t k = 0; k < keys; ++k) {
      // Subtracted first: exactly 0 at the largest score, however large that is.
      const Vec x = exp((load(column + k * kPanel) - most) * factor);
      total += x;
      store(column + k * kPanel, x);
    }
    sums[v] = total;
  }
}

#if defined(TRITON_ST_BF16_DOT)
// Values of adjacent tokens as pairs, [⌈length / 2⌉][size] lanes.
inline void pair_values(const Head<BFloat16>& head, float* out) {
  for (int64_t k = 0; k < head.length; k += 2) {
    const auto* row = reinterpret_cast<const __m256i*>(head.values + k * head.stride);
    const auto* next = reinterpret_cast<const __m256i*>(head.values + (k + 1) * head.stride);
    for (int64_t i = 0; i < head.size / kWidth; ++i, out += kWidth) {
      __m512i lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row + i));
      if (k + 1 < head.length) {
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(next + i));
        lanes = _mm512_or_si512(lanes, _mm512_slli_epi32(high, 16));
      }
      _mm512_storeu_si512(out, lanes);
    }
  }
}
#endif

#if defined(TRITON_ST_AMX)

// The pairs of pair_values, transposed: [size][stride] lanes, zeros up to a multiple of 16 pairs.
inline void transpose_values(const float* paired, int64_t pairs, int64_t size, float* out, int64_t stride) {
  for (int64_t pair = 0; pair < pairs; pair += kWidth) {
    for (int64_t i = 0; i < size; i += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int p = 0; p < kWidth; ++p) square[p] = pair + p < pairs ? load(paired + (pair + p) * size + i) : Vec{};
      transpose(square);
#pragma GCC unroll 16
      for (int lane = 0; lane < kWidth; ++lane) store(out + (i + lane) * stride + pair, square[lane]);
    }
  }
}

// What the attend() below does, by tiles, which the caller holds: outputs are formed transposed, so that weights are a
// right operand as they lie. Rows of keys past the last are read, and what becomes of them is not.
inline void attend(const Head<BFloat16>& head, float scale, const float* bias, BFloat16* out, int64_t out_stride) {
  const int64_t length = head.length, steps = head.size / 2, pairs = ceil_div(length, 2);
  const int64_t padded_pairs = round_up(pairs, kAmxLanes), values_stride = padded_pairs + kAmxLanes;
  float* queries = attention_scratch.queries.reserve(steps * kPanel);
  float* scores = attention_scratch.scores.reserve(round_up(length, kAmxBlock) * kPanel);
  float* paired = attention_scratch.values.reserve(pairs * head.size + head.size * values_stride);
  float* values = paired + pairs * head.size;
  pair_values(head, paired);
  transpose_values(paired, pairs, head.size, values, values_stride);
  const auto nothing = [](int64_t) {};
  alignas(64) Vec sums[2 * kAmxBlock];
  for (int64_t first = 0; first < length; first += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, length - first);
    const int vectors = count > kWidth ? 2 : 1;
    pack_queries(head, first, queries);
    for (int64_t key = 0; key < length; key += kAmxBlock) {
      const float* keys = reinterpret_cast<const float*>(head.keys + key * head.stride);
      auto* block = reinterpret_cast<Vec*>(scores + key * kPanel);
      if (length - key > kAmxRows) {
        multiply_tiles<Vec, 1, true>(keys, head.stride / 2, 0, queries, steps / kAmxLanes, block, nothing);
      } else {
        multiply_tiles<Vec, 1, false>(keys, head.stride / 2, 0, queries, steps / kAmxLanes, block, nothing);
      }
    }
    Vec totals[2];
    if (bias) {
      soften<true, true>(scores, length, vectors, scale, bias + first, totals);
    } else {
      soften<true, false>(scores, length, vectors, scale, nullptr, totals);
    }
    for (int64_t i = pairs * kPanel; i < padded_pairs * kPanel; i += kWidth) store(scores + i, Vec{});
    for (int64_t i = 0; i < head.size; i += kAmxBlock) {
      multiply_tiles<Vec, 1, true>(values + i * values_stride, values_stride, 0, scores,
                                          padded_pairs / kAmxLanes, sums, nothing);
      for (int v = 0; v < vectors; ++v) {
        const Vec inverse = splat(1.f) / totals[v];
        Vec low[kWidth], high[kWidth];
#pragma GCC unroll 16
        for (int d = 0; d < kWidth; ++d) {
          low[d] = sums[2 * d + v] * inverse;
          high[d] = sums[2 * (kWidth + d) + v] * inverse;
        }
        transpose(low);
        transpose(high);
        const int64_t rows = std::min<int64_t>(kWidth, count - v * kWidth);
        for (int64_t r = 0; r < rows; ++r) put(out + (first + v * kWidth + r) * out_stride + i, low[r], high[r]);
      }
    }
  }
}

#endif

// out[length, size] = softmax(queries · keysᵀ · scale + bias) · values, rows out_stride elements apart. `bias`, or
// null, points at that of distance 0: query i and key k have bias[i − k].
template <class T>
void attend(const Head<T>& head, float scale, const float* bias, T* out, int64_t out_stride) {
  constexpr bool kPaired = sizeof(T) == 2;
#if defined(TRITON_ST_BF16_DOT)
  using P = std::conditional_t<kPaired, PairPrecision, FloatPrecision>;
#else
  using P = FloatPrecision;
#endif
  const int64_t length = head.length, stride = head.stride / P::kStep, steps = head.size / P::kStep;
  const int64_t key_steps = ceil_div(length, P::kStep);
  float* queries = attention_scratch.queries.reserve(steps * kPanel);
  float* scores = attention_scratch.scores.reserve(length * kPanel);
  const float* values = reinterpret_cast<const float*>(head.values);
  int64_t value_stride = stride;
#if defined(TRITON_ST_BF16_DOT)
  if constexpr (kPaired) {
    float* paired = attention_scratch.values.reserve(key_steps * head.size);
    pair_values(head, paired);
    values = paired;
    value_stride = head.size;
  }
#endif
  alignas(64) Vec sums[2 * kTileRows], totals[2];
  alignas(64) float inverse[kPanel];
  for (int64_t first = 0; first < length; first += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, length - first);
    const int vectors = count > kWidth ? 2 : 1;
    pack_queries(head, first, queries);
    for_row_groups(length, [&](int64_t key, int64_t rows) {
      const auto multiply = vectors == 2 ? multiply_of<P, false, 2>(rows) : multiply_of<P, false, 1>(rows);
      multiply(reinterpret_cast<const float*>(head.keys + key * head.stride), stride, queries, kPanel, steps,
               reinterpret_cast<Vec*>(scores + key * kPanel));
    });
    if (bias) {
      soften<kPaired, true>(scores, length, vectors, scale, bias + first, totals);
    } else {
      soften<kPaired, false>(scores, length, vectors, scale, nullptr, totals);
    }
    for (int v = 0; v < vectors; ++v) store(inverse + v * kWidth, splat(1.f) / totals[v]);
    for_row_groups(count, [&](int64_t query, int64_t rows) {
      for (int64_t i = 0; i < head.size; i += kPanel) {
        const bool two = head.size - i > kWidth;
        const auto multiply = two ? multiply_of<P, true, 2>(rows) : multiply_of<P, true, 1>(rows);
        multiply(scores + query, kPanel, values + i, value_stride, key_steps, sums);
        for (int64_t r = 0; r < rows; ++r) {
          T* row = out + (first + query + r) * out_stride + i;
          const Vec factor = splat(inverse[query + r]);
          if (two) {
            put(row, sums[2 * r] * factor, sums[2 * r + 1] * factor);
          } else {
            put(row, sums[2 * r] * factor);
          }
        }
      }
    });
  }
}

}  // namespace triton_st
