// Vectors of fp32 as wide as the processor the compiler is told to build for: 16 lanes with AVX-512, 8 with AVX2, else
// 4 (GCC turns those into SSE or NEON). Arithmetic is written with GCC's vector operators, which every width has; only
// what they lack (conversions of half types, masked tails, sums across lanes) is spelled out per instruction set.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define TRITON_ST_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TRITON_ST_AVX2 1
#endif

// A product of pairs of bf16 summed in fp32 in one instruction.
#if defined(TRITON_ST_AVX512) && defined(__AVX512BF16__)
#define TRITON_ST_BF16_DOT 1
#endif

namespace triton_st {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

#if defined(TRITON_ST_AVX512)
inline constexpr int kWidth = 16;
#elif defined(TRITON_ST_AVX2)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

// Written so that GCC makes one broadcast of it, which a loop over lanes does not become.
inline Vec splat(float x) { return x - Vec{}; }
inline Ints splat_ints(int32_t x) { return Ints{} + x; }

inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  return lanes;
}

inline Vec as_floats(Ints x) { return reinterpret_cast<Vec>(x); }
inline Ints as_ints(Vec x) { return reinterpret_cast<Ints>(x); }

// a · b + c, rounded once where the processor can. The compiler is told not to fuse anything else: the same expression
// must give the same bits wherever it stands.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(TRITON_ST_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(TRITON_ST_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The rounding of fp32 to bf16 (to nearest even, NaN stays NaN), in the low 16 bits of each lane.
inline Ints bf16_bits(Vec x) {
  const Ints bits = as_ints(x);
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : ((bits >> 16) | 0x40);
}

// --- loads and stores; `n` < kWidth elements: the others read as 0 and are not written ---

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Ints load_ints(const int32_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

#if defined(TRITON_ST_AVX512)

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }

inline Vec widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const BFloat16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

inline __m256i narrow(Vec x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256i narrow(Vec x, BFloat16) { return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bf16_bits(x))); }

template <class T>
inline void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T()));
}
template <class T>
inline void store(T* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x, T()));
}

inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }

#else

#if defined(TRITON_ST_AVX2)

inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

inline Vec load(const Half* p) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
inline Vec load(const BFloat16* p) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = static_cast<float>(p[i]);
  return x;
}
inline void store(Half* p, Vec x) {
  for (int i = 0; i < kWidth; ++i) p[i] = Half(x[i]);
}

#endif

inline void store(BFloat16* p, Vec x) {
  const Ints bits = bf16_bits(x);
  for (int i = 0; i < kWidth; ++i) p[i].x = static_cast<uint16_t>(bits[i]);
}

template <class T>
inline Vec load(const T* p, int n) {
  T whole[kWidth] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
inline void store(T* p, Vec x, int n) {
  T whole[kWidth];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(T));
}

inline float sum(Vec x) {
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

#endif

// --- cache lines ---

inline constexpr int64_t kLine = 64;  // bytes

// Bytes from p to the next beginning of a line.
inline int64_t to_next_line(const void* p) { return -reinterpret_cast<uintptr_t>(p) % kLine; }

// Asks for `bytes` bytes, a line at a time; with kLocality 2 they come no nearer than the second-level cache.
template <int kLocality = 3>
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, kLocality);
}

// Copies a line to `to`, the beginning of one, past the caches where the processor can: the line is not read first, and
// drives out nothing. Other threads see it after finish_streams().
inline void stream_line(char* to, const char* from) {
#if defined(TRITON_ST_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(TRITON_ST_AVX2)
  for (int half = 0; half < kLine; half += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + half),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half)));
  }
#else
  std::memcpy(to, from, kLine);
#endif
}

inline void finish_streams() {
#if defined(TRITON_ST_AVX512) || defined(TRITON_ST_AVX2)
  _mm_sfence();
#endif
}

// --- functions ---

// The larger and the lesser; b where either is NaN. By name, since GCC makes two instructions of a choice in which one
// side is a constant.
#if defined(TRITON_ST_AVX512)
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
#elif defined(TRITON_ST_AVX2)
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
#endif

inline Vec absolute(Vec x) { return as_floats(as_ints(x) & 0x7fffffff); }

