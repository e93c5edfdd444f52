// Word, position and token-type rows gathered, summed, normalised and dropped out in one pass: see layer_norm.h. The
// tables' gradients are sums over the tokens of a row, listed by a counting sort: every row is one thread's, its tokens
// are added in their order, and a table costs one pass of writing, whatever its size.
#include <optional>
#include <vector>

#include "layer_norm.h"
#include "sequences.h"

namespace triton_st {
namespace {

thread_local RowDropout thread_dropout;
thread_local Buffer row_memory;

// [rows, d] of fp32, or nothing.
class Table {
 public:
  Table(const std::optional<Tensor>& x, int64_t d, const char* name) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(1) == d, name,
                    " must be float32 with rows as long as word's");
    tensor_ = dense_rows(*x);
    rows_ = matrix<float>(*tensor_);
  }
  explicit operator bool() const { return tensor_.has_value(); }
  int64_t count() const { return rows_.rows; }
  const float* row(int64_t i) const { return rows_.row(i); }

 private:
  std::optional<Tensor> tensor_;
  Matrix<const float> rows_{};
};

// Row numbers of a table, one for each token.
using Rows = std::vector<int32_t>;

Rows rows_of(const std::optional<Tensor>& ids, int64_t tokens, int64_t table_rows, const char* name) {
  Rows rows(tokens);
  STD_TORCH_CHECK(tokens == 0 || table_rows > 0, name, " has no row");
  if (!ids) return rows;  // all 0
  STD_TORCH_CHECK(ids->dim() == 1 && ids->size(0) == tokens, name, " must have one number for each token");
  STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long || ids->scalar_type() == ScalarType::Int, name,
                  " must be int64 or int32");
  const int64_t stride = ids->stride(0);
  int64_t low = 0, high = -1;
  auto copy = [&](const auto* from) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t id = from[t * stride];
      low = std::min(low, id);
      high = std::max(high, id);
      rows[t] = static_cast<int32_t>(id);
    }
  };
  if (ids->scalar_type() == ScalarType::Long) {
    copy(static_cast<const int64_t*>(ids->const_data_ptr()));
  } else {
    copy(static_cast<const int32_t*>(ids->const_data_ptr()));
  }
  STD_TORCH_CHECK(low >= 0 && high < table_rows, name, " must lie within their table");
  return rows;
}

Rows positions_of(const Sequences& sequences, int64_t offset, int64_t table_rows) {
  STD_TORCH_CHECK(offset >= 0 && (sequences.longest() == 0 || sequences.longest() + offset <= table_rows),
                  "position has too few rows");
  Rows rows(sequences.tokens());
  for (int64_t s = 0; s < sequences.count(); ++s) {
    for (int64_t i = 0; i < sequences.length(s); ++i) {
      rows[sequences.start(s) + i] = static_cast<int32_t>(i + offset);
    }
  }
  return rows;
}

// The tables and the rows of them that tokens take.
struct Embeddings {
  Embeddings(const Tensor& word_in, const Tensor& position_in, const std::optional<Tensor>& token_type_in,
             const Tensor& input_ids, const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids,
             int64_t position_offset)
      : tokens(input_ids.size(0)),
        d(word_in.size(1)),
        word(word_in, d, "word"),
        position(position_in, d, "position"),
        token_type(token_type_in, d, "token_type"),
        words(rows_of(input_ids, tokens, word.count(), "input_ids")),
        positions(positions_of(Sequences(cu_seqlens, tokens), position_offset, position.count())) {
    STD_TORCH_CHECK(d > 0, "word must have columns");
    if (token_type) types = rows_of(token_type_ids, tokens, token_type.count(), "token_type_ids");
  }

