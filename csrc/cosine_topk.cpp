// The k rows of a corpus that are nearest to each query by cosine. Scores are compared where they are computed, in
// registers or in a block that stays in the first-level cache: no more of them are ever held.
//
// A unit of work is a group of queries against a stripe of the corpus; each keeps its own candidates, and those of a
// query's stripes are merged at the end. Since scores depend on their two rows alone and are ranked by a total order,
// neither the stripes nor the threads can change the result.
#include <memory>
#include <vector>

#include "gemm.h"
#include "normalize.h"
#include "tensor.h"
#include "topk.h"

namespace triton_st {
namespace {

// --- many queries: packed, and multiplied with the corpus as it lies in memory ---

// Bytes of the corpus that are normalised and multiplied at a time: beside the packed queries they stay in the
// second-level cache.
inline constexpr int64_t kChunkBytes = 192 << 10;
inline constexpr int64_t kMostChunkRows = 16 * kTileRows;

// Offers every stream its score with `row`: products[j] · factors[j] · row_factor.
void offer(Candidates& best, const float* products, const float* factors, float row_factor, int64_t streams,
           uint32_t row) {
  const float* thresholds = best.thresholds();
  const Vec common = splat(row_factor);
  for (int64_t j = 0; j < streams; j += kWidth) {
    const Vec scores = load(products + j) * load(factors + j) * common;
    uint32_t survivors = not_at_most(scores, load(thresholds + j));
    if (streams - j < kWidth) survivors &= (1u << (streams - j)) - 1;
    if (survivors == 0) continue;
    float each[kWidth];
    store(each, scores);
    for (; survivors != 0; survivors &= survivors - 1) {
      const int lane = __builtin_ctz(survivors);
      best.add(j + lane, each[lane], row);
    }
  }
}

// `queries` (at most kScoreColumns) against rows [first, last) of the corpus.
template <class T>
void search_many(Matrix<const T> queries, RowScales::Part scales, Matrix<const T> corpus, int64_t first, int64_t last,
                 Candidates& best) {
  float* packed = product_scratch.right.reserve(round_up(queries.rows, kPanel) * lanes<kPairs<T>>(queries.cols));
  pack_transposed<kPairs<T>>(queries, scales.power(), packed);
  const int64_t row_bytes = std::max<int64_t>(corpus.cols * sizeof(T), 1);
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / row_bytes / kTileRows * kTileRows, kTileRows, kMostChunkRows);
  float powers[kMostChunkRows], inverses[kMostChunkRows];
  for (int64_t i = first; i < last; i += chunk) {
    const int64_t count = std::min(chunk, last - i);
    bool unscaled = true;
    for (int64_t r = 0; r < count; ++r) {
      const RowScale scale = row_scale(corpus.row(i + r), corpus.cols);
      powers[r] = scale.power;
      inverses[r] = scale.inverse;
      unscaled = unscaled && scale.power == 1.f;
    }
    score_rows<T>({corpus.row(i), count, corpus.cols, corpus.stride}, powers, unscaled, 0, count, packed, queries.rows,
                  [&](int64_t r, const float* products) {
                    if (i + r + chunk < last) prefetch<2>(corpus.row(i + r + chunk), corpus.cols * sizeof(T));
                    offer(best, products, scales.inverse(), inverses[r], queries.rows, static_cast<uint32_t>(i + r));
                  });
  }
}

// --- few queries: bound by reading the corpus, each row of which is read once and normalised on the way ---

inline constexpr int64_t kFewQueries = 16;
#if defined(TRITON_ST_AVX512)
inline constexpr int kRowsAtOnce = 4, kQueriesAtOnce = 4;  // 20 sums and 8 operands of 32 registers
#else
inline constexpr int kRowsAtOnce = 2, kQueriesAtOnce = 4;  // 10 and 6 of 16
#endif

// Bytes ahead of what is read that are asked for. The processor's own prefetching stops where a page ends.
inline constexpr int64_t kAhead = 4096;

// Sums by lane, one vector for each pair of a row and a query, and of each row with itself.
struct PartialSums {
  Vec products[kQueriesAtOnce][kWidth], squares[kWidth];
};

// Rows [r, r + kRowsAtOnce) of `rows` with kQueries queries, which are `stride` apart and end in zeros.
template <int kQueries, bool kSquares, class T>
void multiply_rows(const T* const* rows, int r, int64_t d, const float* queries, int64_t stride, PartialSums& sums) {
  Vec products[kQueries][kRowsAtOnce] = {}, squares[kRowsAtOnce] = {};
  auto step = [&](int64_t k, auto&& read) {
    Vec row[kRowsAtOnce];
#pragma GCC unroll 4
    for (int i = 0; i < kRowsAtOnce; ++i) {
      row[i] = read(rows[r + i] + k);
      if constexpr (kSquares) {
        squares[i] = fma(row[i], row[i], squares[i]);
        __builtin_prefetch(reinterpret_cast<const char*>(rows[r + i] + k) + kAhead, 0, 3);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const Vec query = load(queries + q * stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRowsAtOnce; ++i) products[q][i] = fma(row[i], query, products[q][i]);
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= d; k += kWidth) step(k, [](const T* p) { return load(p); });
  if (k < d) step(k, [n = static_cast<int>(d - k)](const T* p) { return load(p, n); });
  for (int i = 0; i < kRowsAtOnce; ++i) {
    for (int q = 0; q < kQueries; ++q) sums.products[q][r + i] = products[q][i];
    if constexpr (kSquares) sums.squares[r + i] = squares[i];
  }
}

// Lane i: the sum over the lanes of vector i.
inline Vec sum_each(Vec (&vectors)[kWidth]) {
  transpose(vectors);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) vectors[i] += vectors[i + half];
  return vectors[0];
}

// The product of one row, times `power`, with one query.
template <class T>
float scaled_product(const T* row, const float* query, int64_t d, float power) {
  Vec total{};
  for (int64_t k = 0; k < d; k += kWidth) total = fma(load_some(row + k, d - k) * power, load(query + k), total);
  return sum(total);
}

// Queries as fp32 rows [count, stride] that end in zeros, times their power of two, against rows [first, last).
template <class T>
void search_few(const float* queries, int64_t stride, RowScales::Part scales, int64_t count, Matrix<const T> corpus,
                int64_t first, int64_t last, Candidates& best) {
  const int64_t d = corpus.cols;
  PartialSums sums;
  for (int64_t i = first; i < last; i += kWidth) {
    const int rows_left = static_cast<int>(std::min<int64_t>(kWidth, last - i));
    const T* rows[kWidth];
    for (int r = 0; r < kWidth; ++r) rows[r] = corpus.row(i + std::min(r, rows_left - 1));
    const uint32_t inside = (1u << rows_left) - 1;
    float powers[kWidth], inverses[kWidth];
    uint32_t extreme = 0;
    for (int64_t q = 0; q < count; q += kQueriesAtOnce) {
      const int group = static_cast<int>(std::min<int64_t>(kQueriesAtOnce, count - q));
      auto multiply = [&]<int kQueries>(std::integral_constant<int, kQueries>) {
        for (int r = 0; r < kWidth; r += kRowsAtOnce) {
          if (q == 0) {
            multiply_rows<kQueries, true>(rows, r, d, queries, stride, sums);
          } else {
            multiply_rows<kQueries, false>(rows, r, d, queries + q * stride, stride, sums);
          }
        }
      };
      switch (group) {
        case 1: multiply(std::integral_constant<int, 1>()); break;
        case 2: multiply(std::integral_constant<int, 2>()); break;
        case 3: multiply(std::integral_constant<int, 3>()); break;
        default: multiply(std::integral_constant<int, 4>()); break;
      }
      if (q == 0) {
        const Vec squares = sum_each(sums.squares);
        extreme = not_at_most(splat(1e-16f), squares) | not_at_most(squares, splat(1e16f));
        for (int r = 0; r < kWidth; ++r) inverses[r] = 1.f / std::sqrt(squares[r]);
        for (uint32_t left = extreme; left != 0; left &= left - 1) {
          const int r = __builtin_ctz(left);
          const RowScale scale = row_scale(rows[r], d);
          powers[r] = scale.power;
          inverses[r] = scale.inverse;
        }
      }
      for (int g = 0; g < group; ++g) {
        Vec products = sum_each(sums.products[g]);
        for (uint32_t left = extreme; left != 0; left &= left - 1) {
          const int r = __builtin_ctz(left);
          products[r] = scaled_product(rows[r], queries + (q + g) * stride, d, powers[r]);
        }
        const Vec scores = products * splat(scales.inverse()[q + g]) * load(inverses);
        uint32_t survivors = not_at_most(scores, splat(best.thresholds()[q + g])) & inside;
        for (; survivors != 0; survivors &= survivors - 1) {
          const int r = __builtin_ctz(survivors);
          best.add(q + g, scores[r], static_cast<uint32_t>(i + r));
        }
      }
    }
  }
}

// --- both ---

// How `queries` and the corpus are divided among threads.
struct Division {
  Division(int64_t queries, int64_t rows, int64_t k) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t panels = ceil_div(queries, kPanel);
    // A short stripe finds most of its rows among the best and sorts more than it multiplies: `cheap` stripes are no
    // such, more than `most` are worse than idle threads. Queries are divided first.
    const int64_t cheap = std::max<int64_t>(rows / (32 * k + 1024), 1);
    const int64_t most = std::max<int64_t>(rows / (4 * k + 512), 1);
    const int64_t wanted = threads == 1 ? 1 : (cheap >= 4 * threads ? 4 : 2) * threads;
    groups = queries <= kFewQueries
                 ? 1
                 : std::max(ceil_div(queries, kScoreColumns), std::min(ceil_div(wanted, cheap), panels));
    stripes = std::min(ceil_div(wanted, groups), most);
  }
  int64_t groups, stripes;
};

void write_best(const std::vector<std::unique_ptr<Candidates>>& found, int64_t stream, int64_t k,
                std::vector<uint64_t>& keys, float* scores, int64_t* indices) {
  keys.clear();
  for (const auto& best : found) keys.insert(keys.end(), best->keys(stream), best->keys(stream) + best->count(stream));
  if (static_cast<int64_t>(keys.size()) > k) {
    std::nth_element(keys.begin(), keys.begin() + k - 1, keys.end(), std::greater<>());
    keys.resize(k);
  }
  std::sort(keys.begin(), keys.end(), std::greater<>());
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = score_of(keys[i]);
    indices[i] = row_of(keys[i]);
  }
}

