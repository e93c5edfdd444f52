// A transformer layer, backward: each thread takes whole sequences from the gradient of the layer's result to that of
// its input. GELU, the first LayerNorm's result and dropout are computed again from what the forward pass kept.
//
// Gradients of parameters are sums over tokens. Those of vectors, and of weights small enough for a thread to hold them
// in its cache, are summed per unit of sequences, and the units' sums are added in order. Wide layers write the
// operands of their weights' gradients to memory, a few thousand tokens at a time, and multiply them block by block.
#include "bert_layer_sums.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "gelu.h"

namespace triton_st {
namespace {

// Memory of one thread.
struct Scratch {
  Buffer strip, input, attended, qkv, d_sum1, d_sum2, d_attended, d_qkv, d_output, d_inner, inner, d_projected;
  Buffer hidden, vectors;
  RowDropout dropout;
};
thread_local Scratch scratch;

template <class T>
struct Backward {
  using C = Operand<T>;

  const LayerSizes& sizes;
  Matrix<const T> grad, input;
  const Sequences& sequences;
  int64_t max_seqlen;
  const Parameters& parameters;
  const LayerDropout& dropout;
  const RelativeBias& bias;
  const RelativeBiasSums& bias_sums;
  const PackedWeight<C>&qkv_weight, &projection_weight, &up_weight, &down_weight;
  Kept<const T, const float> kept;
  T* d_input;
  const SumsLayout& layout;
  const WideOperands<C>* wide;  // null for a narrow layer

  // Adds the gradients of a chunk's parameters to a unit's sums; `onto` says that its weights have any.
  void run(const Chunk& chunk, float* sums, bool onto) const {
    const int64_t count = chunk.tokens(), d = sizes.hidden;
    const Matrix<float> d_sum1 = new_operand<float>(scratch.d_sum1, count, d);
    const Matrix<float> d_attended{scratch.d_attended.reserve(count * d), count, d, d};
    for_row_blocks(count, [&](int64_t row, int64_t rows) {
      float* vectors = new_vectors();
      through_feed_forward(chunk.begin + row, rows, rows_of(d_sum1, row, rows), rows_of(d_attended, row, rows), sums,
                           vectors, onto || row > 0);
      add_vectors(vectors, sums);
    });
    const Matrix<float> d_qkv = new_operand<float>(scratch.d_qkv, count, 3 * d);
    const WeightDropout weight_dropout(dropout.attention, max_seqlen);
    for (int64_t s = chunk.first; s < chunk.last; ++s) {
      const int64_t start = sequences.start(s), length = sequences.length(s), size = sizes.head_size();
      const float* qkv = widened(kept.qkv + start * 3 * d, length * 3 * d, scratch.qkv);
      const float* attended = widened(kept.attended + start * d, length * d, scratch.attended);
      for (int64_t h = 0; h < sizes.heads && length > 0; ++h) {
        const float* q = qkv + h * size;
        float* d_q = d_qkv.row(start - chunk.begin) + h * size;
        const int64_t row = h * sizes.tokens + start;
        attend_backward<float>({q, q + d, q + 2 * d, 3 * d, length, size, bias.of(h)}, weight_dropout.from_row(row),
                               d_attended.row(start - chunk.begin) + h * size, attended + h * size, d,
                               kept.logsumexp + row, d_q, d_q + d, d_q + 2 * d, d_qkv.stride, bias_sums.of(s, h));
      }
    }
    for_row_blocks(count, [&](int64_t row, int64_t rows) {
      float* vectors = new_vectors();
      to_input(chunk.begin + row, rows, rows_of(d_sum1, row, rows), rows_of(d_qkv, row, rows), sums, vectors,
               onto || row > 0);
      add_vectors(vectors, sums);
    });
  }

 private:
  static const float* widened(const T* x, int64_t count, Buffer& memory) {
    if constexpr (std::is_same_v<T, float>) return x;
    float* wide = memory.reserve(round_up(count, kWidth));
    for (int64_t i = 0; i < count; i += kWidth) store(wide + i, load_some(x + i, count - i));
    return wide;
  }

  // Vectors' gradients are summed block by block, which loses fewer digits than one running sum.
  float* new_vectors() const {
    float* vectors = scratch.vectors.reserve(layout.vectors);
    std::fill_n(vectors, layout.vectors, 0.f);
    return vectors;
  }
  void add_vectors(const float* vectors, float* sums) const {
    for (int64_t i = 0; i < layout.vectors; i += kWidth) store(sums + i, load(sums + i) + load(vectors + i));
  }

