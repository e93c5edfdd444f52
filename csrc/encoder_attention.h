// Attention of one head over one sequence, for inference. Vectors hold scores keys by queries, so that the softmax runs
// down the keys and no sum crosses a vector's lanes; tiles multiply soonest what lies queries by keys.
#pragma once

#include "encoder_product.h"
#include "encoder_rows.h"

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
  Buffer packed, scores, weights, values;
};
inline thread_local AttentionScratch attention_scratch;

// One head's part of the packed activations: rows of queries, keys and values `stride` elements apart, `size` elements
// each (a multiple of kWidth).
template <class T>
struct Head {
  const T *queries, *keys, *values;
  int64_t stride, size, length;
};

// kPanel rows of `size` elements from `first` on, across: lane (step, row); rows past the `length`-th are zeros.
template <class T>
void pack_across(const T* rows, int64_t stride, int64_t size, int64_t length, int64_t first, float* out) {
  constexpr int64_t kStep = 4 / sizeof(T);
  const int64_t steps = size / kStep;
  for (int64_t r = 0; r < kPanel; r += kWidth) {
    for (int64_t step = 0; step < steps; step += kWidth) {
      Vec square[kWidth];
      const int64_t n = std::min<int64_t>(kWidth, steps - step);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const float* lanes = reinterpret_cast<const float*>(rows + (first + r + i) * stride) + step;
        square[i] = first + r + i < length ? load_some(lanes, n) : Vec{};
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) store(out + (step + i) * kPanel + r, square[i]);
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

// Values of adjacent keys as pairs, the right operand of a product by tiles: [size / kPanel][pairs][kPanel] lanes, the
// features of a panel in the order 0, 2, … 1, 3, …; keys past the last are zeros.
inline void pair_values_apart(const Head<BFloat16>& head, int64_t pairs, float* out) {
  const Ints high = Ints{} + static_cast<int32_t>(0xffff0000);
  for (int64_t i = 0; i < head.size; i += kPanel) {
    for (int64_t pair = 0; pair < pairs; ++pair, out += kPanel) {
      auto row = [&](int64_t key) {
        return key < head.length ? as_ints(load(reinterpret_cast<const float*>(head.values + key * head.stride + i)))
                                 : Ints{};
      };
      const Ints first = row(2 * pair), second = row(2 * pair + 1);
      store(out, as_floats((first & ~high) | second << 16));
      store(out + kWidth, as_floats(reinterpret_cast<Ints>(reinterpret_cast<Words>(first) >> 16) | (second & high)));
    }
  }
}

// Scores of `rows` ≤ kWidth queries to weights: exp(score · scale + bias − largest), as bf16, a row's `stride` lanes from
// the next; gives 1 / their sums. Scores lie [keys / kPanel][kAmxBlock][kPanel]; query i and key k have bias[i − k].
template <bool kBiased>
Vec soften_rows(float* scores, int64_t rows, int64_t keys, float scale, const float* bias, float* weights,
                int64_t stride) {
  const Vec factor = splat((kBiased ? 1.f : scale) * 1.44269504f), none = splat(-std::numeric_limits<float>::infinity());
  const Ints lanes = lane_numbers(), backwards = kWidth - 1 - lanes;
  auto within = [&](int64_t key, Vec x, Vec otherwise) {
    return keys - key >= kWidth ? x : (lanes < static_cast<int32_t>(keys - key) ? x : otherwise);
  };
  Vec most[kWidth], sums[kWidth];
  for (int64_t r = 0; r < kWidth; ++r) {
    most[r] = none;
    for (int64_t key = 0; r < rows && key < keys; key += kWidth) {
      float* at = scores + key / kPanel * kAmxBlock * kPanel + r * kPanel + key % kPanel;
      Vec x = load(at);
      if constexpr (kBiased) {
        x = fma(x, splat(scale), __builtin_shuffle(load(bias + r - key - (kWidth - 1)), backwards));
        store(at, x);
      }
      most[r] = maximum(within(key, x, none), most[r]);
    }
  }
  alignas(64) float largest[kWidth];
  store(largest, combine_rows(most, [](Vec a, Vec b) { return maximum(a, b); }));
  for (int64_t r = 0; r < kWidth; ++r) {
    sums[r] = Vec{};
    for (int64_t key = 0; r < rows && key < keys; key += kPanel) {
      const float* at = scores + key * kAmxBlock + r * kPanel;
      // Subtracted first: exactly 0 at the largest score, however large that is.
      auto weight = [&](int64_t v) {
        return within(key + v, exp2_short((load(at + v) - splat(largest[r])) * factor), Vec{});
      };
      const Vec low = weight(0), high = keys - key > kWidth ? weight(kWidth) : Vec{};
      sums[r] += low + high;
      store(weights + r * stride + key / 2, pair_adjacent(low, high));
    }
  }
  return splat(1.f) / combine_rows(sums, [](Vec a, Vec b) { return a + b; });
}

// What the attend() below does, by tiles, which the caller holds. Rows of queries past the last are read, and what becomes
// of them is not.
inline void attend(const Head<BFloat16>& head, float scale, const float* bias, BFloat16* out, int64_t out_stride) {
  const int64_t length = head.length, steps = head.size / 2, panels = ceil_div(length, kPanel);
  const int64_t pairs = panels * kPanel / 2, weights_stride = pairs + kAmxLanes;
  float* keys = attention_scratch.packed.reserve(panels * steps * kPanel);
  float* scores = attention_scratch.scores.reserve(panels * kAmxBlock * kPanel);
  float* weights = attention_scratch.weights.reserve(kAmxBlock * weights_stride);
  float* values = attention_scratch.values.reserve(pairs * head.size);
  for (int64_t p = 0; p < panels; ++p) {
    pack_across(head.keys, head.stride, head.size, length, p * kPanel, keys + p * steps * kPanel);
  }
  pair_values_apart(head, pairs, values);
  const auto nothing = [](int64_t) {};
  alignas(64) Vec sums[2 * kAmxBlock];
  alignas(64) float inverse[kAmxBlock];
  for (int64_t first = 0; first < length; first += kAmxBlock) {
    const int64_t count = std::min<int64_t>(kAmxBlock, length - first);
    const auto multiply = count > kAmxRows ? multiply_tiles<Vec, 1, true, false, decltype(nothing)&>
                                           : multiply_tiles<Vec, 1, false, false, decltype(nothing)&>;
    const float* queries = reinterpret_cast<const float*>(head.queries + first * head.stride);
    for (int64_t p = 0; p < panels; ++p) {
      multiply(queries, head.stride / 2, 0, keys + p * steps * kPanel, steps / kAmxLanes,
               reinterpret_cast<Vec*>(scores + p * kAmxBlock * kPanel), nothing);
    }
    for (int64_t r = 0; r < count; r += kWidth) {
      float *from = scores + r * kPanel, *to = weights + r * weights_stride;
      const int64_t rows = std::min<int64_t>(kWidth, count - r);
      store(inverse + r,
            bias ? soften_rows<true>(from, rows, length, scale, bias + first + r, to, weights_stride)
                 : soften_rows<false>(from, rows, length, scale, nullptr, to, weights_stride));
    }
    for (int64_t i = 0; i < head.size; i += kPanel) {
      multiply(weights, weights_stride, 0, values + i * pairs, pairs / kAmxLanes, sums, nothing);
      for (int64_t r = 0; r < count; ++r) {
        const Vec factor = splat(inverse[r]);
        store(reinterpret_cast<float*>(out + (first + r) * out_stride + i),
              pair_across(sums[2 * r] * factor, sums[2 * r + 1] * factor));
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
  float* queries = attention_scratch.packed.reserve(steps * kPanel);
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
    pack_across(head.queries, head.stride, head.size, length, first, queries);
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
