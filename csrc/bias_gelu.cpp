// gelu(x + bias) with the exact GELU, and its gradient; the arithmetic is that of gelu.h.
#include "gelu.h"
#include "layer_norm.h"

namespace triton_st {
namespace {

constexpr double kNanosecondsPerGelu = 0.5;

int64_t gelu_cost(int64_t rows, int64_t n) {
  return static_cast<int64_t>(kNanosecondsPerGelu * static_cast<double>(rows) * static_cast<double>(n));
}

Tensor bias_gelu(const Tensor& x_in, const Tensor& bias_in) {
  const Tensor x = dense_rows(x_in);
  const int64_t rows = x.size(0), columns = x.size(1);
  const ParameterVector bias(bias_in, columns, "bias");
  Tensor out = empty({rows, columns}, x.scalar_type());
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> xs = matrix<T>(x);
    T* results = data<T>(out);
    parallel(ceil_div(rows, kNormRows), gelu_cost(rows, columns), [&](int64_t unit) {
      for (int64_t row = unit * kNormRows; row < std::min((unit + 1) * kNormRows, rows); ++row) {
        const T* input = xs.row(row);
        for_vectors(columns, [&](int64_t k, int64_t n) {
          const Vec sum = load_some(input + k, n) + load_some(bias + k, n);
          store_some(results + row * columns + k, saturated<T>(gelu(sum)), n);
        });
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& bias_in) {
  const Tensor grad = dense_rows(grad_in), x = dense_rows(x_in);
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == 2 && grad.size(0) == rows &&
                      grad.size(1) == columns,
                  "grad must be as x");
  const ParameterVector bias(bias_in, columns, "bias");
  Tensor grad_x = empty({rows, columns}, x.scalar_type()), grad_bias = empty({columns}, ScalarType::Float);
  ParameterSums sums(rows, 1, columns);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> xs = matrix<T>(x), grads = matrix<T>(grad);
    T* written = data<T>(grad_x);
    parallel(sums.parts(), 2 * gelu_cost(rows, columns), [&](int64_t unit) {
      float* bias_sum = sums.start(unit);
      for (int64_t row = unit * kNormRows; row < std::min((unit + 1) * kNormRows, rows); ++row) {
        const T *input = xs.row(row), *from = grads.row(row);
        for_vectors(columns, [&](int64_t k, int64_t n) {
          const Vec sum = load_some(input + k, n) + load_some(bias + k, n);
          const Vec g = load_some(from + k, n) * gelu_and_slope(sum).slope;
          store(bias_sum + k, load(bias_sum + k) + g);
          store_some(written + row * columns + k, g, n);
        });
      }
    });
  });
  sums.finish(0, data<float>(grad_bias));
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

}  // namespace triton_st
