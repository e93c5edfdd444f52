// What every operator needs of torch: typed views of tensors, new tensors, dispatch by dtype, and work shared by
// threads. Only torch's stable C++ interface is used, so a build outlives the torch release that it was made with.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vector.h"

namespace triton_st {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of `cols` adjacent elements, `stride` elements apart.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;
  T* row(int64_t i) const { return data + i * stride; }
};

// The tensor itself if its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
Matrix<const T> matrix(const Tensor& x) {  // [rows, cols] after dense_rows
  return {static_cast<const T*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0)};
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Asks for huge pages under a large piece of memory that has not been touched yet: the system then maps it in a
// fraction of the time, which for a result that is only written is most of the time.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * kHugePage)) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[4], stride = 1;  // the C interface spares the dispatcher's microsecond
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         torch::stable::detail::to<int32_t>(
                                                             torch::stable::detail::from(dtype)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * static_cast<int64_t>(result.element_size()));
  return result;
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
auto dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      STD_TORCH_CHECK(false, "the C++ kernels take float32, float16 and bfloat16, not ", dtype);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Fewer nanoseconds of work than this are done sooner by one thread than by two.
inline constexpr int64_t kWorthThreads = 12'000;

// Calls f(unit) for units 0 … units − 1, on all threads if that saves time. Threads take the next unit when they are
// done with one, so units may differ in cost. Whoever wants results that do not depend on the number of threads lets no
// unit depend on it either.
template <class F>
void parallel(int64_t units, int64_t nanoseconds, F&& f) {
  const int64_t threads =
      nanoseconds < kWorthThreads ? 1 : std::min<int64_t>(units, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) f(unit);
  });
}

// Memory aligned to cache lines, not initialised, that grows and is kept.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) { reserve(floats); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(kLine, round_up(floats * sizeof(float), kLine)));
      if (!data_) throw std::bad_alloc();
      prefer_huge_pages(data_, floats * static_cast<int64_t>(sizeof(float)));
      capacity_ = floats;
    }
    return data_;
  }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace triton_st
