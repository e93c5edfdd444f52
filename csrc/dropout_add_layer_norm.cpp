// Bias, dropout, residual sum and LayerNorm in one pass over rows: see layer_norm.h for the arithmetic.
#include <optional>

#include "layer_norm.h"

namespace triton_st {
namespace {

thread_local RowDropout thread_dropout;
thread_local Buffer row_memory;

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_forward(
    const Tensor& x_in, const Tensor& residual_in, const Tensor& weight_in, const Tensor& bias_in,
    const std::optional<Tensor>& x_bias_in, const std::optional<Tensor>& seed, double eps, double dropout_p,
    int64_t stream) {
  const Tensor x = dense_rows(x_in), residual = dense_rows(residual_in);
  const int64_t rows = x.size(0), d = x.size(1);
  const ParameterVector weight(weight_in, d, "weight"), bias(bias_in, d, "bias"), x_bias(x_bias_in, d, "x_bias");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  Tensor out = empty({rows, d}, residual.scalar_type());
  Tensor mean = empty({rows}, ScalarType::Float), rstd = empty({rows}, ScalarType::Float);
  dispatch_sum(x, residual, [&](auto x_zero, auto r_zero) {
    using X = decltype(x_zero);
    using R = decltype(r_zero);
    const Matrix<const X> xs = matrix<X>(x);
    const Matrix<const R> residuals = matrix<R>(residual);
    R* results = data<R>(out);
    float *means = data<float>(mean), *rstds = data<float>(rstd);
    parallel(ceil_div(rows, kNormRows), norm_cost(rows, d), [&](int64_t unit) {
      const int64_t first = unit * kNormRows, count = std::min(kNormRows, rows - first);
      float* total = row_memory.reserve(round_up(d, kWidth));
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, first, count, d);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        residual_sum(xs.row(row), x_bias, residuals.row(row), row_dropout, r, d, total);
        const RowStatistics statistics = row_statistics(total, d, static_cast<float>(eps));
        write_normalised(total, statistics, weight, bias, d, results + row * d);
        means[row] = statistics.mean;
        rstds[row] = statistics.rstd;
      }
    });
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& residual_in, const Tensor& weight_in,
    const Tensor& mean_in, const Tensor& rstd_in, const std::optional<Tensor>& x_bias_in,
    const std::optional<Tensor>& seed, double dropout_p, int64_t stream) {
  const Tensor grad = dense_rows(grad_in), x = dense_rows(x_in), residual = dense_rows(residual_in);
  const int64_t rows = x.size(0), d = x.size(1);
  const ParameterVector weight(weight_in, d, "weight"), x_bias(x_bias_in, d, "x_bias");
  const ParameterVector mean(mean_in, rows, "mean"), rstd(rstd_in, rows, "rstd");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  STD_TORCH_CHECK(grad.scalar_type() == residual.scalar_type() && grad.dim() == 2 && grad.size(0) == rows &&
                      grad.size(1) == d,
                  "grad must be as residual");
  Tensor grad_x = empty({rows, d}, x.scalar_type()), grad_residual = empty({rows, d}, residual.scalar_type());
  Tensor grad_weight = empty({d}, ScalarType::Float), grad_bias = empty({d}, ScalarType::Float);
  Tensor grad_x_bias = empty({x_bias ? d : 0}, ScalarType::Float);
  ParameterSums sums(rows, 3, d);
  dispatch_sum(x, residual, [&](auto x_zero, auto r_zero) {
    using X = decltype(x_zero);
    using R = decltype(r_zero);
    const Matrix<const X> xs = matrix<X>(x);
    const Matrix<const R> residuals = matrix<R>(residual), grads = matrix<R>(grad);
    X* grad_xs = data<X>(grad_x);
    R* grad_residuals = data<R>(grad_residual);
    parallel(sums.parts(), 2 * norm_cost(rows, d), [&](int64_t unit) {
      const int64_t first = unit * kNormRows, count = std::min(kNormRows, rows - first);
      float* total = row_memory.reserve(round_up(d, kWidth));
      RowSums row_sums(sums.start(unit), sums.floats());
      float *weight_sum = row_sums.get(), *bias_sum = weight_sum + sums.width();
      float* x_bias_sum = x_bias ? bias_sum + sums.width() : nullptr;
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, first, count, d);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        residual_sum(xs.row(row), x_bias, residuals.row(row), row_dropout, r, d, total);
        to_unit_row(total, {mean[row], rstd[row]}, d);
        layer_norm_backward_row(grads.row(row), total, rstd[row], weight, d, weight_sum, bias_sum);
        write_gradients(total, row_dropout, r, d, grad_xs + row * d, grad_residuals + row * d, x_bias_sum);
        row_sums.row_added();
      }
    });
  });
  sums.finish(0, data<float>(grad_weight));
  sums.finish(1, data<float>(grad_bias));
  if (x_bias) sums.finish(2, data<float>(grad_x_bias));
  return {grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "dropout_add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias,"
      " Tensor? seed, float eps, float dropout_p, int stream) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "dropout_add_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean,"
      " Tensor rstd, Tensor? x_bias, Tensor? seed, float dropout_p, int stream)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("dropout_add_layer_norm_forward", TORCH_BOX(&dropout_add_layer_norm_forward));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&dropout_add_layer_norm_backward));
}

}  // namespace triton_st