std::tuple<Tensor, Tensor> cosine_topk(const Tensor& queries_in, const Tensor& corpus_in, int64_t k) {
  const Tensor queries_dense = dense_rows(queries_in), corpus_dense = dense_rows(corpus_in);
  const int64_t count = queries_in.size(0), rows = corpus_in.size(0), d = corpus_in.size(1);
  STD_TORCH_CHECK(queries_in.size(1) == d && queries_in.scalar_type() == corpus_in.scalar_type() && k > 0,
                  "queries, corpus and k do not fit");
  STD_TORCH_CHECK(rows < kMostRows, "too many rows");
  k = std::min(k, rows);
  Tensor scores = empty({count, k}, ScalarType::Float), indices = empty({count, k}, ScalarType::Long);
  if (count == 0 || k == 0) return {scores, indices};
  dispatch(corpus_in.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> queries = matrix<T>(queries_dense), corpus = matrix<T>(corpus_dense);
    const RowScales scales(queries);
    const bool few = count <= kFewQueries;
    const int64_t stride = round_up(d, kWidth);
    Buffer widened(few ? count * stride : 0);
    if (few) pack_rows<false>(queries, scales.power(), nullptr, widened.get(), stride);
    const Division division(count, rows, k);
    const int64_t panels = ceil_div(count, kPanel), groups = division.groups, stripes = division.stripes;
    auto group_begin = [&](int64_t group) { return std::min(panels * group / groups * kPanel, count); };
    std::vector<std::vector<std::unique_ptr<Candidates>>> found(groups);
    for (auto& of_group : found) of_group.resize(stripes);
    const int64_t cost = product_cost(few ? count : round_up(count, kPanel), rows, d) + rows * d * sizeof(T) / 32;
    parallel(groups * stripes, cost, [&](int64_t unit) {
      const int64_t group = unit % groups, stripe = unit / groups;
      const int64_t q = group_begin(group), size = group_begin(group + 1) - q;
      const int64_t first = rows * stripe / stripes, last = rows * (stripe + 1) / stripes;
      auto best = std::make_unique<Candidates>(size, k, last - first);
      if (few) {
        search_few<T>(widened.get(), stride, scales.from(q), size, corpus, first, last, *best);
      } else {
        search_many<T>({queries.row(q), size, d, queries.stride}, scales.from(q), corpus, first, last, *best);
      }
      found[group][stripe] = std::move(best);
    });
    constexpr int64_t kStreams = 16;
    parallel(ceil_div(count, kStreams), count * k * stripes * 20, [&](int64_t unit) {
      std::vector<uint64_t> keys;
      int64_t group = 0;
      for (int64_t q = unit * kStreams; q < std::min((unit + 1) * kStreams, count); ++q) {
        while (q >= group_begin(group + 1)) ++group;
        write_best(found[group], q - group_begin(group), k, keys, data<float>(scores) + q * k,
                   data<int64_t>(indices) + q * k);
      }
    });
  });
  return {scores, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def("cosine_topk(Tensor queries, Tensor corpus, int k) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) { m.impl("cosine_topk", TORCH_BOX(&cosine_topk)); }

}  // namespace triton_st
