// Multiple negatives ranking loss: cross-entropy of scale · cosine over in-batch documents, streamed. Scores exist a
// block at a time; the backward pass forms the gradient of a tile of them and multiplies it from both sides before the
// next.
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "normalize.h"
#include "tensor.h"

namespace triton_st {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Ints lane_numbers() {
  Ints numbers;
  for (int i = 0; i < kWidth; ++i) numbers[i] = i;
  return numbers;
}

// --- forward ---

constexpr int64_t kForwardRows = 4096;  // queries whose partial sums are held at a time

// Σ exp(logit − most) over one block of documents, for one query.
struct PartialSum {
  float most, sum;
};

// The partial sum of n logits, products[j] · factor · columns[j], which replace the products.
PartialSum sum_of_exponentials(float* products, float factor, const float* columns, int64_t n) {
  const Vec factors = splat(factor);
  Vec most = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kWidth) {
    Vec logits = load(products + j) * factors * load(columns + j);
    if (n - j < kWidth) logits = lane_numbers() < static_cast<int32_t>(n - j) ? logits : splat(-kInfinity);
    store(products + j, logits);
    most = maximum(logits, most);  // in this order a NaN does not stay; it comes out of the sum
  }
  const float largest_logit = largest(most);
  Vec total{};
  for (int64_t j = 0; j < n; j += kWidth) total += exp(load(products + j) - largest_logit);
  return {largest_logit, sum(total)};
}

std::tuple<Tensor, Tensor> mnrl_loss_forward(const Tensor& queries, const Tensor& documents, double scale_in) {
  const Tensor queries_dense = dense_rows(queries), documents_dense = dense_rows(documents);
  const int64_t count = queries.size(0), document_count = documents.size(0);
  STD_TORCH_CHECK(queries.size(1) == documents.size(1) && queries.scalar_type() == documents.scalar_type() &&
                      count > 0 && document_count >= count,
                  "queries and documents do not fit");
  Tensor loss = empty({}, ScalarType::Float), logsumexp = empty({count}, ScalarType::Float);
  const float scale = static_cast<float>(scale_in);
  dispatch(queries.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> q = matrix<T>(queries_dense), d = matrix<T>(documents_dense);
    const RowScales q_scales(q), d_scales(d);
    float* row_logsumexp = data<float>(logsumexp);
    double total = 0;
    std::vector<PartialSum> partials;
    std::vector<float> positive, row_loss;
    for (int64_t first = 0; first < count; first += kForwardRows) {
      const int64_t rows = std::min(kForwardRows, count - first);
      const ScoreBlocks blocks(rows, document_count);
      partials.resize(rows * blocks.column_blocks);
      positive.resize(rows);
      row_loss.resize(rows);
      const Matrix<const T> some{q.row(first), rows, q.cols, q.stride};
      const RowScales::Part some_scales = q_scales.from(first);
      blocks.for_each(some, some_scales, d, d_scales.from(0), [&](int64_t i, int64_t j, int64_t n, float* products) {
        partials[i * blocks.column_blocks + j / blocks.columns] =
            sum_of_exponentials(products, scale * some_scales.inverse()[i], d_scales.inverse() + j, n);
        if (first + i >= j && first + i < j + n) positive[i] = products[first + i - j];
      });
      parallel(rows, rows * blocks.column_blocks * 4, [&](int64_t i) {
        const PartialSum* part = partials.data() + i * blocks.column_blocks;
        float most = -kInfinity, sum = 0;
        for (int64_t c = 0; c < blocks.column_blocks; ++c) most = std::max(most, part[c].most);
        for (int64_t c = 0; c < blocks.column_blocks; ++c) sum += part[c].sum * std::exp(part[c].most - most);
        const float logarithm = std::log(sum);
        row_logsumexp[first + i] = most + logarithm;
        // Not logsumexp − positive: where the positive is the largest, the loss is the logarithm, to its last bit.
        row_loss[i] = (most - positive[i]) + logarithm;
      });
      for (int64_t i = 0; i < rows; ++i) total += row_loss[i];
    }
    *data<float>(loss) = static_cast<float>(total / static_cast<double>(count));
  });
  return {loss, logsumexp};
}

// --- backward ---
//
// With p = softmax, the gradient of a query's unit row is Σ over j of (p_j − [j is the positive]) · d̂_j, times
// grad_loss · scale / B. Since p sums to 1, the positive's own coefficient is −Σ over the other j of p_j. It is added
// up from those and applied apart: 1 − p would lose all digits once the loss is small. The others' coefficients, times
// both inverse norms so that the inputs can be multiplied as they are, form a tile that is multiplied from both sides.

