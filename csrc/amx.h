// Products by AMX, x86's matrix unit: tiles of 16 rows of 64 bytes, multiplied sixteen rows by sixteen columns at a time.
// It is an order of magnitude faster than vectors, so whatever comes of a product has to be done beside it, not after.
//
// Lanes lie as vectors want them (gemm.h): 16 lanes of a row are a row of a left tile, 16 adjacent columns of a step a
// row of a right one. A lane is a pair of bf16 or four bytes; sums are fp32 or int32. What is subnormal counts as 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vector.h"

#if defined(TRITON_ST_BF16_DOT) && defined(__AVX512VNNI__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && \
    defined(__AMX_INT8__) && defined(__AVX512VBMI__) && !defined(TRITON_ST_NO_AMX)
#define TRITON_ST_AMX 1
#endif

namespace triton_st {

inline constexpr int kSlices = 3;     // bytes of a fixed-point number that stands for fp32
inline constexpr int kOrderSums = 5;  // sums of their products

#if defined(TRITON_ST_AMX)

inline constexpr bool kAmx = true;
inline constexpr int kAmxRows = 16;             // of a tile
inline constexpr int kAmxLanes = 16;            // of a tile's row
inline constexpr int kAmxBlock = 2 * kAmxRows;  // rows and columns of a block of sums: four tiles

// The tile registers, set up for as long as this lives, and given back: a thread that holds them is costly to switch.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = 4 * kAmxLanes;
      shape.rows[tile] = kAmxRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { asm volatile("tilerelease"); }
};

// The compiler's own intrinsics do not say that they read memory.
template <int kTile>
inline void load_tile(const float* lanes, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(lanes), "r"(4 * stride), "i"(kTile) : "memory");
}
// For an operand that is used once: it stays out of the first-level cache, which the other operand fills.
template <int kTile>
inline void load_tile_once(const float* lanes, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(lanes), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* sums, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(sums), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// bf16 pairs, or unsigned bytes of the left times signed bytes of the right.
template <class Sum, int kTile, int kLeft, int kRight>
inline void multiply_tile() {
  if constexpr (std::is_same_v<Sum, Vec>) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTile), "i"(kLeft), "i"(kRight));
  } else {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTile), "i"(kLeft), "i"(kRight));
  }
}

// A block of sums lies in tiles 0 to 3, by rows; its left operand in 4 and 5, its right in 6 and 7.
template <bool kTall, bool kOnce>
inline void load_left(const float* lanes, int64_t stride) {
  if constexpr (kOnce) {
    load_tile_once<4>(lanes, stride);
    if constexpr (kTall) load_tile_once<5>(lanes + kAmxRows * stride, stride);
  } else {
    load_tile<4>(lanes, stride);
    if constexpr (kTall) load_tile<5>(lanes + kAmxRows * stride, stride);
  }
}
inline void load_right(const float* lanes) {
  load_tile<6>(lanes, kAmxBlock);
  load_tile<7>(lanes + kAmxLanes, kAmxBlock);
}
template <class Sum, bool kTall>
inline void multiply_block() {
  multiply_tile<Sum, 0, 4, 6>();
  multiply_tile<Sum, 1, 4, 7>();
  if constexpr (kTall) {
    multiply_tile<Sum, 2, 5, 6>();
    multiply_tile<Sum, 3, 5, 7>();
  }
}

// sums[rows][kAmxBlock] = a · b for the 16, or, kTall, 32 rows at a; `chunks` · 16 steps of b, [steps][kAmxBlock] lanes.
// Between chunks the vectors are free: between(chunk) is called for each. kOnce: the rows are not used again soon.
//
// With kParts = 3 both operands are sums of three bf16, the larger first, and what reaches fp32's last place of their
// product is summed. A row's parts are part_stride lanes from each other; those of a chunk of b follow one another.
template <class Sum, int kParts, bool kTall, bool kOnce = false, class Between>
void multiply_tiles(const float* a, int64_t stride, int64_t part_stride, const float* b, int64_t chunks, Sum* sums,
                    Between&& between) {
  constexpr int64_t kRightLanes = kAmxLanes * kAmxBlock;
  clear_tile<0>();
  clear_tile<1>();
  if constexpr (kTall) {
    clear_tile<2>();
    clear_tile<3>();
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kAmxLanes, b += kParts * kRightLanes) {
    if constexpr (kParts == 1) {
      load_right(b);
      load_left<kTall, kOnce>(a, stride);
      multiply_block<Sum, kTall>();
    } else {
      // The order loads each operand as seldom as eight tiles allow.
      load_left<kTall, kOnce>(a, stride);
      load_right(b + 2 * kRightLanes);
      multiply_block<Sum, kTall>();
      load_right(b + kRightLanes);
      multiply_block<Sum, kTall>();
      load_right(b);
      multiply_block<Sum, kTall>();
      load_left<kTall, kOnce>(a + 2 * part_stride, stride);
      multiply_block<Sum, kTall>();
      load_left<kTall, kOnce>(a + part_stride, stride);
      multiply_block<Sum, kTall>();
      load_right(b + kRightLanes);
      multiply_block<Sum, kTall>();
    }
    between(chunk);
  }
  store_tile<0>(sums, kAmxBlock);
  store_tile<1>(sums + 1, kAmxBlock);
  if constexpr (kTall) {
    store_tile<2>(sums + 2 * kAmxRows, kAmxBlock);
    store_tile<3>(sums + 2 * kAmxRows + 1, kAmxBlock);
  }
}

