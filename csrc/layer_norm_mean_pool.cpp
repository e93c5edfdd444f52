// Dropout, residual sum, LayerNorm, mean over each sequence and, if wanted, unit length, in one pass over rows: see
// layer_norm.h. Sums run over pieces of at most kNormRows tokens, which are added in their order.
#include <optional>
#include <vector>

#include "layer_norm.h"
#include "normalize.h"
#include "sequences.h"

namespace triton_st {
namespace {

thread_local RowDropout thread_dropout;
thread_local Buffer row_memory;

// Tokens [begin, end) of one sequence.
struct Piece {
  int64_t begin, end;
};

// out = sum / count, of unit length if `normalize`; the mean itself to `pooled`.
template <class T>
void write_embedding(const float* sum, int64_t count, bool normalize, int64_t d, float* pooled, T* out) {
  const Vec divisor = splat(static_cast<float>(std::max<int64_t>(count, 1)));
  for_vectors(d, [&](int64_t k, int64_t n) { store_some(pooled + k, load(sum + k) / divisor, n); });
  const RowScale scale = normalize ? row_scale(pooled, d) : RowScale{1.f, 1.f, 1.f};
  for_vectors(d, [&](int64_t k, int64_t n) {
    store_some(out + k, saturated<T>(load_some(pooled + k, n) * scale.power / scale.divisor), n);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mean_pool_forward(
    const Tensor& x_in, const Tensor& residual_in, const Tensor& weight_in, const Tensor& bias_in,
    const Tensor& cu_seqlens, const std::optional<Tensor>& x_bias_in, const std::optional<Tensor>& seed, double eps,
    double dropout_p, int64_t stream, bool normalize) {
  const Tensor x = dense_rows(x_in), residual = dense_rows(residual_in);
  const int64_t rows = x.size(0), d = x.size(1), width = round_up(d, kWidth);
  const ParameterVector weight(weight_in, d, "weight"), bias(bias_in, d, "bias"), x_bias(x_bias_in, d, "x_bias");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  const Sequences sequences(cu_seqlens, rows);
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece(sequences.count() + 1);
  for (int64_t s = 0; s < sequences.count(); ++s) {
    const int64_t end = sequences.start(s) + sequences.length(s);
    for (int64_t t = sequences.start(s); t < end; t += kNormRows) pieces.push_back({t, std::min(t + kNormRows, end)});
    first_piece[s + 1] = static_cast<int64_t>(pieces.size());
  }
  Tensor out = empty({sequences.count(), d}, residual.scalar_type());
  Tensor pooled = empty({sequences.count(), d}, ScalarType::Float);
  Tensor mean = empty({rows}, ScalarType::Float), rstd = empty({rows}, ScalarType::Float);
  Buffer piece_sums(static_cast<int64_t>(pieces.size()) * width + 1);
  dispatch_sum(x, residual, [&](auto x_zero, auto r_zero) {
    using X = decltype(x_zero);
    using R = decltype(r_zero);
    const Matrix<const X> xs = matrix<X>(x);
    const Matrix<const R> residuals = matrix<R>(residual);
    float *means = data<float>(mean), *rstds = data<float>(rstd);
    parallel(static_cast<int64_t>(pieces.size()), norm_cost(rows, d), [&](int64_t unit) {
      const Piece piece = pieces[unit];
      float *total = row_memory.reserve(width), *sums = piece_sums.get() + unit * width;
      std::fill_n(sums, width, 0.f);
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, piece.begin, piece.end - piece.begin, d);
      for (int64_t row = piece.begin; row < piece.end; ++row) {
        residual_sum(xs.row(row), x_bias, residuals.row(row), row_dropout, row - piece.begin, d, total);
        const RowStatistics statistics = row_statistics(total, d, static_cast<float>(eps));
        for_normalised(total, statistics, weight, bias, d,
                       [&](int64_t k, int64_t, Vec y) { store(sums + k, load(sums + k) + y); });
        means[row] = statistics.mean;
        rstds[row] = statistics.rstd;
      }
    });
    R* results = data<R>(out);
    float* averages = data<float>(pooled);
    parallel(sequences.count(), sequences.count() * d / 4, [&](int64_t s) {
      float* sum = row_memory.reserve(width);
      std::fill_n(sum, width, 0.f);
      for (int64_t piece = first_piece[s]; piece < first_piece[s + 1]; ++piece) {
        const float* part = piece_sums.get() + piece * width;
        for (int64_t k = 0; k < width; k += kWidth) store(sum + k, load(sum + k) + load(part + k));
      }
      write_embedding(sum, sequences.length(s), normalize, d, averages + s * d, results + s * d);
    });
  });
  return {out, pooled, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_mean_pool_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& residual_in, const Tensor& weight_in,
    const Tensor& pooled_in, const Tensor& mean_in, const Tensor& rstd_in, const Tensor& cu_seqlens,
    const std::optional<Tensor>& x_bias_in, const std::optional<Tensor>& seed, double dropout_p, int64_t stream,
    bool normalize) {
  const Tensor grad = dense_rows(grad_in), x = dense_rows(x_in), residual = dense_rows(residual_in);
  const Tensor pooled = torch::stable::contiguous(pooled_in);
  const int64_t rows = x.size(0), d = x.size(1), width = round_up(d, kWidth);
  const ParameterVector weight(weight_in, d, "weight"), x_bias(x_bias_in, d, "x_bias");
  const ParameterVector mean(mean_in, rows, "mean"), rstd(rstd_in, rows, "rstd");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  const Sequences sequences(cu_seqlens, rows);
  STD_TORCH_CHECK(grad.scalar_type() == residual.scalar_type() && grad.dim() == 2 &&
                      grad.size(0) == sequences.count() && grad.size(1) == d,
                  "grad does not fit residual and cu_seqlens");
  STD_TORCH_CHECK(pooled.scalar_type() == ScalarType::Float && pooled.numel() == grad.numel(), "pooled must be as grad");
  Tensor grad_x = empty({rows, d}, x.scalar_type()), grad_residual = empty({rows, d}, residual.scalar_type());
  Tensor grad_weight = empty({d}, ScalarType::Float), grad_bias = empty({d}, ScalarType::Float);
  Tensor grad_x_bias = empty({x_bias ? d : 0}, ScalarType::Float);
  ParameterSums sums(rows, 2, d);
  ParameterSums bias_sums(sequences.count(), 1, d);  // from the embeddings: as many equal shares would lose digits
  Buffer shares(sequences.count() * width + 1);  // the gradient of each token's row, by sequence
  dispatch_sum(x, residual, [&](auto x_zero, auto r_zero) {
    using X = decltype(x_zero);
    using R = decltype(r_zero);
    const Matrix<const R> grads = matrix<R>(grad), residuals = matrix<R>(residual);
    const Matrix<const X> xs = matrix<X>(x);
    const float* averages = static_cast<const float*>(pooled.const_data_ptr());
    parallel(bias_sums.parts(), sequences.count() * d / 2, [&](int64_t unit) {
      RowSums row_sums(bias_sums.start(unit), bias_sums.floats());
      float* bias_sum = row_sums.get();
      for (int64_t s = unit * kNormRows; s < std::min((unit + 1) * kNormRows, sequences.count()); ++s) {
        float* share = shares.get() + s * width;
        for_vectors(d, [&](int64_t k, int64_t n) { store(share + k, load_some(grads.row(s) + k, n)); });
        if (normalize) project(share, averages + s * d, row_scale(averages + s * d, d), 1.f, share, d);
        if (sequences.length(s) == 0) continue;
        const Vec length = splat(static_cast<float>(sequences.length(s)));
        for_vectors(d, [&](int64_t k, int64_t n) {
          const Vec g = first_lanes_of(load(share + k), n);
          store(bias_sum + k, load(bias_sum + k) + g);
          store(share + k, g / length);
        });
        row_sums.row_added();
      }
    });
    X* grad_xs = data<X>(grad_x);
    R* grad_residuals = data<R>(grad_residual);
    parallel(sums.parts(), 2 * norm_cost(rows, d), [&](int64_t unit) {
      const int64_t first = unit * kNormRows, count = std::min(kNormRows, rows - first);
      float* total = row_memory.reserve(width);
      RowSums row_sums(sums.start(unit), sums.floats());
      float *weight_sum = row_sums.get(), *x_bias_sum = x_bias ? weight_sum + sums.width() : nullptr;
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, first, count, d);
      int64_t s = sequences.first_from(first + 1) - 1;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r;
        while (sequences.start(s + 1) <= row) ++s;
        residual_sum(xs.row(row), x_bias, residuals.row(row), row_dropout, r, d, total);
        to_unit_row(total, {mean[row], rstd[row]}, d);
        layer_norm_backward_row(shares.get() + s * width, total, rstd[row], weight, d, weight_sum, nullptr);
        write_gradients(total, row_dropout, r, d, grad_xs + row * d, grad_residuals + row * d, x_bias_sum);
        row_sums.row_added();
      }
    });
  });
  sums.finish(0, data<float>(grad_weight));
  bias_sums.finish(0, data<float>(grad_bias));
  if (x_bias) sums.finish(1, data<float>(grad_x_bias));
  return {grad_x, grad_residual, grad_weight, grad_bias, grad_x_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "layer_norm_mean_pool_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor cu_seqlens,"
      " Tensor? x_bias, Tensor? seed, float eps, float dropout_p, int stream, bool normalize)"
      " -> (Tensor out, Tensor pooled, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_mean_pool_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor pooled, Tensor mean,"
      " Tensor rstd, Tensor cu_seqlens, Tensor? x_bias, Tensor? seed, float dropout_p, int stream, bool normalize)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("layer_norm_mean_pool_forward", TORCH_BOX(&layer_norm_mean_pool_forward));
  m.impl("layer_norm_mean_pool_backward", TORCH_BOX(&layer_norm_mean_pool_backward));
}

}  // namespace triton_st
