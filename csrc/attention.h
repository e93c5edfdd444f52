// Attention of one head over one sequence, forward and backward, from rows of fp32, fp16 or bf16 that need not be next
// to each other. All arithmetic is fp32. Who calls it shares (sequence, head) pairs among threads; results depend on
// neither the pair's neighbours nor the thread.
//
//   attend(head, dropout, out, out_stride, logsumexp)
//   attend_backward(head, dropout, grad, out, out_stride, logsumexp, grad_q, grad_k, grad_v, grad_stride, grad_bias)
//
// Queries stand across lanes where scores are made, so that maxima and sums over keys are vertical and a sequence of 25
// fills 25 of 32 lanes whatever the head's size; the head's elements stand across lanes where rows are made, so that
// neither scores nor results are ever transposed. Blocks of kBlock queries meet blocks of kBlock keys; a sequence of at
// most kBlock tokens is one such pair and never leaves the first-level cache.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "gemm.h"
#include "philox.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

inline constexpr int64_t kBlock = 64;

// One head of one sequence: `length` rows of `d` elements, `stride` elements apart. The score of key j and query i has
// bias[j − i] added to it; `bias` may be null.
template <class T>
struct Head {
  const T *q, *k, *v;
  int64_t stride, length, d;
  const float* bias = nullptr;
};

// What attention drops. Weight (i, j) is element (row + i) · round_up(max_seqlen, 4) + j, where row = h · T + the
// sequence's first token. Made once for all heads; `from_row` moves it to one.
class WeightDropout {
 public:
  WeightDropout(const Dropout& dropout, int64_t max_seqlen)
      : dropout_(&dropout), groups_(groups_of(max_seqlen)), lanes_(groups_from(0, groups_)) {}

  WeightDropout from_row(int64_t row) const {
    WeightDropout moved = *this;
    moved.row_ = row;
    return moved;
  }

  bool active() const { return dropout_->active(); }
  float factor() const { return dropout_->factor(); }

  // Of kWidth queries from `query` on, the words of keys 4 · group … 4 · group + 3.
  RandomWords words(int64_t query, int64_t group) const {
    return dropout_->random_words(lanes_ + ((row_ + query) * groups_ + group));
  }
  Ints kept(Words word) const { return dropout_->kept(word); }

 private:
  const Dropout* dropout_;
  int64_t groups_, row_ = 0;
  Groups lanes_;
};

// --- small products ---

// Rows of a register tile that is `vectors` wide.
#if defined(TRITON_ST_AVX512)
constexpr int tile_rows(int vectors) { return vectors == 1 ? 12 : 24 / vectors; }
#else
constexpr int tile_rows(int vectors) { return vectors == 1 ? 8 : 12 / vectors; }
#endif

// c[kRows, kVectors · kWidth] = (or, onto it, +=) a[kRows, steps] · b[steps, kVectors · kWidth]. Element (row, step) of
// a is at row · stride + step, or, kDepthMajor, at step · stride + row.
template <bool kDepthMajor, int kVectors, int kRows>
void small_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
                int64_t c_stride, bool onto) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vec{};
  }
  // As in gemm.h, rows are reached from every third one.
  const float* third[(kRows + 2) / 3];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r += 3) third[r / 3] = kDepthMajor ? a + r : a + r * a_stride;
  for (int64_t step = 0; step < steps; ++step, b += b_stride) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(third[r / 3] + (kDepthMajor ? r % 3 : r % 3 * a_stride));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(x, right[v], sums[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r += 3) third[r / 3] += kDepthMajor ? a_stride : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* p = c + r * c_stride + v * kWidth;
      store(p, onto ? load(p) + sums[r][v] : sums[r][v]);
    }
  }
}

using SmallTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);