// --- fixed-point numbers ---

// Numbers in kSlices signed bytes, the highest first: Σ byte_i · 256^−i. Bytes are multiplied and summed exactly, and of
// their products those of orders i + j < 4 are as much as fp32 holds: Ozaki's scheme.

template <int kTile, int kLeft, int kRight>
inline void multiply_slice() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTile), "i"(kLeft), "i"(kRight));
}

// sums[kOrderSums][kAmxRows] = a · b for the 16 rows at a and 16 columns, of the products of orders 0, 1, 2, 2 again and 3;
// `chunks` · 64 steps of b, whose numbers have kRightSlices bytes, [chunks][kRightSlices][16][16] lanes. A row's slices
// are slice_stride lanes from each other. Between chunks the vectors are free: between(chunk) is called for each.
template <int kRightSlices, class Between>
void multiply_slices(const float* a, int64_t stride, int64_t slice_stride, const float* b, int64_t chunks, Ints* sums,
                     Between&& between) {
  static_assert(kSlices == 3 && kOrderSums == 5 && (kRightSlices == 2 || kRightSlices == 3));
  constexpr int64_t kSliceLanes = kAmxLanes * kAmxLanes;
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>(), clear_tile<4>();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += kAmxLanes, b += kRightSlices * kSliceLanes) {
    // No sum is added to before its last addition is done, for which order 2 has two; that leaves one tile for the left
    // operand and two for the right.
    load_tile_once<5>(a, stride);
    load_tile<6>(b, kAmxLanes), multiply_slice<0, 5, 6>();
    load_tile<7>(b + kSliceLanes, kAmxLanes), multiply_slice<1, 5, 7>();
    if constexpr (kRightSlices == 3) load_tile<6>(b + 2 * kSliceLanes, kAmxLanes), multiply_slice<2, 5, 6>();
    load_tile_once<5>(a + slice_stride, stride);
    if constexpr (kRightSlices == 3) multiply_slice<4, 5, 6>();
    multiply_slice<3, 5, 7>();
    if constexpr (kRightSlices == 3) load_tile<6>(b, kAmxLanes);
    multiply_slice<1, 5, 6>();
    load_tile_once<5>(a + 2 * slice_stride, stride);
    multiply_slice<2, 5, 6>(), multiply_slice<4, 5, 7>();
    between(chunk);
  }
  store_tile<0>(sums, kAmxLanes), store_tile<1>(sums + kAmxRows, kAmxLanes);
  store_tile<2>(sums + 2 * kAmxRows, kAmxLanes), store_tile<3>(sums + 3 * kAmxRows, kAmxLanes);
  store_tile<4>(sums + 4 * kAmxRows, kAmxLanes);
}

// Rounding must not make an infinity of a finite number. NaN stays.
inline Vec within_bf16(Vec x) {
  const Vec most = as_floats(Ints{} + 0x7f7f0000);
  return minimum(most, maximum(-most, x));
}

// A left operand's next of three parts of 2 · kWidth numbers: they are rounded to bf16, and what is left of them stays in
// `low` and `high`. Three parts hold all 24 bits of a number whose last place is not subnormal.
inline Vec take_part(Vec& low, Vec& high) {
  const __m512i part = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(within_bf16(high), within_bf16(low)));
  low -= widen_bf16(_mm512_castsi512_si256(part));
  high -= widen_bf16(_mm512_extracti64x4_epi64(part, 1));
  return reinterpret_cast<Vec>(part);
}

// A right operand's, of two steps: lane i = the pair (first[i], second[i]). They are cut off, which is sooner done; that
// the left's are rounded keeps the products that are left out at about fp32's last place.
inline Vec take_part_across(Vec& first, Vec& second) {
  const Ints high = Ints{} + static_cast<int32_t>(0xffff0000);
  const Ints first_part = as_ints(first) & high, second_part = as_ints(second) & high;
  first -= as_floats(first_part);
  second -= as_floats(second_part);
  return as_floats(reinterpret_cast<Ints>(reinterpret_cast<Words>(first_part) >> 16) | second_part);
}

#else
inline constexpr bool kAmx = false;
#endif

}  // namespace triton_st
