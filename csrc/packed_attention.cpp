// Self-attention within each sequence of a packed batch: see attention.h for the arithmetic. A thread takes runs
// of sequences with all their heads, which share cache lines, or one head at a time where there are few sequences.
#include <initializer_list>
#include <optional>

#include "attention.h"
#include "relative_bias.h"
#include "sequences.h"

namespace triton_st {
namespace {

constexpr int64_t kUnitsPerThread = 16;
constexpr double kNanosecondsPerProduct = 0.02;

// Rows of memory, one for each token.
struct TokenRows {
  explicit TokenRows(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())),
        bytes(x.stride(0) * static_cast<int64_t>(x.element_size())) {}

  void prefetch(int64_t begin, int64_t end) const {
    triton_st::prefetch(data + begin * bytes, (end - begin) * bytes);
  }

  const char* data;
  int64_t bytes;
};

struct Layout {
  Layout(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen)
      : sequences(cu_seqlens, qkv.size(0)), tokens(qkv.size(0)), heads(qkv.size(2)), d(qkv.size(3)) {
    STD_TORCH_CHECK(qkv.size(1) == 3 && d > 0, "qkv must be [T, 3, H, d]");
    STD_TORCH_CHECK(sequences.longest() <= max_seqlen, "max_seqlen is smaller than a sequence");
  }

  // Calls f(sequence, head) for all pairs, on all threads; `products` is how many of [length, length, d] f takes, and
  // `read` what it reads of each token.
  template <class F>
  void for_each(int products, std::initializer_list<TokenRows> read, F&& f) const {
    double pairs = 0;
    for (int64_t s = 0; s < sequences.count(); ++s) {
      pairs += static_cast<double>(sequences.length(s)) * static_cast<double>(sequences.length(s));
    }
    const int64_t cost = static_cast<int64_t>(
        std::min(pairs * static_cast<double>(heads * d * products) * kNanosecondsPerProduct, 1e15));
    const int64_t units = kUnitsPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
    if (sequences.count() < units) {
      parallel(sequences.count() * heads, cost, [&](int64_t pair) {
        if (sequences.length(pair / heads) > 0) f(pair / heads, pair % heads);
      });
      return;
    }
    parallel(units, cost, [&](int64_t unit) {
      const int64_t last = sequences.first_from(ceil_div(tokens * (unit + 1), units));
      for (int64_t s = sequences.first_from(ceil_div(tokens * unit, units)); s < last; ++s) {
        for (int64_t head = 0; head < heads && sequences.length(s) > 0; ++head) {
          // A part of the next sequence is asked for with each head of this one.
          const int64_t next = std::min(s + 1, sequences.count() - 1), begin = sequences.start(next);
          for (const TokenRows& rows : read) {
            rows.prefetch(begin + sequences.length(next) * head / heads,
                          begin + sequences.length(next) * (head + 1) / heads);
          }
          f(s, head);
        }
      }
    });
  }

  template <class T>
  Head<T> head(const Tensor& qkv, const RelativeBias& bias, int64_t sequence, int64_t index) const {
    const T* q = static_cast<const T*>(qkv.const_data_ptr()) + sequences.start(sequence) * qkv.stride(0) +
                 index * qkv.stride(2);
    return {q, q + qkv.stride(1), q + 2 * qkv.stride(1), qkv.stride(0), sequences.length(sequence), d,
            bias.of(index)};
  }

  Sequences sequences;
  int64_t tokens, heads, d;
};

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& qkv_in, const Tensor& cu_seqlens,
                                                    const std::optional<Tensor>& seed, int64_t max_seqlen,
                                                    double dropout_p, int64_t stream,
                                                    const std::optional<Tensor>& relative_bias) {
  const Tensor qkv = dense_rows(qkv_in);
  const Layout layout(qkv, cu_seqlens, max_seqlen);
  const RelativeBias bias(relative_bias, layout.heads, layout.sequences);
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  const WeightDropout weight_dropout(dropout, max_seqlen);
  const int64_t columns = layout.heads * layout.d;
  Tensor out = empty({layout.tokens, columns}, qkv.scalar_type());
  Tensor logsumexp = empty({layout.heads, layout.tokens}, ScalarType::Float);
  dispatch(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    T* results = data<T>(out);
    float* sums = data<float>(logsumexp);
    layout.for_each(2, {TokenRows(qkv)}, [&](int64_t sequence, int64_t head) {
      const int64_t start = layout.sequences.start(sequence), row = head * layout.tokens + start;
      attend(layout.head<T>(qkv, bias, sequence, head), weight_dropout.from_row(row),
             results + start * columns + head * layout.d, columns, sums + row);
    });
  });
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor> packed_attention_backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& out_in,
                                                     const Tensor& logsumexp_in, const Tensor& cu_seqlens,
                                                     const std::optional<Tensor>& seed, int64_t max_seqlen,
                                                     double dropout_p, int64_t stream,
                                                     const std::optional<Tensor>& relative_bias) {
  const Tensor qkv = dense_rows(qkv_in), grad = torch::stable::contiguous(grad_in);
  const Tensor out = torch::stable::contiguous(out_in), logsumexp = torch::stable::contiguous(logsumexp_in);
  const Layout layout(qkv, cu_seqlens, max_seqlen);
  const RelativeBias bias(relative_bias, layout.heads, layout.sequences);
  const RelativeBiasSums bias_sums(bias, layout.heads, layout.sequences);
  const int64_t columns = layout.heads * layout.d;
  STD_TORCH_CHECK(grad.numel() == layout.tokens * columns && out.numel() == grad.numel() &&
                      logsumexp.numel() == layout.heads * layout.tokens,
                  "grad, out and logsumexp do not fit qkv");
  STD_TORCH_CHECK(grad.scalar_type() == qkv.scalar_type() && out.scalar_type() == qkv.scalar_type() &&
                      logsumexp.scalar_type() == ScalarType::Float,
                  "grad and out must have qkv's dtype, logsumexp float32");
  const Dropout dropout = dropout_of(seed, dropout_p, stream);
  const WeightDropout weight_dropout(dropout, max_seqlen);
  Tensor grad_qkv = empty({layout.tokens, 3, layout.heads, layout.d}, qkv.scalar_type());
  dispatch(qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* grads = static_cast<const T*>(grad.const_data_ptr());
    const T* results = static_cast<const T*>(out.const_data_ptr());
    const float* sums = static_cast<const float*>(logsumexp.const_data_ptr());
    T* written = data<T>(grad_qkv);
    layout.for_each(5, {TokenRows(qkv), TokenRows(grad)}, [&](int64_t sequence, int64_t head) {
      const int64_t start = layout.sequences.start(sequence), row = head * layout.tokens + start;
      const int64_t at = start * columns + head * layout.d;
      T* grad_q = written + start * 3 * columns + head * layout.d;
      attend_backward(layout.head<T>(qkv, bias, sequence, head), weight_dropout.from_row(row), grads + at, results + at,
                      columns, sums + row, grad_q, grad_q + columns, grad_q + 2 * columns, 3 * columns,
                      bias_sums.of(sequence, head));
    });
  });
  return {grad_qkv, bias_sums.finish()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "packed_attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor? seed, SymInt max_seqlen, float dropout_p,"
      " int stream, Tensor? relative_bias) -> (Tensor out, Tensor logsumexp)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor logsumexp, Tensor cu_seqlens,"
      " Tensor? seed, SymInt max_seqlen, float dropout_p, int stream, Tensor? relative_bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&packed_attention_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace triton_st