template <bool kDepthMajor, int kVectors>
void small_columns(int64_t rows, int64_t steps, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                   float* c, int64_t c_stride, bool onto) {
  constexpr int kMost = tile_rows(kVectors);
  static constexpr auto table = []<int... kRows>(std::integer_sequence<int, kRows...>) {
    return std::array<SmallTile, kMost>{&small_tile<kDepthMajor, kVectors, kRows + 1>...};
  }(std::make_integer_sequence<int, kMost>());
  const int64_t groups = ceil_div(rows, kMost);
  for (int64_t g = 0, first = 0; g < groups; ++g) {  // as even as can be
    const int64_t count = ceil_div(rows - first, groups - g);
    table[count - 1](kDepthMajor ? a + first : a + first * a_stride, a_stride, b, b_stride, steps, c + first * c_stride,
                     c_stride, onto);
    first += count;
  }
}

// c[rows, vectors · kWidth] = (or, onto it, +=) a[rows, steps] · b[steps, vectors · kWidth].
template <bool kDepthMajor>
void small_product(int64_t rows, int64_t vectors, int64_t steps, const float* a, int64_t a_stride, const float* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool onto) {
  while (vectors > 0) {
    const int64_t taken = vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1;
    const auto columns = taken == 4   ? &small_columns<kDepthMajor, 4>
                         : taken == 2 ? &small_columns<kDepthMajor, 2>
                                      : &small_columns<kDepthMajor, 1>;
    columns(rows, steps, a, a_stride, b, b_stride, c, c_stride, onto);
    vectors -= taken, b += taken * kWidth, c += taken * kWidth;
  }
}

// --- rows in and out ---

// `count` rows of d elements, times `factor`, to fp32 rows of `width`, a multiple of kWidth, padded with zeros.
template <class T>
void widen_rows(const T* from, int64_t stride, int64_t count, int64_t d, float factor, float* to, int64_t width) {
  const Vec factors = splat(factor);
  for (int64_t i = 0; i < count; ++i, from += stride, to += width) {
    for (int64_t k = 0; k < width; k += kWidth) store(to + k, load_some(from + k, d - k) * factors);
  }
}

template <class T>
void narrow_rows(const float* from, int64_t width, int64_t count, int64_t d, float factor, T* to, int64_t stride) {
  const Vec factors = splat(factor);
  for (int64_t i = 0; i < count; ++i, from += width, to += stride) {
    for (int64_t k = 0; k < d; k += kWidth) store_some(to + k, load(from + k) * factors, d - k);
  }
}

// fp32 rows [count, width] to columns [width, columns]; columns from `count` to a multiple of kWidth become 0.
inline void transpose_rows(const float* from, int64_t count, int64_t width, float* to, int64_t columns) {
  for (int64_t i = 0; i < count; i += kWidth) {
    for (int64_t k = 0; k < width; k += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) square[r] = i + r < count ? load(from + (i + r) * width + k) : Vec{};
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kWidth; ++r) store(to + (k + r) * columns + i, square[r]);
    }
  }
}

// Parts of a thread's scratch memory, one after the other.
class Parts {
 public:
  explicit Parts(float* memory) : next_(memory) {}
  float* take(int64_t floats) {
    float* part = next_;
    next_ += round_up(floats, kWidth);
    return part;
  }

 private:
  float* next_;
};

inline Buffer& attention_scratch() {
  thread_local Buffer scratch;
  return scratch;
}

// --- bias by relative position ---

// One number for each distance of two tokens, by query − key, so that those of one key lie as its queries do.
class ByDistance {
 public:
  ByDistance(float* memory, int64_t length) : middle_(memory + length - 1), length_(length) {}
  // Queries come in whole vectors, so that some distances are past the last.
  static int64_t floats(int64_t length) { return 2 * length + kWidth; }

  // bias[key − query]
  void read(const float* bias) const {
    clear();
    for (int64_t distance = 1 - length_; distance < length_; ++distance) middle_[distance] = bias[-distance];
  }
  void clear() const { std::fill_n(middle_ - (length_ - 1), floats(length_), 0.f); }
  void write(float* out) const { std::copy_n(middle_ - (length_ - 1), 2 * length_ - 1, out); }