  // Where an operand of a weight's gradient is written: the thread's own memory, or that of all tokens.
  Matrix<C> place(Buffer& memory, Matrix<C> WideOperands<C>::* operand, int64_t token, int64_t rows,
                  int64_t cols) const {
    return wide ? rows_of(wide->*operand, token - wide->begin, rows) : new_operand<C>(memory, rows, cols);
  }

  // From the gradient of the result to that of the first sum and of attention's result.
  void through_feed_forward(int64_t token, int64_t rows, Matrix<float> d_sum1, Matrix<float> d_attended, float* sums,
                            float* vectors, bool onto) const {
    const int64_t d = sizes.hidden, inner = sizes.inner;
    const Matrix<float> d_sum2 = new_operand<float>(scratch.d_sum2, rows, d);
    const Matrix<C> d_output = place(scratch.d_output, &WideOperands<C>::d_output, token, rows, d);
    scratch.dropout.draw(dropout.feed_forward, token, rows, d);
    for_norm_rows(rows, kDownBias, vectors, [&](int64_t r, float* d_bias) {
      const int64_t t = token + r;
      norm_backward(grad.row(t), kept.norm2 + t * d, kept.rstd2[t], kDownBias, d_bias, d_sum2.row(r));
      drop(r, d_sum2.row(r), d_output.row(r), d_bias);
    });
    const Matrix<C> d_inner = place(scratch.d_inner, &WideOperands<C>::d_inner, token, rows, inner);
    const Matrix<C> activated = place(scratch.inner, &WideOperands<C>::inner, token, rows, inner);
    multiply<C>(read_only(d_output), down_weight, scratch.strip, [&](int64_t column, float* strip) {
      const int64_t n = inner - column;
      const T* pre = kept.pre + token * inner + column;
      float* d_bias = vectors + layout.at[kUpBias] + column;
      for (int64_t r = 0; r < rows;) {
        Vec low_sum{}, high_sum{};
        for (const int64_t end = std::min(r + kFewRows, rows); r < end; ++r, strip += kPanel, pre += inner) {
          const GeluAndSlope low = gelu_and_slope(load_some(pre, n));
          const GeluAndSlope high = gelu_and_slope(load_some(pre + kWidth, n - kWidth));
          const Vec d_low = load(strip) * low.slope, d_high = load(strip + kWidth) * high.slope;
          low_sum += d_low;
          high_sum += d_high;
          store_strip(d_inner.row(r) + column, n, d_low, d_high);
          store_strip(activated.row(r) + column, n, low.value, high.value);
        }
        store(d_bias, load(d_bias) + low_sum);
        store(d_bias + kWidth, load(d_bias + kWidth) + high_sum);
      }
    });
    const Matrix<C> hidden = place(scratch.hidden, &WideOperands<C>::hidden, token, rows, d);
    for (int64_t r = 0; r < rows; ++r) {
      for_strips(d, [&](int64_t i, int64_t n, auto at) {
        const T* normalised = kept.norm1 + (token + r) * d;
        auto scaled = [&](int64_t k, int64_t m) {
          return fma(load_some(normalised + k, m), load_some(parameters[kNorm1Weight] + k, m),
                     load_some(parameters[kNorm1Bias] + k, m));
        };
        store_strip(hidden.row(r) + i, n, at(scaled, 0), at(scaled, kWidth));
      });
    }
    if (!wide) {
      add_outer(kDownWeight, read_only(d_output), read_only(activated), sums, onto);
      add_outer(kUpWeight, read_only(hidden), read_only(d_inner), sums, onto);
    }
    multiply<C>(read_only(d_inner), up_weight, scratch.strip, [&](int64_t column, float* strip) {
      const int64_t n = d - column;
      for (int64_t r = 0; r < rows; ++r, strip += kPanel) {
        float* row = d_sum2.row(r) + column;
        store_strip(row, n, load(strip) + load(row), load(strip + kWidth) + load_some(row + kWidth, n - kWidth));
      }
    });
    const Matrix<C> d_projected = place(scratch.d_projected, &WideOperands<C>::d_projected, token, rows, d);
    scratch.dropout.draw(dropout.projection, token, rows, d);
    for_norm_rows(rows, kProjectionBias, vectors, [&](int64_t r, float* d_bias) {
      const int64_t t = token + r;
      norm_backward(d_sum2.row(r), kept.norm1 + t * d, kept.rstd1[t], kProjectionBias, d_bias, d_sum1.row(r));
      drop(r, d_sum1.row(r), d_projected.row(r), d_bias);
    });
    if (!wide) {
      const Matrix<const T> attended{kept.attended + token * d, rows, d, d};
      add_outer(kProjectionWeight, read_only(d_projected), attended, sums, onto);
    }
    multiply<C>(read_only(d_projected), projection_weight, scratch.strip, [&](int64_t column, float* strip) {
      for (int64_t r = 0; r < rows; ++r, strip += kPanel) {
        store_exactly(d_attended.row(r) + column, d - column, load(strip), load(strip + kWidth));
      }
    });
  }