  // total = the sum of token t's rows, filled up with zeros.
  void sum(int64_t t, float* total) const {
    const float *a = word.row(words[t]), *b = position.row(positions[t]);
    const float* c = token_type ? token_type.row(types[t]) : nullptr;
    for_vectors(d, [&](int64_t k, int64_t n) {
      Vec x = load_some(a + k, n) + load_some(b + k, n);
      if (c) x += load_some(c + k, n);
      store(total + k, x);
    });
  }

  int64_t tokens, d;
  Table word, position, token_type;
  Rows words, positions, types;
};

// out [count, d]: row i is the sum of the rows of `from`, `width` floats each, whose number in `rows` is i.
void sum_by_row(const Rows& rows, int64_t count, const float* from, int64_t width, int64_t d, float* out) {
  std::vector<int32_t> begin(count + 2), tokens(rows.size());
  for (const int32_t row : rows) ++begin[row + 2];
  for (int64_t i = 0; i < count; ++i) begin[i + 2] += begin[i + 1];
  for (size_t t = 0; t < rows.size(); ++t) tokens[begin[rows[t] + 1]++] = static_cast<int32_t>(t);
  constexpr int64_t kRows = 64, kVectors = 4, kColumns = kVectors * kWidth, kTogether = 64;
  const int64_t row_units = ceil_div(count, kRows), column_units = ceil_div(d, kColumns);
  const int64_t cost = (static_cast<int64_t>(rows.size()) + count) * d / 8;
  parallel(row_units * column_units, cost, [&](int64_t unit) {
    const int64_t first = unit / column_units * kRows, last = std::min(first + kRows, count);
    const int64_t column = unit % column_units * kColumns;
    if (begin[first] == begin[last]) {  // most of a vocabulary, for a few texts
      if (column == 0) std::fill(out + first * d, out + last * d, 0.f);
      return;
    }
    const int64_t vectors = std::min(kVectors, ceil_div(d - column, kWidth));
    for (int64_t i = first; i < last; ++i) {
      Vec total[kVectors] = {};
      for (int64_t t = begin[i]; t < begin[i + 1];) {
        Vec some[kVectors] = {};  // a sum of few at a time keeps more digits
        for (const int64_t end = std::min<int64_t>(t + kTogether, begin[i + 1]); t < end; ++t) {
          const float* row = from + tokens[t] * width + column;
          for (int64_t v = 0; v < vectors; ++v) some[v] += load(row + v * kWidth);
        }
        for (int64_t v = 0; v < vectors; ++v) total[v] += some[v];
      }
      for (int64_t v = 0; v < vectors; ++v) {
        store_some(out + i * d + column + v * kWidth, total[v], d - column - v * kWidth);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> embedding_layer_norm_forward(
    const Tensor& word, const Tensor& position, const std::optional<Tensor>& token_type, const Tensor& weight_in,
    const Tensor& bias_in, const Tensor& input_ids, const Tensor& cu_seqlens,
    const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& seed, int64_t position_offset, double eps,
    double dropout_p, int64_t stream, ScalarType dtype) {
  const Embeddings embeddings(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset);
  const int64_t tokens = embeddings.tokens, d = embeddings.d;
  const ParameterVector weight(weight_in, d, "weight"), bias(bias_in, d, "bias");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  Tensor out = empty({tokens, d}, dtype);
  Tensor mean = empty({tokens}, ScalarType::Float), rstd = empty({tokens}, ScalarType::Float);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* results = data<T>(out);
    float *means = data<float>(mean), *rstds = data<float>(rstd);
    parallel(ceil_div(tokens, kNormRows), norm_cost(tokens, d), [&](int64_t unit) {
      const int64_t first = unit * kNormRows, count = std::min(kNormRows, tokens - first);
      float* total = row_memory.reserve(round_up(d, kWidth));
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, first, count, d);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t t = first + r;
        embeddings.sum(t, total);
        const RowStatistics statistics = row_statistics(total, d, static_cast<float>(eps));
        for_normalised(total, statistics, weight, bias, d, [&](int64_t k, int64_t n, Vec y) {
          store_some(results + t * d + k, saturated<T>(row_dropout(y, r, k)), n);
        });
        means[t] = statistics.mean;
        rstds[t] = statistics.rstd;
      }
    });
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_layer_norm_backward(
    const Tensor& grad_in, const Tensor& word, const Tensor& position, const std::optional<Tensor>& token_type,
    const Tensor& weight_in, const Tensor& mean_in, const Tensor& rstd_in, const Tensor& input_ids,
    const Tensor& cu_seqlens, const std::optional<Tensor>& token_type_ids, const std::optional<Tensor>& seed,
    int64_t position_offset, double dropout_p, int64_t stream) {
  const Embeddings embeddings(word, position, token_type, input_ids, cu_seqlens, token_type_ids, position_offset);
  const Tensor grad = dense_rows(grad_in);
  const int64_t tokens = embeddings.tokens, d = embeddings.d, width = round_up(d, kWidth);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == tokens && grad.size(1) == d, "grad must be [T, D]");
  const ParameterVector weight(weight_in, d, "weight");
  const ParameterVector mean(mean_in, tokens, "mean"), rstd(rstd_in, tokens, "rstd");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  Tensor grad_word = empty({embeddings.word.count(), d}, ScalarType::Float);
  Tensor grad_position = empty({embeddings.position.count(), d}, ScalarType::Float);
  Tensor grad_token_type = empty({embeddings.token_type.count(), d}, ScalarType::Float);
  Tensor grad_weight = empty({d}, ScalarType::Float), grad_bias = empty({d}, ScalarType::Float);
  ParameterSums sums(tokens, 2, d);
  Buffer grad_totals(tokens * width + 1);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> grads = matrix<T>(grad);
    parallel(sums.parts(), 2 * norm_cost(tokens, d), [&](int64_t unit) {
      const int64_t first = unit * kNormRows, count = std::min(kNormRows, tokens - first);
      RowSums row_sums(sums.start(unit), sums.floats());
      float *weight_sum = row_sums.get(), *bias_sum = weight_sum + sums.width();
      float* kept = row_memory.reserve(width);
      RowDropout& row_dropout = thread_dropout;  // looked up once, not for every vector
      row_dropout.draw(dropout, first, count, d);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t t = first + r;
        float* total = grad_totals.get() + t * width;
        for_vectors(d, [&](int64_t k, int64_t n) { store(kept + k, row_dropout(load_some(grads.row(t) + k, n), r, k)); });
        embeddings.sum(t, total);
        to_unit_row(total, {mean[t], rstd[t]}, d);
        layer_norm_backward_row(kept, total, rstd[t], weight, d, weight_sum, bias_sum);
        row_sums.row_added();
      }
    });
  });
  sums.finish(0, data<float>(grad_weight));
  sums.finish(1, data<float>(grad_bias));
  auto by_row = [&](const Rows& rows, const Tensor& out) {
    sum_by_row(rows, out.size(0), grad_totals.get(), width, d, data<float>(out));
  };
  by_row(embeddings.words, grad_word);
  by_row(embeddings.positions, grad_position);
  by_row(embeddings.types, grad_token_type);
  return {grad_word, grad_position, grad_token_type, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "embedding_layer_norm_forward(Tensor word, Tensor position, Tensor? token_type, Tensor weight, Tensor bias,"
      " Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor? seed, int position_offset, float eps,"
      " float dropout_p, int stream, ScalarType dtype) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "embedding_layer_norm_backward(Tensor grad, Tensor word, Tensor position, Tensor? token_type, Tensor weight,"
      " Tensor mean, Tensor rstd, Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor? seed,"
      " int position_offset, float dropout_p, int stream) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("embedding_layer_norm_forward", TORCH_BOX(&embedding_layer_norm_forward));
  m.impl("embedding_layer_norm_backward", TORCH_BOX(&embedding_layer_norm_backward));
}

}  // namespace triton_st
