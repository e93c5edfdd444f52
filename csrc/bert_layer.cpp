// A transformer layer, forward: each thread takes whole sequences through all of its steps while they are in its
// caches. Nothing but the result, and what the backward pass needs, is written to memory.
#include "bert_layer.h"

#include <cstring>
#include <optional>
#include <tuple>

#include "gelu.h"

namespace triton_st {
namespace {

// Memory of one thread.
struct Scratch {
  Buffer strip, sums, operand, hidden, inner, attended, qkv, logsumexp;
  RowDropout dropout;
};
thread_local Scratch scratch;

template <class T>
struct Forward {
  using C = Operand<T>;

  const LayerSizes& sizes;
  Matrix<const T> input;
  const Sequences& sequences;
  int64_t max_seqlen;
  float eps;
  const Parameters& parameters;
  const LayerDropout& dropout;
  const RelativeBias& bias;
  const PackedWeight<C>&qkv_weight, &projection_weight, &up_weight, &down_weight;
  Kept<T, float> kept;  // null pointers where nothing is kept
  T* output;

  void run(const Chunk& chunk) const {
    const int64_t count = chunk.tokens(), d = sizes.hidden;
    T* qkv = kept.qkv ? kept.qkv + chunk.begin * 3 * d : elements(scratch.qkv, count * 3 * d);
    T* attended = kept.attended ? kept.attended + chunk.begin * d : elements(scratch.attended, count * d);
    for_row_blocks(count, [&](int64_t row, int64_t rows) { project_in(chunk.begin + row, rows, qkv + row * 3 * d); });
    const WeightDropout weight_dropout(dropout.attention, max_seqlen);
    for (int64_t s = chunk.first; s < chunk.last; ++s) {
      const int64_t start = sequences.start(s), length = sequences.length(s), size = sizes.head_size();
      for (int64_t h = 0; h < sizes.heads && length > 0; ++h) {
        const int64_t row = h * sizes.tokens + start, offset = start - chunk.begin;
        const T* q = qkv + offset * 3 * d + h * size;
        attend<T>({q, q + d, q + 2 * d, 3 * d, length, size, bias.of(h)}, weight_dropout.from_row(row),
                  attended + offset * d + h * size, d,
                  kept.logsumexp ? kept.logsumexp + row : scratch.logsumexp.reserve(length));
      }
    }
    for_row_blocks(count, [&](int64_t row, int64_t rows) { finish(chunk.begin + row, rows, attended + row * d); });
  }

 private:
  static T* elements(Buffer& memory, int64_t count) {
    return reinterpret_cast<T*>(memory.reserve(ceil_div(count * static_cast<int64_t>(sizeof(T)), sizeof(float))));
  }

  // Queries, keys and values of tokens [token, token + rows).
  void project_in(int64_t token, int64_t rows, T* qkv) const {
    const int64_t n = 3 * sizes.hidden;
    const Matrix<const T> block{input.row(token), rows, input.cols, input.stride};
    multiply<C>(as_operand<C, T>(block, scratch.operand), qkv_weight, scratch.strip, [&](int64_t column, float* strip) {
      const int64_t m = n - column;
      const float* bias = parameters[kQkvBias] + column;
      const Vec low = load_some(bias, m), high = load_some(bias + kWidth, m - kWidth);
      T* to = qkv + column;
      for (int64_t r = 0; r < rows; ++r, strip += kPanel, to += n) {
        store_exactly(to, m, saturated<T>(load(strip) + low), saturated<T>(load(strip + kWidth) + high));
      }
    });
  }

  // All that follows attention, for tokens [token, token + rows).
  void finish(int64_t token, int64_t rows, const T* attended) const {
    const int64_t d = sizes.hidden, inner = sizes.inner;
    const Matrix<float> sums = new_operand<float>(scratch.sums, rows, d);
    auto to_sums = [&](int64_t column, float* strip) {
      for (int64_t r = 0; r < rows; ++r, strip += kPanel) {
        store_strip(sums.row(r) + column, d - column, load(strip), load(strip + kWidth));
      }
    };
    multiply<C>(as_operand<C, T>({attended, rows, d, d}, scratch.operand), projection_weight, scratch.strip, to_sums);
    scratch.dropout.draw(dropout.projection, token, rows, d);
    // The result is both an operand and, later, a residual.
    const Matrix<float> hidden = new_operand<float>(scratch.hidden, rows, d);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (token + r) * d;
      norm(r, sums.row(r), input.row(token + r), kProjectionBias, kept.norm1 ? kept.norm1 + at : nullptr,
           kept.rstd1 ? kept.rstd1 + token + r : nullptr, hidden.row(r));
    }
    const Matrix<const C> x = as_operand<C, float>({hidden.data, rows, d, hidden.stride}, scratch.operand);
    const Matrix<C> activated = new_operand<C>(scratch.inner, rows, inner);
    multiply<C>(x, up_weight, scratch.strip, [&](int64_t column, float* strip) {
      const int64_t n = inner - column;
      const float* bias = parameters[kUpBias] + column;
      const Vec low_bias = load_some(bias, n), high_bias = load_some(bias + kWidth, n - kWidth);
      for (int64_t r = 0; r < rows; ++r, strip += kPanel) {
        const Vec low = saturated<T>(load(strip) + low_bias), high = saturated<T>(load(strip + kWidth) + high_bias);
        if (kept.pre) store_exactly(kept.pre + (token + r) * inner + column, n, low, high);
        store_strip(activated.row(r) + column, n, gelu(low), gelu(high));
      }
    });
    multiply<C>({activated.data, rows, inner, activated.stride}, down_weight, scratch.strip, to_sums);
    scratch.dropout.draw(dropout.feed_forward, token, rows, d);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (token + r) * d;
      norm(r, sums.row(r), hidden.row(r), kDownBias, kept.norm2 ? kept.norm2 + at : nullptr,
           kept.rstd2 ? kept.rstd2 + token + r : nullptr, output + at);
    }
  }