  // To, or from, scores [keys, columns] of these queries and keys.
  void add_to(float* scores, int64_t query, int64_t key, int64_t keys, int64_t columns) const {
    for (int64_t j = 0; j < keys; ++j, scores += columns) {
      const float* row = middle_ + query - key - j;
      for (int64_t i = 0; i < columns; i += kWidth) store(scores + i, load(scores + i) + load(row + i));
    }
  }
  void add_from(const float* scores, int64_t query, int64_t key, int64_t keys, int64_t columns) const {
    for (int64_t j = 0; j < keys; ++j, scores += columns) {
      float* row = middle_ + query - key - j;
      for (int64_t i = 0; i < columns; i += kWidth) store(row + i, load(row + i) + load(scores + i));
    }
  }

 private:
  float* middle_;
  int64_t length_;
};

// --- forward ---

// Scores [keys, columns] become the weights that values are multiplied by; `most` and `total`, over the keys so far,
// and `shrink`, what earlier results must be multiplied by, are [columns].
inline void exponentiate(float* scores, int64_t keys, int64_t columns, int64_t query, int64_t first_key,
                         const WeightDropout& dropout, float* most, float* total, float* shrink) {
  const bool first = first_key == 0;
  for (int64_t column = 0; column < columns; column += kWidth) {
    float* score = scores + column;
    const Vec before = first ? splat(-std::numeric_limits<float>::infinity()) : load(most + column);
    Vec largest_score = before;
    for (int64_t j = 0; j < keys; ++j) largest_score = maximum(load(score + j * columns), largest_score);
    // A bias may be −inf for all keys so far: their weights are 0, not the NaN of a difference of infinities.
    const Vec offset = maximum(splat(std::numeric_limits<float>::lowest()), largest_score);
    Vec sum{};
    auto weight = [&](int64_t j) {
      const Vec p = exp(load(score + j * columns) - offset);
      sum += p;
      return p;
    };
    if (dropout.active()) {
      for (int64_t j = 0; j < keys; j += 4) {
        const RandomWords random = dropout.words(query + column, (first_key + j) / 4);
#pragma GCC unroll 4
        for (int64_t w = 0; w < 4; ++w) {
          if (j + w < keys) store(score + (j + w) * columns, where_kept(dropout.kept(random.word[w]), weight(j + w)));
        }
      }
    } else {
      for (int64_t j = 0; j < keys; ++j) store(score + j * columns, weight(j));
    }
    if (!first) {
      const Vec smaller = exp(before - offset);
      sum = fma(load(total + column), smaller, sum);
      store(shrink + column, smaller);
    }
    store(total + column, sum);
    store(most + column, largest_score);
  }
}

// out [length, d], rows `out_stride` elements apart = dropout(softmax(q kᵀ / √d + bias)) v; logsumexp [length]: that of
// each row's scores.
template <class T>
void attend(const Head<T>& head, const WeightDropout& dropout, T* out, int64_t out_stride, float* logsumexp) {
  const int64_t length = head.length, d = head.d, width = round_up(d, kWidth);
  const int64_t most_columns = std::min(kBlock, round_up(length, kWidth));
  Parts parts(attention_scratch().reserve(2 * length * width + 3 * most_columns * width +
                                          most_columns * (kBlock + 3) + ByDistance::floats(length) + kWidth));
  float *k = parts.take(length * width), *v = parts.take(length * width);
  float *q = parts.take(most_columns * width), *q_columns = parts.take(most_columns * width);
  float *result = parts.take(most_columns * width), *scores = parts.take(most_columns * kBlock);
  float *most = parts.take(most_columns), *total = parts.take(most_columns), *shrink = parts.take(most_columns);
  const ByDistance bias(parts.take(ByDistance::floats(length)), length);
  if (head.bias) bias.read(head.bias);
  widen_rows(head.k, head.stride, length, d, 1.f, k, width);
  widen_rows(head.v, head.stride, length, d, 1.f, v, width);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  for (int64_t query = 0; query < length; query += kBlock) {
    const int64_t queries = std::min(kBlock, length - query), columns = round_up(queries, kWidth);
    widen_rows(head.q + query * head.stride, head.stride, queries, d, scale, q, width);
    transpose_rows(q, queries, width, q_columns, columns);
    for (int64_t key = 0; key < length; key += kBlock) {
      const int64_t keys = std::min(kBlock, length - key);
      small_product<false>(keys, columns / kWidth, d, k + key * width, width, q_columns, columns, scores, columns,
                           false);
      if (head.bias) bias.add_to(scores, query, key, keys, columns);
      exponentiate(scores, keys, columns, query, key, dropout, most, total, shrink);
      for (int64_t i = 0; key > 0 && i < queries; ++i) {
        for (int64_t e = i * width; e < (i + 1) * width; e += kWidth) store(result + e, load(result + e) * shrink[i]);
      }
      small_product<true>(queries, width / kWidth, keys, scores, columns, v + key * width, width, result, width,
                          key > 0);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const Vec factor = splat(dropout.factor() / total[i]);
      T* row = out + (query + i) * out_stride;
      for (int64_t e = 0; e < d; e += kWidth) {
        store_some(row + e, saturated<T>(load(result + i * width + e) * factor), d - e);
      }
    }
    for (int64_t i = 0; i < queries; i += kWidth) {
      store_some(logsumexp + query + i, load(most + i) + log(load(total + i)), queries - i);
    }
  }
}