  // From the gradients of queries, keys, values and of the first sum to that of the input.
  void to_input(int64_t token, int64_t rows, Matrix<float> d_sum1, Matrix<float> d_qkv, float* sums, float* vectors,
                bool onto) const {
    const int64_t d = sizes.hidden, n = 3 * d;
    float* d_bias = vectors + layout.at[kQkvBias];
    for (int64_t i = 0; i < n; i += kWidth) {
      Vec total{};
      for (int64_t r = 0; r < rows;) {
        Vec few{};
        for (const int64_t end = std::min(r + kFewRows, rows); r < end; ++r) few += load_some(d_qkv.row(r) + i, n - i);
        total += few;
      }
      store(d_bias + i, load(d_bias + i) + total);
    }
    Matrix<const C> gradient;
    if (wide) {
      const Matrix<C> all = rows_of(wide->d_qkv, token - wide->begin, rows);
      for (int64_t r = 0; r < rows; ++r) {
        for_strips(n, [&](int64_t i, int64_t m, auto at) {
          auto loaded = [&](int64_t k, int64_t left) { return load_some(d_qkv.row(r) + k, left); };
          store_strip(all.row(r) + i, m, at(loaded, 0), at(loaded, kWidth));
        });
      }
      gradient = read_only(all);
    } else {
      gradient = as_operand<C, float>(read_only(d_qkv), scratch.d_output);
      const Matrix<const C> x = as_operand<C, T>(rows_of(input, token, rows), scratch.input);
      add_outer(kQkvWeight, x, gradient, sums, onto);
    }
    multiply<C>(gradient, qkv_weight, scratch.strip, [&](int64_t column, float* strip) {
      const int64_t m = d - column;
      for (int64_t r = 0; r < rows; ++r, strip += kPanel) {
        const float* row = d_sum1.row(r) + column;
        store_exactly(d_input + (token + r) * d + column, m, load(strip) + load_some(row, m),
                      load(strip + kWidth) + load_some(row + kWidth, m - kWidth));
      }
    });
  }

  // Calls f(i, left, at) for each strip of `cols` columns; at(g, offset) is g(i + offset, columns left from there).
  template <class F>
  static void for_strips(int64_t cols, F&& f) {
    for (int64_t i = 0; i < cols; i += kPanel) {
      f(i, cols - i, [&](auto&& g, int64_t offset) { return g(i + offset, cols - i - offset); });
    }
  }

  template <class S>
  void add_outer(Parameter weight, Matrix<const C> left, Matrix<const S> right, float* sums, bool onto) const {
    accumulate_outer<C, S>(left, right, sums + layout.at[weight], layout.stride(weight), onto);
  }

  // Calls f(r, d_bias) for rows; what it adds to d_bias is added to the gradients of `bias` and of the LayerNorm's
  // weight and bias, which follow it among the parameters.
  template <class F>
  void for_norm_rows(int64_t rows, int bias, float* vectors, F&& f) const {
    RowSums sums(vectors + layout.at[bias], 3 * layout.stride(bias));
    for (int64_t r = 0; r < rows; ++r) {
      f(r, sums.get());
      sums.row_added();
    }
  }

  // The gradient of a LayerNorm's sum, and those of its weight and bias, which are added where they follow d_bias.
  template <class G>
  void norm_backward(const G* d_out, const T* normalised, float rstd, int bias, float* d_bias, float* d_sum) const {
    const int64_t d = sizes.hidden, stride = layout.stride(bias);
    for_vectors(d, [&](int64_t i, int64_t n) { store(d_sum + i, load_some(normalised + i, n)); });
    layer_norm_backward_row(d_out, d_sum, rstd, parameters[bias + 1], d, d_bias + stride, d_bias + 2 * stride);
  }

