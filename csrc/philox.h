// Dropout from Philox-4x32-10, the same bits as `triton_st/reference/philox.py` has them: whether an element is kept is
// a function of a seed, a stream and of where it stands. Four adjacent elements are a group; a row begins with a group.
//
// Two forms, for two ways to lay elements into lanes:
//   Dropout::random_words(groups)  the four words of kWidth groups: for whoever has groups across lanes
//   KeepBits                       a bit for each element of a run of groups: for adjacent elements across lanes
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "tensor.h"
#include "vector.h"

namespace triton_st {

typedef uint64_t Longs __attribute__((vector_size(4 * kWidth)));  // kWidth / 2 lanes

// kWidth group numbers: those of the first half of the lanes and those of the second.
struct Groups {
  Longs first, second;
};

// Group `start` in lane 0, `step` more in each next lane.
inline Groups groups_from(int64_t start, int64_t step) {
  Groups groups;
  for (int i = 0; i < kWidth / 2; ++i) {
    groups.first[i] = static_cast<uint64_t>(start + step * i);
    groups.second[i] = static_cast<uint64_t>(start + step * (i + kWidth / 2));
  }
  return groups;
}

inline Groups operator+(Groups groups, int64_t offset) {
  return {groups.first + static_cast<uint64_t>(offset), groups.second + static_cast<uint64_t>(offset)};
}

struct RandomWords {
  Words word[4];
};

// What one place of the model drops, and what kept elements are multiplied by.
class Dropout {
 public:
  Dropout(double p, uint64_t seed, int64_t stream) : stream_(static_cast<uint32_t>(stream)) {
    const double dropped = std::nearbyint(p * 4294967296.0);
    active_ = dropped > 0;
    last_dropped_ = active_ ? static_cast<uint32_t>(static_cast<uint64_t>(dropped) - 1) : 0;
    factor_ = p >= 1 ? 0.f : active_ ? static_cast<float>(1 / (1 - p)) : 1.f;
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
      low_[round] = low;
      high_[round] = high;
    }
  }

  bool active() const { return active_; }  // false where nothing is dropped
  float factor() const { return factor_; }

  RandomWords random_words(Groups groups) const {
    // A word is the low half of a lane. The high half is anything: only low halves are multiplied.
    Longs words[2][4] = {{groups.first, groups.first >> 32, splat_long(stream_), Longs{}},
                         {groups.second, groups.second >> 32, splat_long(stream_), Longs{}}};
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const Longs low = splat_long(low_[round]), high = splat_long(high_[round]);
#pragma GCC unroll 2
      for (auto& w : words) {
        const Longs even = multiply(w[0], 0xD2511F53u), odd = multiply(w[2], 0xCD9E8D57u);
        w[0] = (odd >> 32) ^ w[1] ^ low;
        w[2] = (even >> 32) ^ w[3] ^ high;
        w[1] = odd;
        w[3] = even;
      }
    }
    Words low_halves;
    for (int i = 0; i < kWidth; ++i) low_halves[i] = 2 * i;
    RandomWords result;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      result.word[i] = __builtin_shuffle(reinterpret_cast<Words>(words[0][i]), reinterpret_cast<Words>(words[1][i]),
                                         low_halves);
    }
    return result;
  }

  // All bits of a lane set where its word says keep.
  Ints kept(Words word) const { return word > last_dropped_; }

 private:
  static constexpr int kRounds = 10;

  static Longs splat_long(uint32_t x) { return Longs{} + static_cast<uint64_t>(x); }

  static Longs multiply(Longs a, uint32_t b) {
#if defined(TRITON_ST_AVX512)
    return reinterpret_cast<Longs>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(TRITON_ST_AVX2)
    return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
    return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
  }

  uint32_t low_[kRounds], high_[kRounds];  // the key of each round
  uint32_t stream_, last_dropped_;
  float factor_;
  bool active_;
};

// What an operator is told: nothing is dropped where p is 0, whatever the seed.
inline Dropout dropout_of(const std::optional<Tensor>& seed, double p, int64_t stream) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout_p must be a probability");
  if (p == 0) return {0, 0, stream};
  STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed must be an int64 tensor of one element");
  return {p, *static_cast<const uint64_t*>(seed->const_data_ptr()), stream};
}

// x in lanes that are kept, 0 in the others.
inline Vec where_kept(Ints kept, Vec x) { return kept ? x : Vec{}; }

// Groups in a row of `columns` elements.
inline int64_t groups_of(int64_t columns) { return ceil_div(columns, 4); }

// Bits of a run of groups, one per element, used kWidth at a time. Rows are next to each other in it.
class KeepBits {
 public:
  // Draws groups first_group … first_group + count − 1.
  void draw(const Dropout& dropout, int64_t first_group, int64_t count) {
    char* bytes = reinterpret_cast<char*>(memory_.reserve(ceil_div(count, 8) + kWidth));
    Groups groups = groups_from(first_group, 1);
    for (int64_t done = 0; done < count; done += kWidth, bytes += kWidth / 2, groups = groups + kWidth) {
      const RandomWords words = dropout.random_words(groups);
      uint64_t bits = 0;  // 4 · kWidth of them
      for (int i = 0; i < 4; ++i) bits |= every_fourth(lane_bits(dropout.kept(words.word[i]))) << i;
      std::memcpy(bytes, &bits, sizeof bits);  // little-endian: what of it is too much is overwritten by the next
    }
  }

  // x with dropped lanes set to 0, lane 0 being element `element` of the run, a multiple of 4.
  Vec apply(int64_t element, Vec x) const {
    uint32_t bits;
    std::memcpy(&bits, reinterpret_cast<const char*>(memory_.get()) + element / 8, sizeof bits);
    return where(bits >> (element & 4), x);
  }

 private:
  static uint32_t lane_bits(Ints mask) {
#if defined(TRITON_ST_AVX512)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(TRITON_ST_AVX2)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
    return bits;
#endif
  }

  // Bit i goes to bit 4 i.
  static uint64_t every_fourth(uint64_t bits) {
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return (bits | bits << 3) & 0x1111111111111111u;
  }

  static Vec where(uint32_t bits, Vec x) {
#if defined(TRITON_ST_AVX512)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
#else
    Ints lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = 1 << i;
    return ((Ints{} + static_cast<int32_t>(bits)) & lane) != 0 ? x : Vec{};
#endif
  }

  Buffer memory_;
};

}  // namespace triton_st
