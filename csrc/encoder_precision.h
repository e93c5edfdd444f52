// The precisions of inference: how each stores weights and activations, and what multiplies them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "amx.h"
#include "gemm.h"

#if (defined(TRITON_ST_AVX512) && defined(__AVX512VNNI__)) || (defined(TRITON_ST_AVX2) && defined(__AVXVNNI__))
#define TRITON_ST_VNNI 1
#elif defined(TRITON_ST_AVX2)
// Products of bytes are summed two by two in 16 bits, which they may exceed.
#define TRITON_ST_NARROW_SUMS 1
#endif

namespace triton_st {

// A precision says how a panel of weights is stored (kStep adjacent steps of the inner dimension in one Weight), in
// which type activations lie in memory, and whether tiles multiply them (kTiled). Rows of operands may be numbers of
// few bits with a scale (kScaled): levels with a zero point (kQuantised), whose products may be summed in 16 bits at
// first (kNarrowSums), or kSlices bytes each for fp32's accuracy (kSliced).

struct FloatPrecision {
  using Weight = float;
  using Activation = float;
  using Sum = Vec;
  static constexpr int kStep = 1;
  static constexpr bool kQuantised = false, kSliced = false, kScaled = false, kTiled = false, kNarrowSums = false;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// Weights are stored in half and widened as they are read: half the memory to read, fp32 arithmetic.
template <class T>
struct StoredPrecision : FloatPrecision {
  using Weight = T;
};

#if defined(TRITON_ST_AMX)
// Activations are fixed-point numbers of kSlices bytes with a scale for each row, weights of kWeightSlices with a scale
// for each output; sums are exact.
template <int kWeightSlices_>
struct SlicedPrecision {
  using Weight = float;  // four bytes, a slice of as many numbers
  using Activation = float;
  using Sum = Ints;
  static constexpr int kStep = 4, kWeightSlices = kWeightSlices_;
  static constexpr bool kQuantised = false, kSliced = true, kScaled = true, kTiled = true, kNarrowSums = false;
};
using Float32Precision = SlicedPrecision<3>;
using Float16Precision = SlicedPrecision<2>;
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
  static constexpr bool kQuantised = false, kSliced = false, kScaled = false, kTiled = kAmx, kNarrowSums = false;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return triton_st::multiply_add<true>(a, b, c); }
};
using BFloat16Precision = PairPrecision;
using CompactActivation = BFloat16;
#else
using BFloat16Precision = StoredPrecision<BFloat16>;
using CompactActivation = float;
#endif

// Activations are levels of a byte (per row: scale and zero point), weights signed bytes (per output: scale); sums are
// exact. Levels are multiplied as they are, or, where sums are narrow, less their zero point: weights, plus 128, are
// the unsigned bytes then, and what could exceed 16 bits is multiplied apart (encoder_narrow.h). Without an instruction
// for either, both are widened to 16 bits.
struct Int8Precision {
  using Weight = float;  // four bytes, or two numbers of 16 bits
  using Activation = CompactActivation;
  using Sum = Ints;
#if defined(TRITON_ST_VNNI)
  using Number = int8_t;
  using Level = uint8_t;
#elif defined(TRITON_ST_NARROW_SUMS)
  using Number = uint8_t;
  using Level = int8_t;
#else
  using Number = int16_t;
  using Level = int16_t;
#endif
  static constexpr int kStep = 4 / sizeof(Number);
  static constexpr int32_t kWeightOffset = std::is_same_v<Number, uint8_t> ? 128 : 0;  // of what is stored
  static constexpr bool kQuantised = true, kSliced = false, kScaled = true, kTiled = kAmx;
  static constexpr bool kNarrowSums = kWeightOffset != 0;
  static Ints multiply_add(Vec a, Vec b, Ints c) {
#if defined(TRITON_ST_VNNI) && defined(TRITON_ST_AVX512)
    // The intrinsic makes GCC 12 spill its sums, at 40 % of the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#elif defined(TRITON_ST_VNNI)
    // The assembler would take AVX-512's form, which such a processor may lack.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
    return c;
#elif defined(TRITON_ST_AVX512)
    return c + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(TRITON_ST_NARROW_SUMS)
    const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(a));
    return c + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    const Ints x = as_ints(a), y = as_ints(b);
    return c + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
  }
};

// Rows that are multiplied at a time. Tiles read whole groups: their operands end in as many readable rows.
template <class P>
inline constexpr int64_t kGroupRows = !P::kTiled ? kTileRows : (P::kSliced ? kWidth : kPanel);

// Outputs of a panel of weights, in vectors and in columns: slices are multiplied soonest by few.
template <class P>
inline constexpr int kPanelVectors = P::kSliced ? 1 : 2;
template <class P>
inline constexpr int64_t kPanelColumns = kPanelVectors<P> * kWidth;

// Lanes of each slice of a left operand's row. Tiles take 16 lanes: of bytes, what an operand has beyond its inputs
// there, anything, meets zeros; of pairs, sizes padded to kPanel leave nothing beyond.
template <class P>
constexpr int64_t row_lanes(int64_t inputs) {
  return P::kTiled ? round_up(inputs / P::kStep, kWidth) : inputs / P::kStep;
}

// Steps of a panel: rows of kPanelColumns Weights.
template <class P>
constexpr int64_t panel_steps(int64_t inputs) {
  if constexpr (P::kSliced) return P::kWeightSlices * row_lanes<P>(inputs);
  return row_lanes<P>(inputs);
}

// Inputs of the second feed-forward layer that are summed before they are added up, and hidden activations that are held:
// tiles read few columns of many rows soonest. A row of levels has one scale, so it is whole; a row of slices has one for
// each of these groups.
template <class P>
inline constexpr int64_t kFeedColumns = !P::kTiled || P::kQuantised ? int64_t{1} << 30 : (P::kSliced ? 384 : 768);

}  // namespace triton_st