  // The gradient through dropout of row r of those at hand, as an operand and added to that of the bias.
  void drop(int64_t r, const float* d_sum, C* out, float* d_bias) const {
    for (int64_t i = 0; i < sizes.hidden; i += kPanel) {
      const int64_t n = sizes.hidden - i;
      const Vec low = scratch.dropout(load_some(d_sum + i, n), r, i);
      const Vec high = n > kWidth ? scratch.dropout(load_some(d_sum + i + kWidth, n - kWidth), r, i + kWidth) : Vec{};
      store_strip(out + i, n, low, high);
      store(d_bias + i, load(d_bias + i) + low);
      store(d_bias + i + kWidth, load(d_bias + i + kWidth) + high);
    }
  }
};

// Runs a wide layer's units and multiplies its weights' gradients.
template <class T>
void run_wide(Backward<T>& backward, const std::vector<Chunk>& chunks, float* sums,
              const std::array<float*, kParameters>& out) {
  using C = Operand<T>;
  thread_local Buffer d_output, d_inner, inner, d_projected, hidden, d_qkv;
  const LayerSizes& sizes = backward.sizes;
  const int64_t d = sizes.hidden, count = static_cast<int64_t>(chunks.size());
  const std::vector<Block> blocks = blocks_of(sizes);
  WideOperands<C> wide;
  backward.wide = &wide;
  for (int64_t first = 0, last; first < count; first = last) {
    const int64_t begin = chunks[first].begin;
    last = first + 1;
    while (last < count && chunks[last].end - begin <= kWideTokens) ++last;
    const int64_t rows = chunks[last - 1].end - begin;
    wide = {begin,
            new_operand<C>(d_output, rows, d),
            new_operand<C>(d_inner, rows, sizes.inner),
            new_operand<C>(inner, rows, sizes.inner),
            new_operand<C>(d_projected, rows, d),
            new_operand<C>(hidden, rows, d),
            new_operand<C>(d_qkv, rows, 3 * d)};
    const int64_t cost = LayerSizes{rows, d, sizes.inner, sizes.heads}.cost(1);
    parallel(last - first, cost, [&](int64_t i) {
      backward.run(chunks[first + i], sums + (first + i) * backward.layout.floats, false);
    });
    const Matrix<const T> x = rows_of(backward.input, begin, rows);
    const Matrix<const T> results{backward.kept.attended + begin * d, rows, d, d};
    parallel(static_cast<int64_t>(blocks.size()), cost, [&](int64_t b) {
      const Block& block = blocks[b];
      float* to = out[block.weight];
      switch (block.weight) {
        case kUpWeight:
          return block_product(block, read_only(wide.d_inner), read_only(wide.hidden), to, first > 0);
        case kDownWeight:
          return block_product(block, read_only(wide.d_output), read_only(wide.inner), to, first > 0);
        case kQkvWeight:
          return block_product(block, read_only(wide.d_qkv), x, to, first > 0);
        default:
          return block_product(block, read_only(wide.d_projected), results, to, first > 0);
      }
    });
  }
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor, Tensor>;

Result bert_layer_backward(const Tensor& grad_in, const Tensor& hidden_in, const Tensor& qkv, const Tensor& logsumexp,
                           const Tensor& attended, const Tensor& norm1, const Tensor& rstd1, const Tensor& pre,
                           const Tensor& norm2, const Tensor& rstd2, const Tensor& cu_seqlens,
                           const std::optional<Tensor>& seed, const Tensor& qkv_weight,
                           const Tensor& projection_weight, const Tensor& norm1_weight, const Tensor& norm1_bias,
                           const Tensor& up_weight, const Tensor& down_weight, const Tensor& norm2_weight,
                           int64_t max_seqlen, double attention_dropout_p, double projection_dropout_p,
                           double hidden_dropout_p, int64_t stream,
                           const std::optional<Tensor>& relative_bias) {
  std::vector<Tensor> dense;  // keeps copies alive
  Parameters parameters{};
  const auto add = [&](Parameter p, const Tensor& x) {
    dense.push_back(torch::stable::contiguous(x));
    parameters[p] = static_cast<const float*>(dense.back().const_data_ptr());
  };
  add(kQkvWeight, qkv_weight), add(kProjectionWeight, projection_weight), add(kNorm1Weight, norm1_weight);
  add(kNorm1Bias, norm1_bias), add(kUpWeight, up_weight), add(kDownWeight, down_weight);
  add(kNorm2Weight, norm2_weight);
  const Tensor grad = dense_rows(grad_in), hidden = dense_rows(hidden_in);
  const LayerSizes sizes{hidden.size(0), hidden.size(1), up_weight.size(0), qkv.size(2)};
  const Sequences sequences(cu_seqlens, sizes.tokens);
  STD_TORCH_CHECK(sequences.longest() <= max_seqlen, "max_seqlen is smaller than a sequence");
  const RelativeBias bias(relative_bias, sizes.heads, sequences);
  const RelativeBiasSums bias_sums(bias, sizes.heads, sequences);
  const LayerDropout dropout(seed, attention_dropout_p, projection_dropout_p, hidden_dropout_p, stream);
  const int64_t d = sizes.hidden, inner = sizes.inner;
  auto vector = [](int64_t n) { return empty({n}, ScalarType::Float); };
  auto matrix_of = [](int64_t n, int64_t k) { return empty({n, k}, ScalarType::Float); };
  Tensor d_input = empty({sizes.tokens, d}, hidden.scalar_type());
  const std::array<Tensor, kParameters> grads = {
      matrix_of(3 * d, d), vector(3 * d), matrix_of(d, d),     vector(d), vector(d), vector(d),
      matrix_of(inner, d), vector(inner), matrix_of(d, inner), vector(d), vector(d), vector(d)};
  std::array<float*, kParameters> out;
  for (int p = 0; p < kParameters; ++p) out[p] = data<float>(grads[p]);
  dispatch(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = Operand<T>;
    thread_local Buffer memory;
    thread_local PackedWeight<C> qkv_packed, projection, up, down;
    qkv_packed.plain({parameters[kQkvWeight], 3 * d, d, d});
    projection.plain({parameters[kProjectionWeight], d, d, d});
    up.plain({parameters[kUpWeight], inner, d, d});
    down.plain({parameters[kDownWeight], d, inner, inner});
    pack_all<C>({&qkv_packed, &projection, &up, &down});
    const bool wide = sizes.weights() > kMostUnitWeights;
    const SumsLayout layout(sizes, !wide);
    const std::vector<Chunk> chunks = chunks_of(sequences);
    const std::vector<Unit> units = units_of(chunks, sizes.tokens, wide);
    const int64_t count = std::max<int64_t>(static_cast<int64_t>(units.size()), 1);
    float* sums = memory.reserve(count * layout.floats);
    for (int64_t u = 0; u < count; ++u) {
      std::fill_n(sums + u * layout.floats, units.empty() ? layout.floats : layout.vectors, 0.f);
    }
    const auto in = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
    const auto wide_in = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
    Backward<T> backward{sizes,
                         matrix<T>(grad),
                         matrix<T>(hidden),
                         sequences,
                         max_seqlen,
                         parameters,
                         dropout,
                         bias,
                         bias_sums,
                         qkv_packed,
                         projection,
                         up,
                         down,
                         {in(qkv), wide_in(logsumexp), in(attended), in(norm1), wide_in(rstd1), in(pre), in(norm2),
                          wide_in(rstd2)},
                         data<T>(d_input),
                         layout,
                         nullptr};
    if (wide) {
      if (units.empty()) {
        for (const Parameter p : {kQkvWeight, kProjectionWeight, kUpWeight, kDownWeight}) {
          std::fill_n(out[p], grads[p].numel(), 0.f);
        }
      }
      run_wide<T>(backward, chunks, sums, out);
    } else {
      parallel(static_cast<int64_t>(units.size()), sizes.cost(2), [&](int64_t u) {
        for (int64_t c = units[u].first; c < units[u].last; ++c) {
          backward.run(chunks[c], sums + u * layout.floats, c > units[u].first);
        }
      });
    }
    add_units(sums, count, layout.floats, layout.floats);
    for (int p = 0; p < kParameters; ++p) {
      const float* from = sums + layout.at[p];
      const int64_t rows = layout.rows[p], cols = layout.cols[p], stride = layout.stride(p);
      const bool across = p == kQkvWeight || p == kUpWeight;
      if (layout.matrix[p] && wide) continue;
      for (int64_t r = 0; r < rows; ++r, from += stride) {
        if (!across) std::memcpy(out[p] + r * cols, from, cols * sizeof(float));
        for (int64_t c = 0; across && c < cols; ++c) out[p][c * rows + r] = from[c];
      }
    }
  });
  return std::apply([&](const auto&... each) { return Result{d_input, each..., bias_sums.finish()}; }, grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "bert_layer_backward(Tensor grad, Tensor hidden, Tensor qkv, Tensor logsumexp, Tensor attended, Tensor norm1,"
      " Tensor rstd1, Tensor pre, Tensor norm2, Tensor rstd2, Tensor cu_seqlens, Tensor? seed, Tensor qkv_weight,"
      " Tensor projection_weight, Tensor norm1_weight, Tensor norm1_bias, Tensor up_weight, Tensor down_weight,"
      " Tensor norm2_weight, SymInt max_seqlen, float attention_dropout_p, float projection_dropout_p,"
      " float hidden_dropout_p, int stream, Tensor? relative_bias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
      " Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) { m.impl("bert_layer_backward", TORCH_BOX(&bert_layer_backward)); }

}  // namespace triton_st