// --- backward ---

// From scores and grad_weights = grad · vᵀ [keys, columns]: `scores` become the weights after dropout (without its
// factor, which `grad` carries), `grad_weights` the gradient of the scores. `delta` [columns] is each query's
// Σ weight · gradient over all keys; null where these are all the keys.
inline void score_gradients(float* scores, float* grad_weights, int64_t keys, int64_t columns, int64_t query,
                            int64_t first_key, const WeightDropout& dropout, const float* logsumexp,
                            const float* delta) {
  for (int64_t column = 0; column < columns; column += kWidth) {
    float *score = scores + column, *grad_weight = grad_weights + column;
    const Vec offset = load(logsumexp + column);
    Vec sum{};
    if (dropout.active()) {
      // A weight that is dropped is remembered as its negative.
      const Ints sign = Ints{} + std::numeric_limits<int32_t>::min();
      for (int64_t j = 0; j < keys; j += 4) {
        const RandomWords random = dropout.words(query + column, (first_key + j) / 4);
#pragma GCC unroll 4
        for (int64_t w = 0; w < 4; ++w) {
          if (j + w >= keys) break;
          const int64_t at = (j + w) * columns;
          const Ints kept = dropout.kept(random.word[w]);
          const Vec p = exp(load(score + at) - offset), grad = where_kept(kept, load(grad_weight + at));
          sum = fma(p, grad, sum);
          store(score + at, kept ? p : as_floats(as_ints(p) | sign));
          store(grad_weight + at, grad);
        }
      }
      const Vec subtracted = delta ? load(delta + column) : sum;
      for (int64_t at = 0; at < keys * columns; at += columns) {
        const Vec p = load(score + at);
        store(grad_weight + at, absolute(p) * (load(grad_weight + at) - subtracted));
        store(score + at, maximum(Vec{}, p));  // in this order a NaN stays
      }
    } else {
      for (int64_t at = 0; at < keys * columns; at += columns) {
        const Vec p = exp(load(score + at) - offset);
        sum = fma(p, load(grad_weight + at), sum);
        store(score + at, p);
      }
      const Vec subtracted = delta ? load(delta + column) : sum;
      for (int64_t at = 0; at < keys * columns; at += columns) {
        store(grad_weight + at, load(score + at) * (load(grad_weight + at) - subtracted));
      }
    }
  }
}

