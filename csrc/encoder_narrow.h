// Products of levels on processors that sum products of bytes two by two in 16 bits. Weights u are at most 255, so a pair
// of numbers a whose positive part sums to at most 128, and so its negative one, stays within: |u₀a₀ + u₁a₁| ≤ 255 · 128.
// A lane with a pair that does not is split into several that do: the first lies in its place, the others beside the
// row, and are multiplied apart. Few are, of a row of hidden states three in a hundred. Integer sums are exact whatever a
// row holds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "encoder_precision.h"

namespace triton_st {

// A part of a row's lane that is multiplied apart.
struct Excess {
  int32_t lane;
  float bytes;
};
using RowExcess = std::vector<Excess>;

// Splits four numbers of up to ±255: one part goes to `bytes`, the others to the row's excess.
inline void split_lane(const int16_t* numbers, int32_t lane, int8_t* bytes, RowExcess& excess) {
  int32_t rest[4];
  std::copy_n(numbers, 4, rest);
  auto take_part = [&](int8_t* part) {
    bool left = false;
    for (int pair = 0; pair < 4; pair += 2) {
      int32_t up = 128, down = 128;  // what the pair may still take
      for (int i = pair; i < pair + 2; ++i) {
        const int32_t taken = std::clamp(rest[i], -down, std::min(up, 127));
        (taken > 0 ? up : down) -= std::abs(taken);
        part[i] = static_cast<int8_t>(taken);
        rest[i] -= taken;
        left = left || rest[i] != 0;
      }
    }
    return left;
  };
  for (bool left = take_part(bytes); left;) {
    int8_t part[4];
    left = take_part(part);
    Excess& next = excess.emplace_back();
    next.lane = lane;
    std::memcpy(&next.bytes, part, sizeof part);
  }
}

// The excess of a block of rows, group by group of those that are multiplied at a time.
class BlockExcess {
 public:
  BlockExcess(const RowExcess* first, int64_t rows) {
    static thread_local Memory memory;  // kept: a thread works on one block at a time
    memory.parts.clear();
    memory.ends.assign(1, 0);
    for_row_groups(rows, [&](int64_t group, int64_t count) {
      for (int64_t r = 0; r < count; ++r) {
        for (const Excess& excess : first[group + r]) memory.parts.push_back({static_cast<int32_t>(r), excess});
      }
      memory.ends.push_back(memory.parts.size());
    });
    parts_ = memory.parts.data();
    ends_ = memory.ends.data();
  }

  // Adds the products of the group-th group, whose sums these are, with a panel.
  template <class P>
  void add(int64_t group, const typename P::Weight* panel, typename P::Sum* sums) const {
    for (const Part* part = parts_ + ends_[group]; part < parts_ + ends_[group + 1]; ++part) {
      const typename P::Weight* step = panel + part->excess.lane * kPanel;
      typename P::Sum* to = sums + 2 * part->row;
      const Vec bytes = broadcast(&part->excess.bytes);
      for (int v = 0; v < 2; ++v) to[v] = P::multiply_add(bytes, load(step + v * kWidth), to[v]);
    }
  }

 private:
  struct Part {
    int32_t row;
    Excess excess;
  };
  struct Memory {
    std::vector<Part> parts;
    std::vector<size_t> ends;
  };
  const Part* parts_;
  const size_t* ends_;
};

}  // namespace triton_st
