// The sequences of a packed batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace triton_st {

// Sequence s is tokens [start(s), start(s + 1)) of a packed batch.
class Sequences {
 public:
  Sequences(const Tensor& cu_seqlens, int64_t tokens) : starts_(cu_seqlens.size(0)) {
    const int64_t stride = cu_seqlens.stride(0);
    const void* source = cu_seqlens.const_data_ptr();
    auto copy = [&](const auto* from) {
      for (int64_t s = 0; s <= count(); ++s) starts_[s] = from[s * stride];
    };
    if (cu_seqlens.element_size() == 8) {
      copy(static_cast<const int64_t*>(source));
    } else {
      copy(static_cast<const int32_t*>(source));
    }
    bool valid = starts_.front() == 0;
    for (int64_t s = 0; valid && s < count(); ++s) {
      valid = start(s) <= start(s + 1);  // the length of what descends far enough overflows, to a positive one
      if (valid) longest_ = std::max(longest_, length(s));
    }
    STD_TORCH_CHECK(valid && starts_.back() == tokens,
                    "cu_seqlens must ascend from 0 to the number of tokens, ", tokens);
  }

  int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t tokens() const { return starts_.back(); }
  int64_t start(int64_t s) const { return starts_[s]; }
  int64_t length(int64_t s) const { return starts_[s + 1] - starts_[s]; }
  int64_t longest() const { return longest_; }
  // The first sequence that starts at `token` or after it.
  int64_t first_from(int64_t token) const {
    return std::lower_bound(starts_.begin(), starts_.end() - 1, token) - starts_.begin();
  }

 private:
  std::vector<int64_t> starts_;
  int64_t longest_ = 0;
};

}  // namespace triton_st