// Gradients of q, k and v, rows `grad_stride` elements apart, from `grad` and `out`, rows `out_stride` apart. `out` is
// read for sequences of more than kBlock tokens alone. grad_bias [2 · length − 1], where there is a bias: its gradient,
// by query − key from 1 − length on.
template <class T>
void attend_backward(const Head<T>& head, const WeightDropout& dropout, const T* grad, const T* out, int64_t out_stride,
                     const float* logsumexp, T* grad_q, T* grad_k, T* grad_v, int64_t grad_stride, float* grad_bias) {
  const int64_t length = head.length, d = head.d, width = round_up(d, kWidth), vectors = width / kWidth;
  const int64_t most_columns = std::min(kBlock, round_up(length, kWidth));
  Parts parts(attention_scratch().reserve(4 * length * width + 5 * most_columns * width +
                                          2 * most_columns * (kBlock + 1) +
                                          2 * (ByDistance::floats(length) + kWidth)));
  float *k = parts.take(length * width), *v = parts.take(length * width);
  float *k_sum = parts.take(length * width), *v_sum = parts.take(length * width);
  float *q = parts.take(most_columns * width), *q_columns = parts.take(most_columns * width);
  float *grad_rows = parts.take(most_columns * width), *grad_columns = parts.take(most_columns * width);
  float *q_sum = parts.take(most_columns * width);
  float *scores = parts.take(most_columns * kBlock), *grad_weights = parts.take(most_columns * kBlock);
  float *offsets = parts.take(most_columns), *deltas = parts.take(most_columns);
  const ByDistance bias(parts.take(ByDistance::floats(length)), length);
  const ByDistance bias_sums(parts.take(ByDistance::floats(length)), length);
  if (head.bias) bias.read(head.bias), bias_sums.clear();
  widen_rows(head.k, head.stride, length, d, 1.f, k, width);
  widen_rows(head.v, head.stride, length, d, 1.f, v, width);
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  const bool one_block = length <= kBlock;
  for (int64_t query = 0; query < length; query += kBlock) {
    const int64_t queries = std::min(kBlock, length - query), columns = round_up(queries, kWidth);
    widen_rows(head.q + query * head.stride, head.stride, queries, d, scale, q, width);
    transpose_rows(q, queries, width, q_columns, columns);
    widen_rows(grad + query * out_stride, out_stride, queries, d, dropout.factor(), grad_rows, width);
    transpose_rows(grad_rows, queries, width, grad_columns, columns);
    // Lanes past the last query have weights of 0: with a large bias alone they would have infinite ones.
    std::fill_n(offsets, columns, std::numeric_limits<float>::infinity());
    std::copy_n(logsumexp + query, queries, offsets);
    for (int64_t i = 0; !one_block && i < columns; ++i) {
      Vec products{};
      for (int64_t e = 0; i < queries && e < d; e += kWidth) {
        const int64_t at = (query + i) * out_stride + e;
        products = fma(load_some(grad + at, d - e), load_some(out + at, d - e), products);
      }
      deltas[i] = sum(products);
    }
    for (int64_t key = 0; key < length; key += kBlock) {
      const int64_t keys = std::min(kBlock, length - key);
      small_product<false>(keys, columns / kWidth, d, k + key * width, width, q_columns, columns, scores, columns,
                           false);
      if (head.bias) bias.add_to(scores, query, key, keys, columns);
      small_product<false>(keys, columns / kWidth, d, v + key * width, width, grad_columns, columns, grad_weights,
                           columns, false);
      score_gradients(scores, grad_weights, keys, columns, query, key, dropout, offsets, one_block ? nullptr : deltas);
      if (head.bias) bias_sums.add_from(grad_weights, query, key, keys, columns);
      small_product<false>(keys, vectors, queries, scores, columns, grad_rows, width, v_sum + key * width, width,
                           query > 0);
      small_product<false>(keys, vectors, queries, grad_weights, columns, q, width, k_sum + key * width, width,
                           query > 0);
      small_product<true>(queries, vectors, keys, grad_weights, columns, k + key * width, width, q_sum, width, key > 0);
    }
    narrow_rows(q_sum, width, queries, d, scale, grad_q + query * grad_stride, grad_stride);
  }
  narrow_rows(k_sum, width, length, d, 1.f, grad_k, grad_stride);
  narrow_rows(v_sum, width, length, d, 1.f, grad_v, grad_stride);
  if (head.bias) bias_sums.write(grad_bias);
}

}  // namespace triton_st
