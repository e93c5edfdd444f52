// Rows of activations as they are stored: in fp32 or bf16, as levels (int8) or as slices (fixed-point numbers).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "encoder_narrow.h"
#include "encoder_precision.h"

namespace triton_st {

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

#elif defined(TRITON_ST_AVX2)

// The kPanel values at x times `factor`, as the nearest integers of 16 bits.
inline __m256i nearest_words(const float* x, Vec factor) {
  auto integers = [&](int64_t at) { return _mm256_cvtps_epi32(load(x + at) * factor); };
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(integers(0), integers(kWidth)), 0b11011000);
}

#if defined(TRITON_ST_VNNI)

// The n values at x (a multiple of kPanel) as levels.
inline void put_levels(const float* x, int64_t n, const Levels& levels, uint8_t* out) {
  const Vec inverse = splat(levels.inverse);
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(levels.zero));
  for (int64_t i = 0; i < n; i += kPanel) {
    const __m256i words = _mm256_adds_epi16(nearest_words(x + i, inverse), zero);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
}

#else

// The n values at x (a multiple of kPanel) as levels less their zero point. Gives the sum of those.
inline float put_numbers(const float* x, int64_t n, const Levels& levels, int8_t* out, RowExcess& excess) {
  const Vec inverse = splat(levels.inverse);
  const auto zero = static_cast<int16_t>(levels.zero), most = static_cast<int16_t>(255 - zero);
  const __m256i ones = _mm256_set1_epi16(1);
  const Ints up = splat_ints(127), down = splat_ints(128);
  Ints total{};
  excess.clear();
  for (int64_t i = 0; i < n; i += kPanel) {
    __m256i numbers = nearest_words(x + i, inverse);
    numbers = _mm256_max_epi16(numbers, _mm256_set1_epi16(static_cast<int16_t>(-zero)));
    numbers = _mm256_min_epi16(numbers, _mm256_set1_epi16(most));
    const __m128i low = _mm256_castsi256_si128(numbers), high = _mm256_extracti128_si256(numbers, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_packs_epi16(low, high));
    auto pairs = [&](__m256i of) { return reinterpret_cast<Ints>(_mm256_madd_epi16(of, ones)); };
    const Ints whole = pairs(numbers), positive = pairs(_mm256_max_epi16(numbers, _mm256_setzero_si256()));
    total += whole;
    const Ints beyond = (positive > up) | (positive - whole > down);
    if (uint32_t wide = _mm256_movemask_ps(reinterpret_cast<__m256>(beyond))) {
      alignas(32) int16_t each[kPanel];
      _mm256_store_si256(reinterpret_cast<__m256i*>(each), numbers);
      for (int64_t at = 0; at < kPanel; at += 4, wide >>= 2) {
        if (wide & 3) split_lane(each + at, static_cast<int32_t>(i + at) / 4, out + i + at, excess);
      }
    }
  }
  return sum(__builtin_convertvector(total, Vec));  // below 2^24: exact
}

#endif

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

#if defined(TRITON_ST_AMX)

// --- slices ---

// The largest integer of `slices` signed bytes; of three, with room for what rounding a float may add.
constexpr int32_t largest_fixed(int slices) { return slices == 3 ? 0x7f7f00 : 0x7f7f; }

// The n values at x (a multiple of kPanel) as slices, slice_bytes from slice to slice. Each byte is the nearest, those
// behind it hold what it is off by. Gives the scale, what the first slice counts.
inline float put_slices(const float* x, int64_t n, const Range& range, char* out, int64_t slice_bytes) {
  constexpr float kLargest = largest_fixed(kSlices), kFirst = 1 << 8 * (kSlices - 1);
  const float most = std::fmax(std::fmax(range.least, range.most), 2.6e-32f);  // so that its inverse is finite
  const Vec inverse = splat(kLargest / most);
  const __m512i carry = _mm512_set1_epi32(0x808080);
  __m512i every_fourth;  // of 2 · kWidth lanes' bytes
  for (int i = 0; i < 64; ++i) reinterpret_cast<uint8_t*>(&every_fourth)[i] = static_cast<uint8_t>(4 * i % 128);
  for (int64_t i = 0; i < n; i += kPanel) {
    auto bytes = [&](int64_t at) {
      const __m512i integers = _mm512_cvtps_epi32(reinterpret_cast<__m512>(load(x + at) * inverse));
      return _mm512_xor_si512(_mm512_add_epi32(integers, carry), carry);
    };
    const __m512i low = bytes(i), high = bytes(i + kWidth);
    for (int slice = 0; slice < kSlices; ++slice) {
      const __m512i those = _mm512_add_epi8(every_fourth, _mm512_set1_epi8(static_cast<char>(kSlices - 1 - slice)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + slice * slice_bytes + i),
                          _mm512_castsi512_si256(_mm512_permutex2var_epi8(low, those, high)));
    }
  }
  return most * (kFirst / kLargest) + range.nothing;
}

#endif

}  // namespace triton_st