constexpr int64_t kTileColumns = 8192;
constexpr int64_t kTileElements = 4 << 20;  // 16 MiB of fp32

// coefficients[c] = p_c · row · columns[c] for c < n, 0 at `positive`; returns the sum of p_c without that one.
template <class G>
float write_coefficients(G* coefficients, const float* products, float scale, float row, const float* columns,
                         float logsumexp, int64_t positive, int64_t n) {
  const Vec logit_factor = splat(scale * row), row_factor = splat(row), offset = splat(logsumexp);
  const Ints numbers = lane_numbers();
  Vec total{};
  for (int64_t j = 0; j < n; j += kWidth) {
    const Vec column = load(columns + j);
    Vec p = exp(load(products + j) * logit_factor * column - offset);
    p = numbers == static_cast<int32_t>(positive - j) ? Vec{} : p;
    if (n - j < kWidth) p = numbers < static_cast<int32_t>(n - j) ? p : Vec{};
    total += p;
    store(coefficients + j, p * row_factor * column);  // the tile's rows are padded to whole vectors
  }
  return sum(total);
}

// gradient = gradient · own.divisor − weight · the unit row of `other`
template <class T>
void add_positive(float* gradient, RowScale own, float weight, const T* other, RowScale scale, int64_t n) {
  const Vec divisor = splat(own.divisor), weights = splat(weight * scale.power / scale.divisor);
  for (int64_t k = 0; k < n; k += kWidth) {
    store(gradient + k, load(gradient + k) * divisor - load_some(other + k, n - k) * weights);
  }
}

template <class T>
class Backward {
 public:
  Backward(Matrix<const T> q, Matrix<const T> d, const float* logsumexp, float scale, float gain)
      : q_(q), d_(d), q_scales_(q), d_scales_(d), logsumexp_(logsumexp), scale_(scale), gain_(gain),
        width_(round_up(q.cols, kPanel)),
        columns_(std::min(d.rows, kTileColumns)),
        rows_(std::min(q.rows, round_up(ceil_div(kTileElements, columns_), kBlockRows))),
        stride_(round_up(columns_, 2 * kWidth) + 2 * kWidth),
        tile_(rows_ * stride_ * sizeof(Coefficient) / sizeof(float)),
        q_sums_(rows_ * width_),
        d_sums_(d.rows * width_),
        others_(q.rows) {}

  void run(T* grad_q, T* grad_d) {
    for (int64_t i = 0; i < q_.rows; i += rows_) {
      const int64_t m = std::min(rows_, q_.rows - i);
      for (int64_t j = 0; j < d_.rows; j += columns_) {
        const int64_t n = std::min(columns_, d_.rows - j);
        fill_tile(i, m, j, n);
        multiply_tile(i, m, j, n);
      }
      parallel(m, m * width_ / 4, [&](int64_t r) {
        finish(q_sums_.get() + r * width_, q_, q_scales_, d_, d_scales_, i + r, grad_q);
      });
    }
    parallel(d_.rows, d_.rows * width_ / 4, [&](int64_t j) {
      finish(d_sums_.get() + j * width_, d_, d_scales_, q_, q_scales_, j, grad_d);
    });
  }

 private:
  static constexpr bool kPaired = kPairs<T>;
  using Coefficient = std::conditional_t<kPaired, BFloat16, float>;

  Coefficient* tile_row(int64_t r) const { return reinterpret_cast<Coefficient*>(tile_.get()) + r * stride_; }
  static Matrix<const T> part(Matrix<const T> x, int64_t first, int64_t n) {
    return {x.row(first), n, x.cols, x.stride};
  }

