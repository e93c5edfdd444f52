// Products of activations with weights that are packed once: fp32, weights stored in half, pairs of bf16, and int8.
// Every result is summed in an order that the inner dimension alone decides, whatever the rows beside it, so that the
// bits of a row depend on that row alone. Where the processor has AMX, tiles form those of the encoder's layers, fp32 as
// three parts of bf16.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "amx.h"
#include "gemm.h"

#if defined(TRITON_ST_AVX512) && defined(__AVX512VNNI__)
#define TRITON_ST_VNNI 1
#endif

namespace triton_st {

// A precision says how a panel of weights is stored (kStep adjacent steps of the inner dimension in one Weight), in
// which type activations lie in memory, and whether tiles multiply them (kTiled), as a sum of how many parts.

struct FloatPrecision {
  using Weight = float;
  using Activation = float;
  using Sum = Vec;
  static constexpr int kStep = 1;
  static constexpr bool kQuantised = false, kTiled = false;
  static constexpr int kParts = 1;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// Weights are stored in half and widened as they are read: half the memory to read, fp32 arithmetic.
template <class T>
struct StoredPrecision : FloatPrecision {
  using Weight = T;
};

#if defined(TRITON_ST_AMX)
// Weights are split as a panel of them is met: they take no more memory, and reading it is what takes time.
template <class T>
struct SplitPrecision : StoredPrecision<T> {
  static constexpr bool kTiled = true;
  static constexpr int kParts = 3;
};
using Float32Precision = SplitPrecision<float>;
using Float16Precision = SplitPrecision<Half>;
#else
using Float32Precision = FloatPrecision;
using Float16Precision = StoredPrecision<Half>;
#endif

#if defined(TRITON_ST_BF16_DOT)
struct PairPrecision {
  using Weight = float;  // a pair of bf16
  using Activation = BFloat16;
  using Sum = Vec;
  static constexpr int kStep = 2;
  static constexpr bool kQuantised = false, kTiled = kAmx;
  static constexpr int kParts = 1;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return triton_st::multiply_add<true>(a, b, c); }
};
using BFloat16Precision = PairPrecision;
using CompactActivation = BFloat16;
#else
using BFloat16Precision = StoredPrecision<BFloat16>;
using CompactActivation = float;
#endif

// Activations are unsigned bytes (per row: scale and zero point), weights signed bytes (per output: scale); sums are
// exact. Without an instruction for that, both are widened to 16 bits.
struct Int8Precision {
  using Weight = float;  // four bytes, or two numbers of 16 bits
  using Activation = CompactActivation;
  using Sum = Ints;
#if defined(TRITON_ST_VNNI)
  using Number = int8_t;
  using Level = uint8_t;
#else
  using Number = int16_t;
  using Level = int16_t;
#endif
  static constexpr int kStep = 4 / sizeof(Number);
  static constexpr bool kQuantised = true, kTiled = kAmx;
  static constexpr int kParts = 1;
  static Ints multiply_add(Vec a, Vec b, Ints c) {
#if defined(TRITON_ST_VNNI)
    // The intrinsic makes GCC 12 spill its sums, at 40 % of the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#elif defined(TRITON_ST_AVX512)
    return c + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(TRITON_ST_AVX2)
    return c + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
    const Ints x = as_ints(a), y = as_ints(b);
    return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
  }
};

// Rows that are multiplied at a time. Tiles read whole groups: their operands end in as many readable rows.
template <class P>
inline constexpr int64_t kGroupRows = P::kTiled ? kPanel : kTileRows;

// Steps of a panel, and lanes of each part of a left operand's row. Tiles take 16 lanes: of bytes, what an operand has
// beyond its inputs there, anything, meets zeros; of pairs, sizes padded to kPanel leave nothing beyond.
template <class P>
constexpr int64_t panel_steps(int64_t inputs) {
  return P::kTiled && P::kStep > 1 ? round_up(inputs / P::kStep, kWidth) : inputs / P::kStep;
}
template <class P>
constexpr int64_t part_lanes(int64_t inputs) {
  return P::kParts > 1 ? inputs / 2 : panel_steps<P>(inputs);
}

// Inputs of the second feed-forward layer that are summed before they are added up, and hidden activations that are held:
// tiles read few columns of many rows soonest. A row of bytes has one scale, so it is whole.
template <class P>
inline constexpr int64_t kFeedColumns = !P::kTiled || P::kQuantised ? int64_t{1} << 30 : (P::kParts > 1 ? 384 : 768);

// --- the register tile ---

// sums[kRows][2] = a[kRows, steps] · b[steps, kVecs · kWidth]. Lane (row, step) of a is at row · a_stride + step, or,
// kDepthMajor, at step · a_stride + row; step s of b begins at s · b_stride.
template <class P, bool kDepthMajor, int kVecs, int kRows>
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
template <class P, bool kDepthMajor, int kVecs>
Multiply<P> multiply_of(int64_t rows) {
  static constexpr auto table = []<int... kRows>(std::integer_sequence<int, kRows...>) {
    return std::array<Multiply<P>, kTileRows>{&multiply<P, kDepthMajor, kVecs, kRows + 1>...};
  }(std::make_integer_sequence<int, kTileRows>());
  return table[rows - 1];
}

// --- one dense layer ---

// y = x · Wᵀ + bias, W packed into panels of kPanel outputs; sizes are padded ones.
struct Dense {
  const void* panels;
  const float* bias;         // or null: zeros
  const float* scales;       // int8: of each output
  const float* column_sums;  // int8: of each output's weights, in steps of its scale
  int64_t inputs, outputs;
  int64_t panel_steps;  // from panel to panel
};

// Left operand of a product: lanes of 32 bits, and for int8 each row's scale and zero point.
struct Operand {
  const float* lanes;
  int64_t stride, part_stride;
  const float* scales;
  const float* zeros;
};

// Turns a tile's sums into values: the bias, and for int8 the scales.
template <class P>
class Values {
 public:
  Values(const Dense& dense, const Operand& x, int64_t column) : x_(x) {
    for (int v = 0; v < 2; ++v) {
      bias_[v] = dense.bias ? load(dense.bias + column + v * kWidth) : Vec{};
      if constexpr (P::kQuantised) {
        scales_[v] = load(dense.scales + column + v * kWidth);
        column_sums_[v] = load(dense.column_sums + column + v * kWidth);
      }
    }
  }
  Vec operator()(typename P::Sum sum, int v, int64_t row) const {
    if constexpr (P::kQuantised) {
      const Vec whole = fma(splat(-x_.zeros[row]), column_sums_[v], __builtin_convertvector(sum, Vec));
      return fma(whole * scales_[v], splat(x_.scales[row]), bias_[v]);
    } else {
      return sum + bias_[v];
    }
  }

