// A bias of attention's scores by relative position, and its gradient.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "sequences.h"
#include "tensor.h"

namespace triton_st {

// [heads, 2 · reach − 1], by key − query from 1 − reach on, where no sequence is longer than `reach`; or none.
class RelativeBias {
 public:
  RelativeBias(const std::optional<Tensor>& x, int64_t heads, const Sequences& sequences) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(0) == heads &&
                        x->size(1) % 2 == 1 && x->size(1) >= 2 * sequences.longest() - 1,
                    "relative_bias must be float32 [H, 2 P - 1], P at least the longest sequence's length");
    tensor_ = torch::stable::contiguous(*x);
    columns_ = tensor_->size(1);
    data_ = static_cast<const float*>(tensor_->const_data_ptr());
  }

  int64_t columns() const { return columns_; }
  // A head's, from distance 0 on in both directions; null where there is none.
  const float* of(int64_t head) const { return data_ ? data_ + head * columns_ + columns_ / 2 : nullptr; }

 private:
  std::optional<Tensor> tensor_;
  const float* data_ = nullptr;
  int64_t columns_ = 0;
};

// Its gradient, from that of every sequence and head, which are added in the sequences' order.
class RelativeBiasSums {
 public:
  RelativeBiasSums(const RelativeBias& bias, int64_t heads, const Sequences& sequences)
      : sequences_(sequences), heads_(heads), columns_(bias.columns()) {
    if (columns_ > 0) memory_.reserve(2 * heads * sequences.tokens() + 1);
  }

  // [2 · length − 1], by query − key from 1 − length on; null where there is no bias.
  float* of(int64_t sequence, int64_t head) const {
    return columns_ > 0 ? memory_.get() + 2 * (head * sequences_.tokens() + sequences_.start(sequence)) : nullptr;
  }

  // [heads, 2 · reach − 1], as the bias is; without one, [heads, 0].
  Tensor finish() const {
    Tensor out = empty({heads_, columns_}, ScalarType::Float);
    float* results = data<float>(out);
    parallel(columns_ > 0 ? heads_ : 0, 2 * heads_ * sequences_.tokens(), [&](int64_t head) {
      std::vector<double> total(columns_);
      for (int64_t s = 0; s < sequences_.count(); ++s) {
        const float* from = of(s, head);
        double* last = total.data() + columns_ / 2 + sequences_.length(s) - 1;
        for (int64_t i = 0; i < 2 * sequences_.length(s) - 1; ++i) last[-i] += from[i];
      }
      std::copy(total.begin(), total.end(), results + head * columns_);
    });
    return out;
  }

 private:
  const Sequences& sequences_;
  int64_t heads_, columns_;
  Buffer memory_;
};

}  // namespace triton_st