  // The coefficients of queries [i, i + m) and documents [j, j + n).
  void fill_tile(int64_t i, int64_t m, int64_t j, int64_t n) {
    const ScoreBlocks blocks(m, n);
    partial_.resize(m * blocks.column_blocks);
    const RowScales::Part q_scales = q_scales_.from(i), d_scales = d_scales_.from(j);
    blocks.for_each(part(q_, i, m), q_scales, part(d_, j, n), d_scales,
                    [&](int64_t r, int64_t c, int64_t count, float* products) {
                      partial_[r * blocks.column_blocks + c / blocks.columns] = write_coefficients(
                          tile_row(r) + c, products, scale_, q_scales.inverse()[r], d_scales.inverse() + c,
                          logsumexp_[i + r], i + r - (j + c), count);
                    });
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t c = 0; c < blocks.column_blocks; ++c) others_[i + r] += partial_[r * blocks.column_blocks + c];
    }
  }

  // Adds tile · documents to the queries' sums and tileᵀ · queries to the documents'.
  void multiply_tile(int64_t i, int64_t m, int64_t j, int64_t n) {
    const int64_t q_units = ceil_div(m, kBlockRows), d_units = ceil_div(n, kBlockRows);
    parallel(q_units + d_units, 2 * product_cost(m, n, q_.cols), [&](int64_t unit) {
      if (unit < q_units) {
        const int64_t r = m * unit / q_units, rows = m * (unit + 1) / q_units - r;
        accumulate<T, false>(rows, part(d_, j, n), d_scales_.power() + j, q_sums_.get() + r * width_, width_, j > 0,
                             [&](int64_t k, int64_t depth, float* out, int64_t stride) {
                               pack_rows<kPaired, Coefficient>({tile_row(r) + k, rows, depth, stride_}, nullptr,
                                                               nullptr, out, stride);
                             });
      } else {
        const int64_t c = n * (unit - q_units) / d_units, rows = n * (unit - q_units + 1) / d_units - c;
        accumulate<T, true>(rows, part(q_, i, m), q_scales_.power() + i, d_sums_.get() + (j + c) * width_, width_,
                            i > 0, [&](int64_t k, int64_t depth, float* out, int64_t stride) {
                              pack_depth<kPaired, Coefficient>({tile_row(k) + c, depth, rows, stride_}, nullptr, out,
                                                               kPanel, stride);
                            });
      }
    });
  }

  // Row i of the result from its sums. Documents beyond the queries are no query's positive.
  void finish(float* sums, Matrix<const T> x, const RowScales& scales, Matrix<const T> other,
              const RowScales& other_scales, int64_t i, T* grad) const {
    const bool positive = i < q_.rows;
    const int64_t partner = positive ? i : 0;
    add_positive(sums, scales[i], positive ? others_[i] : 0.f, other.row(partner), other_scales[partner], x.cols);
    project(sums, x.row(i), scales[i], gain_, grad + i * x.cols, x.cols);
  }

  const Matrix<const T> q_, d_;
  const RowScales q_scales_, d_scales_;
  const float* logsumexp_;
  const float scale_, gain_;
  const int64_t width_, columns_, rows_, stride_;
  const Buffer tile_, q_sums_, d_sums_;
  std::vector<float> others_;  // Σ of p over each query's other documents
  std::vector<float> partial_;
};

std::tuple<Tensor, Tensor> mnrl_loss_backward(const Tensor& grad_loss, const Tensor& queries, const Tensor& documents,
                                              const Tensor& logsumexp_in, double scale) {
  const Tensor queries_dense = dense_rows(queries), documents_dense = dense_rows(documents);
  const Tensor logsumexp = dense_rows(logsumexp_in);
  const int64_t count = queries.size(0), document_count = documents.size(0), dim = queries.size(1);
  STD_TORCH_CHECK(documents.size(1) == dim && documents.scalar_type() == queries.scalar_type() &&
                      document_count >= count && logsumexp.size(0) == count,
                  "queries, documents and logsumexp do not fit");
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && logsumexp.scalar_type() == ScalarType::Float,
                  "grad_loss and logsumexp must be float32");
  Tensor grad_q = empty({count, dim}, queries.scalar_type());
  Tensor grad_d = empty({document_count, dim}, queries.scalar_type());
  const double gain = *static_cast<const float*>(grad_loss.const_data_ptr()) * scale / static_cast<double>(count);
  dispatch(queries.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Backward<T>(matrix<T>(queries_dense), matrix<T>(documents_dense),
                static_cast<const float*>(logsumexp.const_data_ptr()), static_cast<float>(scale),
                static_cast<float>(gain))
        .run(data<T>(grad_q), data<T>(grad_d));
  });
  return {grad_q, grad_d};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def("mnrl_loss_forward(Tensor queries, Tensor documents, float scale) -> (Tensor loss, Tensor logsumexp)");
  m.def(
      "mnrl_loss_backward(Tensor grad_loss, Tensor queries, Tensor documents, Tensor logsumexp, float scale)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("mnrl_loss_forward", TORCH_BOX(&mnrl_loss_forward));
  m.impl("mnrl_loss_backward", TORCH_BOX(&mnrl_loss_backward));
}

}  // namespace triton_st