 private:
  Operand x_;
  Vec bias_[2], scales_[2], column_sums_[2];
};

// consume(row, column, low, high): the values of kPanel outputs from `column` on, for each of `rows` rows from `row` on
// and each of `panels` panels from `panel` on.
template <class P, class Consume>
void dense_product(const Operand& x, int64_t row, int64_t rows, const Dense& dense, int64_t panel, int64_t panels,
                   Consume&& consume)
  requires(!P::kTiled)
{
  const int64_t steps = panel_steps<P>(dense.inputs);
  alignas(64) typename P::Sum sums[2 * kTileRows];
  for (int64_t p = panel; p < panel + panels; ++p) {
    const auto* weights = static_cast<const typename P::Weight*>(dense.panels) + p * dense.panel_steps * kPanel;
    const Values<P> values(dense, x, p * kPanel);
    for_row_groups(rows, [&](int64_t group, int64_t count) {
      const int64_t first = row + group;
      multiply_of<P, false, 2>(count)(x.lanes + first * x.stride, x.stride, weights, kPanel, steps, sums);
      for (int64_t r = 0; r < count; ++r) {
        consume(first + r, p * kPanel, values(sums[2 * r], 0, first + r), values(sums[2 * r + 1], 1, first + r));
      }
    });
  }
}

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

inline thread_local Buffer split_weights;

// A panel of `inputs` · kPanel weights as the three parts of a right operand.
template <class T>
const float* split_panel(const T* weights, int64_t inputs) {
  constexpr int64_t kPart = kAmxLanes * kPanel;
  float* parts = split_weights.reserve(3 * inputs / 2 * kPanel);
  for (int64_t pair = 0; pair < inputs / 2; ++pair, weights += 2 * kPanel) {
    float* out = parts + pair / kAmxLanes * 3 * kPart + pair % kAmxLanes * kPanel;
    for (int64_t v = 0; v < kPanel; v += kWidth) {
      Vec first = load(weights + v), second = load(weights + kPanel + v);
      for (int64_t part = 0; part < 3; ++part) store(out + part * kPart + v, take_part_across(first, second));
    }
  }
  return parts;
}

// The same by tiles, which the caller holds. The values of one block of sums are made and consumed while tiles form the
// next.
template <class P, class Consume>
void dense_product(const Operand& x, int64_t row, int64_t rows, const Dense& dense, int64_t panel, int64_t panels,
                   Consume&& consume)
  requires(P::kTiled)
{
  using Sum = typename P::Sum;
  if (rows == 0) return;
  const int64_t chunks = part_lanes<P>(dense.inputs) / kAmxLanes;
  struct Block {
    Values<P> values;
    int64_t first, count, column;
    const Sum* sums;
  };
  alignas(64) Sum sums[2][2 * kAmxBlock];
  std::optional<Block> before;
  auto finish_rows = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < std::min(end, before->count); ++r) {
      const int64_t at = before->first + r;
      consume(at, before->column, before->values(before->sums[2 * r], 0, at),
              before->values(before->sums[2 * r + 1], 1, at));
    }
  };
  // While a panel is multiplied the next one comes from memory, some of it between every two chunks.
  const int64_t panel_bytes = dense.panel_steps * kPanel * static_cast<int64_t>(sizeof(typename P::Weight));
  const int64_t used_bytes = panel_bytes / dense.panel_steps * (P::kParts > 1 ? dense.inputs : chunks * kAmxLanes);
  const int64_t fetched = round_up(ceil_div(used_bytes, ceil_div(rows, kAmxBlock) * chunks), kLine);
  const int64_t between = ceil_div(kAmxBlock, chunks);
  int next = 0;
  for (int64_t p = panel; p < panel + panels; ++p) {
    const char* stored = static_cast<const char*>(dense.panels) + p * panel_bytes;
    const char* fetch = p + 1 < panel + panels ? stored + panel_bytes : nullptr;
    const float* weights;
    if constexpr (P::kParts > 1) {
      weights = split_panel(reinterpret_cast<const typename P::Weight*>(stored), dense.inputs);
    } else {
      weights = reinterpret_cast<const float*>(stored);
    }
    auto meanwhile = [&](int64_t chunk) {
      if (fetch) {
        prefetch<2>(fetch, fetched);
        fetch += fetched;
      }
      if (before) finish_rows(chunk * between, (chunk + 1) * between);
    };
    for (int64_t group = 0; group < rows; group += kAmxBlock) {
      const int64_t first = row + group, count = std::min<int64_t>(kAmxBlock, rows - group);
      const float* a = x.lanes + first * x.stride;
      if (count > kAmxRows) {
        multiply_tiles<Sum, P::kParts, true>(a, x.stride, x.part_stride, weights, chunks, sums[next], meanwhile);
      } else {
        multiply_tiles<Sum, P::kParts, false>(a, x.stride, x.part_stride, weights, chunks, sums[next], meanwhile);
      }
      before = Block{Values<P>(dense, x, p * kPanel), first, count, p * kPanel, sums[next]};
      next = 1 - next;
    }
  }
  if (before) finish_rows(0, before->count);
}

