// Writes one row many times over, past the caches when the output is larger than they are.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace triton_st {

// Outputs larger than this are written with non-temporal stores: they would evict everything else and be read from memory
// anyway, and a plain store first reads the line that it overwrites.
inline constexpr int64_t kNonTemporalBytes = 16 << 20;

typedef char Line __attribute__((vector_size(64), may_alias));

inline void store_past_caches(char* p, const Line& x) {
#if defined(TRITON_ST_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(TRITON_ST_AVX2)
  __m256i halves[2];
  std::memcpy(halves, &x, sizeof x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves[0]);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, halves[1]);
#else
  std::memcpy(p, &x, sizeof x);
#endif
}

// Makes non-temporal stores visible to the threads that are started or awaited next.
inline void finish_stores() {
#if defined(TRITON_ST_AVX2) || defined(TRITON_ST_AVX512)
  _mm_sfence();
#endif
}

// A row of `bytes` bytes, repeated so that a whole cache line can be read at every offset below `period`.
class Pattern {
 public:
  // `memory` holds at least `needed(bytes)` bytes, the row in its first `bytes`.
  Pattern(char* memory, int64_t bytes) : memory_(memory), period_(bytes) {
    while (period_ < kLine) period_ += bytes;
    for (int64_t i = bytes; i < period_ + kLine; ++i) memory[i] = memory[i - bytes];
  }
  static int64_t needed(int64_t bytes) { return 2 * kLine + 2 * bytes; }

  // Writes `count` bytes of the repeated row to p.
  template <bool kPastCaches>
  void write(char* p, int64_t count) const {
    int64_t offset = 0;
    if constexpr (kPastCaches) {
      const int64_t head = std::min<int64_t>(count, -reinterpret_cast<uintptr_t>(p) % kLine);
      std::memcpy(p, memory_, head);
      p += head;
      count -= head;
      offset = head % period_;
    }
    for (; count >= kLine; count -= kLine, p += kLine) {
      Line line;
      std::memcpy(&line, memory_ + offset, sizeof line);
      if constexpr (kPastCaches) {
        store_past_caches(p, line);
      } else {
        std::memcpy(p, &line, sizeof line);
      }
      offset += kLine;
      offset = offset >= period_ ? offset - period_ : offset;
    }
    std::memcpy(p, memory_ + offset, count);
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* memory_;
  int64_t period_;
};

}  // namespace triton_st