inline float largest(Vec x) {
  float result = x[0];
  for (int i = 1; i < kWidth; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// 1 / x of a positive x, within 2 ulp: a division holds up everything else.
inline Vec reciprocal(Vec x) {
#if defined(TRITON_ST_AVX512)
  const Vec about = _mm512_rcp14_ps(x);
  return about * fma(-about, x, splat(2.f));
#else
  return splat(1.f) / x;
#endif
}

// e^x within 2 ulp; 0 at −inf and wherever the result is below the smallest fp32, inf above the largest, NaN at NaN.
inline Vec exp(Vec x) {
  x = minimum(splat(89.f), maximum(splat(-104.f), x));  // in this order a NaN stays
  const Vec magic = splat(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  // x − n·ln 2 with ln 2 in two parts, the first exact in few bits.
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.f);
#if defined(TRITON_ST_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors: n reaches −150, and one factor's exponent stops at −126.
  const Ints power = as_ints(shifted) - as_ints(magic);
  const Ints first = power >> 1;
  return p * as_floats((first + 127) << 23) * as_floats((power - first + 127) << 23);
#endif
}

// 2^x within 1e-7 of itself, of an x that is not above 0; NaN at NaN.
inline Vec exp2_below(Vec x) {
#if defined(TRITON_ST_AVX512)
  x = maximum(splat(-200.f), x);  // −inf less −inf would be NaN
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
  Vec p = fma(splat(1.327335385e-3f), r, splat(9.671758133e-3f));
  p = fma(p, r, splat(5.550700996e-2f));
  p = fma(p, r, splat(2.402223680e-1f));
  p = fma(p, r, splat(6.931470070e-1f));
  return _mm512_scalef_ps(fma(p, r, splat(1.f)), n);
#else
  return exp(x * 0.69314718f);
#endif
}

// ln x within 2 ulp for normal x > 0; NaN at NaN. (What is not normal or not positive is not served.)
inline Vec log(Vec x) {
  // x = m · 2^e with √½ ≤ m < √2
  const Ints bits = as_ints(x) - 0x3f3504f3;
  const Vec e = __builtin_convertvector(bits >> 23, Vec);
  const Vec r = as_floats((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, r, splat(-1.1514610310e-1f));
  p = fma(p, r, splat(1.1676998740e-1f));
  p = fma(p, r, splat(-1.2420140846e-1f));
  p = fma(p, r, splat(1.4249322787e-1f));
  p = fma(p, r, splat(-1.6668057665e-1f));
  p = fma(p, r, splat(2.0000714765e-1f));
  p = fma(p, r, splat(-2.4999993993e-1f));
  p = fma(p, r, splat(3.3333331174e-1f));
  const Vec square = r * r;
  p = fma(e, splat(-2.12194440e-4f), p * r * square);
  const Vec result = fma(e, splat(0.693359375f), r + fma(square, splat(-0.5f), p));
  return x == x ? result : x;
}

// A finite number past fp16's range becomes the largest that T holds. For activations alone: a gradient that overflows
// must show.
template <class T>
inline Vec saturated(Vec x) {
  if constexpr (!std::is_same_v<T, Half>) return x;
  const Vec clamped = minimum(splat(65504.f), maximum(splat(-65504.f), x));
  return absolute(x) < splat(std::numeric_limits<float>::infinity()) ? clamped : x;
}

// --- lanes that hold pairs of bf16 ---

#if defined(TRITON_ST_BF16_DOT)
// 2 · kWidth fp32, rounded, as adjacent bf16.
inline Vec pair_adjacent(Vec low, Vec high) { return reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(high, low)); }
// Lane i = the pair (first[i], second[i]), rounded.
inline Vec pair_across(Vec first, Vec second) {
  __m512i words;
  for (int i = 0; i < 32; ++i) reinterpret_cast<uint16_t*>(&words)[i] = static_cast<uint16_t>(i / 2 + i % 2 * kWidth);
  return reinterpret_cast<Vec>(_mm512_permutexvar_epi16(words, reinterpret_cast<__m512i>(pair_adjacent(first, second))));
}
#else
inline Vec pair_adjacent(Vec low, Vec) { return low; }
inline Vec pair_across(Vec first, Vec) { return first; }
#endif

// --- squares of lanes ---

// Which lanes of rows i and i + distance, one behind the other, go to the first and to the second of them.
struct Exchange {
  Ints first, second;
  explicit Exchange(int distance) {
    for (int lane = 0; lane < kWidth; ++lane) {
      const bool from_second = lane & distance;
      first[lane] = from_second ? kWidth + lane - distance : lane;
      second[lane] = from_second ? kWidth + lane : lane + distance;
    }
  }
};

// Transposes a square of kWidth × kWidth lanes.
inline void transpose(Vec (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < kWidth; distance *= 2) {
    const Exchange lanes(distance);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if (i & distance) continue;
      const Vec a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, lanes.first);
      rows[i + distance] = __builtin_shuffle(a, b, lanes.second);
    }
  }
}

// Lane i = what `combine`, of two vectors, makes of the lanes of rows[i]; the rows are used up.
template <class Combine>
inline Vec combine_rows(Vec (&rows)[kWidth], Combine&& combine) {
#pragma GCC unroll 4
  for (int distance = 1; distance < kWidth; distance *= 2) {
    const Exchange lanes(distance);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i += 2 * distance) {
      const Vec a = rows[i], b = rows[i + distance];
      rows[i] = combine(__builtin_shuffle(a, b, lanes.first), __builtin_shuffle(a, b, lanes.second));
    }
  }
  return rows[0];
}

}  // namespace triton_st