#endif

// --- storing activations, kWidth or kPanel at a time ---

inline void put(float* p, Vec x) { store(p, x); }
inline void put(BFloat16* p, Vec x) {
#if defined(TRITON_ST_BF16_DOT)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  store(p, x);
#endif
}
inline void put(float* p, Vec low, Vec high) {
  store(p, low);
  store(p + kWidth, high);
}
inline void put(BFloat16* p, Vec low, Vec high) {
#if defined(TRITON_ST_BF16_DOT)
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
#else
  store(p, low);
  store(p + kWidth, high);
#endif
}

inline float largest_lane(Vec x) {
#if defined(TRITON_ST_AVX512)
  return _mm512_reduce_max_ps(x);
#else
  return largest(x);
#endif
}

// The range of a row: its least value, or 0, without the sign, and its largest, or 0. `nothing` is 0, or NaN where the
// row is not finite.
struct Range {
  float least, most, nothing;
};

// A row's bytes: x ≈ (level − zero) · scale. The range always holds 0, so that padding stays exact.
struct Levels {
  float scale, zero, inverse;

  explicit Levels(const Range& range) {
    const float width = range.most + range.least, step = width > 1e-30f ? width / 255.f : 1e-30f;
    inverse = 1.f / step;
    zero = std::fmin(std::nearbyint(range.least * inverse), 255.f);  // a number, whatever the row holds
    scale = step + range.nothing;
  }
};

