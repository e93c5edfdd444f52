// The largest k of a stream of scores, for many streams side by side. What is kept does not depend on how the stream is
// cut or in which order its pieces come: scores are ranked by one total order, NaN before all numbers, larger before
// smaller, and of equals (0 and −0 are equal) the lower row first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>

#include "tensor.h"
#include "vector.h"

namespace triton_st {

inline constexpr int64_t kMostRows = int64_t{1} << 32;  // a row's number takes half a key

// A score and its row as one number: the greater, the better.
inline uint64_t ranking_key(float score, uint32_t row) {
  const float positive_zero = score + 0.f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const uint32_t ordered = score != score ? ~0u : bits ^ (bits >> 31 ? ~0u : 1u << 31);
  return static_cast<uint64_t>(ordered) << 32 | ~row;
}

inline float score_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = ordered >> 31 ? ordered ^ 1u << 31 : ~ordered;  // of NaN's key: a NaN
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

inline uint32_t row_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Bit i: not (a[i] ≤ b[i]), which NaN is.
inline uint32_t not_at_most(Vec a, Vec b) {
#if defined(TRITON_ST_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
#elif defined(TRITON_ST_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
#else
  const Ints at_most = a <= b;
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(at_most[i] == 0) << i;
  return bits;
#endif
}

// Moves the k largest of n distinct keys, 0 < k ≤ n, to the front. `scratch` has room for n + 8.
inline void largest_first(uint64_t* keys, int64_t n, int64_t k, [[maybe_unused]] uint64_t* scratch) {
  int64_t begin = 0, end = n;
#if defined(TRITON_ST_AVX512)
  // Eight keys at a time are told apart from a pivot and stored side by side, without a branch.
  while (end - begin > 24) {
    const uint64_t a = keys[begin], b = keys[begin + (end - begin) / 2], c = keys[end - 1];
    const uint64_t median = std::max(std::min(a, b), std::min(std::max(a, b), c));  // not the least: the loop ends
    const __m512i pivot = _mm512_set1_epi64(static_cast<int64_t>(median));
    int64_t front = begin, back = 0;
    for (int64_t i = begin; i < end; i += 8) {
      const __mmask8 inside = static_cast<__mmask8>(end - i >= 8 ? 0xff : (1 << (end - i)) - 1);
      const __m512i key = _mm512_maskz_loadu_epi64(inside, keys + i);
      const __mmask8 upper = _mm512_mask_cmpge_epu64_mask(inside, key, pivot), lower = upper ^ inside;
      const int count = __builtin_popcount(upper);
      _mm512_mask_storeu_epi64(keys + front, static_cast<__mmask8>((1 << count) - 1),
                               _mm512_maskz_compress_epi64(upper, key));
      _mm512_storeu_si512(scratch + back, _mm512_maskz_compress_epi64(lower, key));
      front += count;
      back += __builtin_popcount(lower);
    }
    std::memcpy(keys + front, scratch, back * sizeof *keys);
    if (front == k) return;
    (front > k ? end : begin) = front;
  }
#endif
  std::nth_element(keys + begin, keys + k - 1, keys + end, std::greater<>());
}

// Candidates of `streams` streams. A stream's scores must come with rising rows: one that only equals the k-th best
// then loses to it, and a comparison with that threshold is all that nearly every score costs. Survivors are collected,
// and cut down to the best k when there is no more room.
class Candidates {
 public:
  Candidates(int64_t streams, int64_t k, int64_t rows)
      : k_(k),
        capacity_(std::min(rows, 2 * k + 64)),
        thresholds_(round_up(streams, kWidth)),
        counts_(new int64_t[streams]()),
        keys_(new uint64_t[streams * capacity_]),
        scratch_(new uint64_t[capacity_ + 8]) {
    std::fill_n(thresholds_.get(), round_up(streams, kWidth), -std::numeric_limits<float>::infinity());
  }

  // Thresholds of the streams; may be read, but mean nothing, up to a multiple of kWidth.
  const float* thresholds() const { return thresholds_.get(); }
  int64_t count(int64_t stream) const { return counts_[stream]; }
  const uint64_t* keys(int64_t stream) const { return keys_.get() + stream * capacity_; }

  void add(int64_t stream, float score, uint32_t row) {
    uint64_t* keys = keys_.get() + stream * capacity_;
    keys[counts_[stream]++] = ranking_key(score, row);
    if (counts_[stream] == capacity_ && capacity_ > k_) {
      largest_first(keys, capacity_, k_, scratch_.get());
      counts_[stream] = k_;
      const float least = score_of(*std::min_element(keys, keys + k_));
      thresholds_.get()[stream] = least == least ? least : std::numeric_limits<float>::infinity();
    }
  }

 private:
  int64_t k_, capacity_;
  Buffer thresholds_;
  std::unique_ptr<int64_t[]> counts_;
  std::unique_ptr<uint64_t[]> keys_, scratch_;
};

}  // namespace triton_st