  // out = LayerNorm(dropout(sums + bias) + residual), row r of those at hand. `bias` is followed by LayerNorm's weight
  // and bias among the parameters.
  template <class R, class Out>
  void norm(int64_t r, float* sums, const R* residual, int bias, T* normalised, float* rstd, Out* out) const {
    const int64_t d = sizes.hidden;
    residual_sum(sums, parameters[bias], residual, scratch.dropout, r, d, sums);
    const RowStatistics statistics = row_statistics(sums, d, eps);
    if (rstd) *rstd = statistics.rstd;
    to_unit_row(sums, statistics, d);
    const float *weight = parameters[bias + 1], *shift = parameters[bias + 2];
    for_vectors(d, [&](int64_t i, int64_t n) {
      const Vec x = load(sums + i);
      if (normalised) store_some(normalised + i, x, n);
      store_some(out + i, saturated<Out>(fma(x, load_some(weight + i, n), load_some(shift + i, n))), n);
    });
  }
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result bert_layer_forward(const Tensor& hidden_in, const Tensor& cu_seqlens, const std::optional<Tensor>& seed,
                          const Tensor& qkv_weight, const Tensor& qkv_bias, const Tensor& projection_weight,
                          const Tensor& projection_bias, const Tensor& norm1_weight, const Tensor& norm1_bias,
                          const Tensor& up_weight, const Tensor& up_bias, const Tensor& down_weight,
                          const Tensor& down_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                          int64_t max_seqlen, int64_t heads, double eps, double attention_dropout_p,
                          double projection_dropout_p, double hidden_dropout_p, int64_t stream, bool keep,
                          const std::optional<Tensor>& relative_bias) {
  std::vector<Tensor> dense;  // keeps copies alive
  Parameters parameters;
  for (const Tensor* x : {&qkv_weight, &qkv_bias, &projection_weight, &projection_bias, &norm1_weight, &norm1_bias,
                          &up_weight, &up_bias, &down_weight, &down_bias, &norm2_weight, &norm2_bias}) {
    dense.push_back(torch::stable::contiguous(*x));
    parameters[dense.size() - 1] = static_cast<const float*>(dense.back().const_data_ptr());
  }
  const Tensor hidden = dense_rows(hidden_in);
  const LayerSizes sizes{hidden.size(0), hidden.size(1), up_weight.size(0), heads};
  const Sequences sequences(cu_seqlens, sizes.tokens);
  STD_TORCH_CHECK(sequences.longest() <= max_seqlen, "max_seqlen is smaller than a sequence");
  const RelativeBias bias(relative_bias, heads, sequences);
  const LayerDropout dropout(seed, attention_dropout_p, projection_dropout_p, hidden_dropout_p, stream);
  const ScalarType dtype = hidden.scalar_type(), wide = ScalarType::Float;
  const int64_t t = keep ? sizes.tokens : 0, d = sizes.hidden, inner = sizes.inner;
  Tensor out = empty({sizes.tokens, d}, dtype), qkv = empty({t, 3, heads, d / heads}, dtype);
  Tensor logsumexp = empty({heads, t}, wide), attended = empty({t, d}, dtype);
  Tensor norm1 = empty({t, d}, dtype), rstd1 = empty({t}, wide), pre = empty({t, inner}, dtype);
  Tensor norm2 = empty({t, d}, dtype), rstd2 = empty({t}, wide);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = Operand<T>;
    thread_local PackedWeight<C> qkv_packed, projection, up, down;
    qkv_packed.transposed({parameters[kQkvWeight], 3 * d, d, d});
    projection.transposed({parameters[kProjectionWeight], d, d, d});
    up.transposed({parameters[kUpWeight], inner, d, d});
    down.transposed({parameters[kDownWeight], d, inner, inner});
    pack_all<C>({&qkv_packed, &projection, &up, &down});
    Kept<T, float> kept{};
    if (keep) {
      kept = {data<T>(qkv),       data<float>(logsumexp), data<T>(attended), data<T>(norm1), data<float>(rstd1),
              data<T>(pre),       data<T>(norm2),         data<float>(rstd2)};
    }
    const Forward<T> forward{sizes,      matrix<T>(hidden), sequences, max_seqlen, static_cast<float>(eps),
                             parameters, dropout,           bias,      qkv_packed, projection,
                             up,         down,              kept,      data<T>(out)};
    const std::vector<Chunk> chunks = chunks_of(sequences);
    parallel(static_cast<int64_t>(chunks.size()), sizes.cost(1), [&](int64_t c) { forward.run(chunks[c]); });
  });
  return {out, qkv, logsumexp, attended, norm1, rstd1, pre, norm2, rstd2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "bert_layer_forward(Tensor hidden, Tensor cu_seqlens, Tensor? seed, Tensor qkv_weight, Tensor qkv_bias,"
      " Tensor projection_weight, Tensor projection_bias, Tensor norm1_weight, Tensor norm1_bias, Tensor up_weight,"
      " Tensor up_bias, Tensor down_weight, Tensor down_bias, Tensor norm2_weight, Tensor norm2_bias,"
      " SymInt max_seqlen, int heads, float eps, float attention_dropout_p, float projection_dropout_p,"
      " float hidden_dropout_p, int stream, bool keep, Tensor? relative_bias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) { m.impl("bert_layer_forward", TORCH_BOX(&bert_layer_forward)); }

}  // namespace triton_st
