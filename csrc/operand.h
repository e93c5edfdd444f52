// Activations as operands of products with weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "gemm.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

// What activations of type T are as operands: bf16 where the processor multiplies it, else fp32.
template <class T>
using Operand = std::conditional_t<kPairs<T> || (kAmx && std::is_same_v<T, BFloat16>), BFloat16, float>;

// Elements from one row of an operand to the next: whole vectors, and no multiple of the cache's period.
template <class C>
constexpr int64_t operand_stride(int64_t cols) {
  constexpr int64_t kElements = sizeof(float) / sizeof(C) * kWidth;
  const int64_t stride = round_up(cols, kElements);
  return stride % (4 * kElements) ? stride : stride + kElements;
}

// Floats that an operand of this shape takes.
template <class C>
constexpr int64_t operand_floats(int64_t rows, int64_t cols) {
  return rows * operand_stride<C>(cols) / static_cast<int64_t>(sizeof(float) / sizeof(C));
}

template <class C>
Matrix<C> new_operand(Buffer& memory, int64_t rows, int64_t cols) {
  return {reinterpret_cast<C*>(memory.reserve(operand_floats<C>(rows, cols))), rows, cols, operand_stride<C>(cols)};
}

// Columns [column, column + kPanel) of an operand's row; those past its end, up to whole vectors, are for zeros.
inline void store_strip(float* row, int64_t n, Vec low, Vec high) {
  store(row, low);
  if (n > kWidth) store(row + kWidth, high);
}
#if defined(TRITON_ST_BF16_DOT)
inline void store_strip(BFloat16* row, int64_t, Vec low, Vec high) {
  store(reinterpret_cast<float*>(row), pair_adjacent(low, high));
}
#endif

// At most n of a strip's kPanel elements.
template <class T>
inline void store_exactly(T* row, int64_t n, Vec low, Vec high) {
  store_some(row, low, n);
  store_some(row + kWidth, high, n - kWidth);
}

// Activations as an operand: themselves if they are lanes as they lie in memory, else a copy.
template <class C, class T>
Matrix<const C> as_operand(Matrix<const T> x, Buffer& memory) {
  if constexpr (std::is_same_v<C, float> && std::is_same_v<T, float>) {
    return x;
  } else {
    if constexpr (std::is_same_v<C, T>) {
      if (x.cols % 2 == 0 && x.stride % 2 == 0) return x;
    }
    const Matrix<C> copy = new_operand<C>(memory, x.rows, x.cols);
    for (int64_t r = 0; r < x.rows; ++r) {
      const T* from = x.row(r);
      for (int64_t k = 0; k < x.cols; k += kPanel) {
        const int64_t n = x.cols - k;
        store_strip(copy.row(r) + k, n, load_some(from + k, n), load_some(from + k + kWidth, n - kWidth));
      }
    }
    return {copy.data, copy.rows, copy.cols, copy.stride};
  }
}

}  // namespace triton_st
