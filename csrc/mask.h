// Which tokens of a padded batch are wanted.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace triton_st {

inline bool is_integer(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

// attention_mask [B, L] of any integer type.
struct Mask {
  explicit Mask(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        bytes(static_cast<int64_t>(x.element_size())),
        batch(x.size(0)),
        length(x.size(1)),
        batch_stride(x.stride(0) * bytes),
        stride(x.stride(1) * bytes) {}

  // How many positions in [begin, end) of sequence b are not masked.
  int64_t count(int64_t b, int64_t begin, int64_t end) const {
    int64_t n = 0;
    typed(b, begin, [&](const auto* values, int64_t step) { n = count_of(values, step, 0, end - begin); });
    return n;
  }

  // Calls f(first, count) for every run of positions in [begin, end) of sequence b that are not masked, positions
  // counted from begin; `kept` is how many they are.
  template <class F>
  void runs(int64_t b, int64_t begin, int64_t end, int64_t kept, F&& f) const {
    typed(b, begin, [&](const auto* values, int64_t step) { runs_of(values, step, end - begin, kept, f); });
  }

  const char* data;
  int64_t bytes, batch, length, batch_stride, stride;

 private:
  template <class F>
  void typed(int64_t b, int64_t begin, F&& f) const {
    const char* p = data + b * batch_stride + begin * stride;
    switch (bytes) {
      case 1:
        return f(reinterpret_cast<const uint8_t*>(p), stride);
      case 2:
        return f(reinterpret_cast<const uint16_t*>(p), stride / 2);
      case 4:
        return f(reinterpret_cast<const uint32_t*>(p), stride / 4);
      default:
        return f(reinterpret_cast<const uint64_t*>(p), stride / 8);
    }
  }

  template <class M>
  static int64_t count_of(const M* values, int64_t step, int64_t first, int64_t last) {
    int64_t n = 0;
    if (step == 1) {
      for (int64_t i = first; i < last; ++i) n += values[i] != 0;
    } else {
      for (int64_t i = first; i < last; ++i) n += values[i * step] != 0;
    }
    return n;
  }

  template <class M, class F>
  static void runs_of(const M* values, int64_t step, int64_t length, int64_t kept, F& f) {
    if (kept == 0) return;
    // Counting is a tenth of the time of looking for runs, and shows the usual case: padding at one end.
    for (const int64_t first : {int64_t{0}, length - kept}) {
      if (kept == length || count_of(values, step, first, first + kept) == kept) return f(first, kept);
    }
    for (int64_t i = 0; i < length; ++i) {
      const int64_t first = i;
      while (i < length && values[i * step] != 0) ++i;
      if (i > first) f(first, i - first);
    }
  }
};

}  // namespace triton_st