inline Range range_of(const float* x, int64_t n) {
  Vec most{}, least{}, nothing{};
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec v = load(x + i);
    most = maximum(v, most);
    least = maximum(-v, least);
    nothing = fma(v, Vec{}, nothing);
  }
  return {largest_lane(least), largest_lane(most), sum(nothing)};
}

// Adding it to a number below 2^15 leaves the nearest integer in the low 16 bits.
inline constexpr float kMagic = 0x1.8p23f;

#if defined(TRITON_ST_AVX512)

// kPanel numbers of 16 bits as levels.
inline void put_levels(uint8_t* out, __m512i words) {
  const __m512i positive = _mm512_max_epi16(words, _mm512_setzero_si512());
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtusepi16_epi8(positive));
}
inline void put_levels(int16_t* out, __m512i words) {
  const __m512i positive = _mm512_max_epi16(words, _mm512_setzero_si512());
  _mm512_storeu_si512(out, _mm512_min_epi16(positive, _mm512_set1_epi16(255)));
}

// The n values at x (a multiple of kPanel) as levels.
inline void put_levels(const float* x, int64_t n, const Levels& levels, Int8Precision::Level* out) {
  const Vec inverse = splat(levels.inverse), magic = splat(kMagic + levels.zero);
  __m512i evens;  // the low halves of 2 · kWidth lanes
  for (int i = 0; i < 32; ++i) reinterpret_cast<uint16_t*>(&evens)[i] = static_cast<uint16_t>(2 * i);
  for (int64_t i = 0; i < n; i += kPanel) {
    const Vec low = fma(load(x + i), inverse, magic), high = fma(load(x + i + kWidth), inverse, magic);
    put_levels(out + i, _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(low), evens,
                                                  reinterpret_cast<__m512i>(high)));
  }
}

#else

inline void put_levels(const float* x, int64_t n, const Levels& levels, Int8Precision::Level* out) {
  const Vec inverse = splat(levels.inverse), magic = splat(kMagic + levels.zero);
  for (int64_t i = 0; i < n; i += kWidth) {
    Ints level = as_ints(fma(load(x + i), inverse, magic)) - as_ints(splat(kMagic));
    level = level < 0 ? Ints{} : level;
    level = level > 255 ? Ints{} + 255 : level;
    for (int lane = 0; lane < kWidth; ++lane) out[i + lane] = static_cast<Int8Precision::Level>(level[lane]);
  }
}

#endif

#if defined(TRITON_ST_BF16_DOT)

// Of numbers that are not negative the largest has the largest bits, as an integer too.
inline float largest_positive(__m512i bits) {
  const __m512i low = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(bits, 16);
  const int32_t most = _mm512_reduce_max_epi32(_mm512_max_epi32(low, high)) << 16;
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

inline Range range_of(const BFloat16* x, int64_t n) {
  const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
  __m512i most = _mm512_setzero_si512(), least = most;
  for (int64_t i = 0; i < n; i += kPanel) {
    const __m512i bits = _mm512_loadu_si512(x + i);
    most = _mm512_max_epi16(most, bits);
    least = _mm512_max_epi16(least, _mm512_xor_si512(bits, sign));
  }
  const float high = largest_positive(most), low = largest_positive(least);
  return {low, high, (low + high) * 0.f};
}

inline void put_levels(const BFloat16* x, int64_t n, const Levels& levels, Int8Precision::Level* out) {
  const Vec inverse = splat(levels.inverse), magic = splat(kMagic + levels.zero);
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  for (int64_t i = 0; i < n; i += kPanel) {
    const __m512i bits = _mm512_loadu_si512(x + i);
    const Vec even = reinterpret_cast<Vec>(_mm512_slli_epi32(bits, 16));
    const Vec odd = reinterpret_cast<Vec>(_mm512_and_si512(bits, high));
    const __m512i evens = reinterpret_cast<__m512i>(fma(even, inverse, magic));
    const __m512i odds = _mm512_slli_epi32(reinterpret_cast<__m512i>(fma(odd, inverse, magic)), 16);
    put_levels(out + i, _mm512_mask_blend_epi16(0xaaaaaaaa, evens, odds));
  }
}

#endif

}  // namespace triton_st
