// Cosine of every row of a with every row of b, and both gradients. Inputs are multiplied as they are; the norms enter
// where a product is written, or where the gradient is packed. Nothing of size [M, N] is written but the result.
#include "gemm.h"
#include "normalize.h"
#include "tensor.h"

namespace triton_st {
namespace {

// out[j] = products[j] · row · columns[j]
template <class T>
void write_cosines(T* out, const float* products, float row, const float* columns, int64_t n) {
  const Vec factor = splat(row);
  int64_t j = 0;
  for (; j + kWidth <= n; j += kWidth) store(out + j, load(products + j) * factor * load(columns + j));
  if (j < n) store(out + j, load(products + j) * factor * load(columns + j), static_cast<int>(n - j));
}

Tensor cosine_similarity(const Tensor& a_in, const Tensor& b_in) {
  const Tensor a_dense = dense_rows(a_in), b_dense = dense_rows(b_in);
  const int64_t m = a_in.size(0), n = b_in.size(0);
  STD_TORCH_CHECK(a_in.size(1) == b_in.size(1) && a_in.scalar_type() == b_in.scalar_type(), "a and b do not fit");
  Tensor out = empty({m, n}, a_in.scalar_type());
  dispatch(a_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> a = matrix<T>(a_dense), b = matrix<T>(b_dense);
    T* result = data<T>(out);
    const RowScales a_scales(a), b_scales(b);
    const float *a_inverse = a_scales.inverse(), *b_inverse = b_scales.inverse();
    ScoreBlocks(m, n).for_each(a, a_scales.from(0), b, b_scales.from(0),
                               [&](int64_t i, int64_t j, int64_t count, const float* products) {
                                 write_cosines(result + i * n + j, products, a_inverse[i], b_inverse + j, count);
                               });
  });
  return out;
}

// A few rows of results with a long inner dimension leave threads idle unless that is split too. The split is a matter
// of the shapes alone; the parts are summed in order.
int64_t depth_parts(int64_t rows, int64_t depth) {
  return rows > 4 * kBlockRows ? 1 : std::max<int64_t>(depth / 8192, 1);
}

std::tuple<Tensor, Tensor> cosine_similarity_backward(const Tensor& grad_in, const Tensor& a_in, const Tensor& b_in) {
  const Tensor grad_dense = dense_rows(grad_in), a_dense = dense_rows(a_in), b_dense = dense_rows(b_in);
  const int64_t m = a_in.size(0), n = b_in.size(0), d = a_in.size(1);
  STD_TORCH_CHECK(b_in.size(1) == d && grad_in.size(0) == m && grad_in.size(1) == n, "grad, a and b do not fit");
  STD_TORCH_CHECK(a_in.scalar_type() == b_in.scalar_type() && a_in.scalar_type() == grad_in.scalar_type(),
                  "grad, a and b must have one dtype");
  Tensor grad_a = empty({m, d}, a_in.scalar_type()), grad_b = empty({n, d}, a_in.scalar_type());
  dispatch(a_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr bool kPaired = kPairs<T>;
    const Matrix<const T> a = matrix<T>(a_dense), b = matrix<T>(b_dense), grad = matrix<T>(grad_dense);
    const RowScales a_scales(a), b_scales(b);
    // Gradients of the unit rows, one copy for each part of the inner dimension: of a from grad · b̂, of b from gradᵀ ·
    // â. The norm inside the inner dimension multiplies grad as it is packed, so that a half input is not rounded.
    const int64_t width = round_up(d, kPanel), a_parts = depth_parts(m, n), b_parts = depth_parts(n, m);
    const Buffer a_sums(a_parts * m * width), b_sums(b_parts * n * width);
    const int64_t a_blocks = ceil_div(m, kBlockRows), b_blocks = ceil_div(n, kBlockRows);
    const int64_t a_units = a_blocks * a_parts, b_units = b_blocks * b_parts;
    parallel(a_units + b_units, 2 * product_cost(m, n, d), [&](int64_t unit) {
      if (unit < a_units) {
        const int64_t block = unit % a_blocks, part = unit / a_blocks;
        const int64_t i = m * block / a_blocks, rows = m * (block + 1) / a_blocks - i;
        const int64_t j = n * part / a_parts, depth = n * (part + 1) / a_parts - j;
        accumulate<T, false>(rows, {b.row(j), depth, d, b.stride}, b_scales.power() + j,
                             a_sums.get() + (part * m + i) * width, width, false,
                             [&](int64_t k, int64_t count, float* out, int64_t stride) {
                               pack_rows<kPaired, T>({grad.row(i) + j + k, rows, count, grad.stride}, nullptr,
                                                     b_scales.inverse() + j + k, out, stride);
                             });
      } else {
        const int64_t block = (unit - a_units) % b_blocks, part = (unit - a_units) / b_blocks;
        const int64_t j = n * block / b_blocks, rows = n * (block + 1) / b_blocks - j;
        const int64_t i = m * part / b_parts, depth = m * (part + 1) / b_parts - i;
        accumulate<T, true>(rows, {a.row(i), depth, d, a.stride}, a_scales.power() + i,
                            b_sums.get() + (part * n + j) * width, width, false,
                            [&](int64_t k, int64_t count, float* out, int64_t stride) {
                              pack_depth<kPaired, T>({grad.row(i + k) + j, count, rows, grad.stride},
                                                     a_scales.inverse() + i + k, out, kPanel, stride);
                            });
      }
    });
    auto finish = [&](Matrix<const T> x, const RowScales& scales, const Buffer& sums, int64_t parts, Tensor& out) {
      constexpr int64_t kGroup = 16;
      T* result = data<T>(out);
      parallel(ceil_div(x.rows, kGroup), x.rows * (parts + 2) * width / 8, [&](int64_t unit) {
        for (int64_t i = unit * kGroup; i < std::min((unit + 1) * kGroup, x.rows); ++i) {
          float* total = sums.get() + i * width;
          for (int64_t part = 1; part < parts; ++part) {
            const float* more = total + part * x.rows * width;
            for (int64_t k = 0; k < width; k += kWidth) store(total + k, load(total + k) + load(more + k));
          }
          project(total, x.row(i), scales[i], 1.f, result + i * d, d);
        }
      });
    };
    finish(a, a_scales, a_sums, a_parts, grad_a);
    finish(b, b_scales, b_sums, b_parts, grad_b);
  });
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def("cosine_similarity(Tensor a, Tensor b) -> Tensor");
  m.def("cosine_similarity_backward(Tensor grad, Tensor a, Tensor b) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("cosine_similarity", TORCH_BOX(&cosine_similarity));
  m.impl("cosine_similarity_backward", TORCH_BOX(&cosine_similarity_backward));
}

}  // namespace triton_st
