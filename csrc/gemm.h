// Matrix products of our own: a register tile, and what packs its operands. Sums are fp32 and their order is a matter
// of the shapes alone, never of the number of threads or of where a block begins.
//
// Operands are packed into 32-bit lanes. A lane holds one fp32 and is one step of the inner dimension; or, where the
// processor multiplies bf16, a pair of adjacent bf16 and is two (kPairs). fp16 is widened while it is packed. So is bf16
// on processors with AMX: their vectors multiply pairs at half the rate of fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "amx.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

#if defined(TRITON_ST_AVX512)
inline constexpr int kTileRows = 14;  // 28 sums, 2 vectors of the right operand, 1 of the left: 31 of 32 registers
#else
inline constexpr int kTileRows = 6;  // 12, 2 and 1: 15 of 16 registers
#endif
inline constexpr int kPanel = 2 * kWidth;  // columns of a tile, and of a panel of the right operand
#if defined(TRITON_ST_AMX)
static_assert(kPanel == kAmxBlock && kWidth == kAmxLanes, "AMX's tiles read panels as they lie");
#endif

#if defined(TRITON_ST_BF16_DOT)
template <class T>
inline constexpr bool kPairs = std::is_same_v<T, BFloat16> && !kAmx;
#else
template <class T>
inline constexpr bool kPairs = false;
#endif

// Lanes that hold `depth` steps of the inner dimension.
template <bool kPaired>
constexpr int64_t lanes(int64_t depth) {
  return kPaired ? (depth + 1) / 2 : depth;
}

// --- the register tile ---

template <bool kPaired>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(TRITON_ST_BF16_DOT)
  if constexpr (kPaired) return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  return fma(a, b, c);
}

inline Vec broadcast(const float* lane) {
#if defined(TRITON_ST_AVX512)
  return _mm512_set1_ps(*lane);
#elif defined(TRITON_ST_AVX2)
  return _mm256_broadcast_ss(lane);
#else
  return splat(*lane);
#endif
}

// c[kRows, kPanel] = (or, onto it, +=) a[kRows, steps] · panel[steps, kPanel]. The steps are summed from zero and then
// added: long inner dimensions are summed block by block, which loses far fewer digits than one running sum.
// Lane (row, step) of a is at row · stride + step, or, kDepthMajor, at step · stride + row; step k of the panel is at
// k · panel_stride.
template <bool kPaired, bool kDepthMajor, int kRows>
void tile(const float* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t steps, float* c,
          int64_t c_stride, bool onto) {
  Vec sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = Vec{};
    sums[r][1] = Vec{};
  }
  // Rows are reached from every third one: x86 adds 0, 1 or 2 strides for nothing, and so few pointers fit registers.
  const float* third[(kRows + 2) / 3];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r += 3) third[r / 3] = kDepthMajor ? a + r : a + r * a_stride;
  for (int64_t step = 0; step < steps; ++step) {
    const Vec b0 = load(panel), b1 = load(panel + kWidth);
    panel += panel_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(third[r / 3] + (kDepthMajor ? r % 3 : r % 3 * a_stride));
      sums[r][0] = multiply_add<kPaired>(x, b0, sums[r][0]);
      sums[r][1] = multiply_add<kPaired>(x, b1, sums[r][1]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r += 3) third[r / 3] += kDepthMajor ? a_stride : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* row = c + r * c_stride;
    store(row, onto ? load(row) + sums[r][0] : sums[r][0]);
    store(row + kWidth, onto ? load(row + kWidth) + sums[r][1] : sums[r][1]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);

// The tile of `rows` ≤ kTileRows rows.
template <bool kPaired, bool kDepthMajor>
Tile tile_of(int64_t rows) {
  static constexpr auto table = []<int... kRows>(std::integer_sequence<int, kRows...>) {
    return std::array<Tile, kTileRows>{&tile<kPaired, kDepthMajor, kRows + 1>...};
  }(std::make_integer_sequence<int, kTileRows>());
  return table[rows - 1];
}

// Calls f(first, count) for groups of at most kTileRows rows, as even as can be: a last group of one or two rows would
// leave the multipliers waiting for each other.
template <class F>
void for_row_groups(int64_t rows, F&& f) {
  const int64_t groups = ceil_div(rows, kTileRows);
  for (int64_t g = 0; g < groups; ++g) f(rows * g / groups, rows * (g + 1) / groups - rows * g / groups);
}

// --- packing ---

// Up to kWidth elements: p[0 … n) and zeros, n of any size or sign.
template <class S>
inline Vec load_some(const S* p, int64_t n) {
  if (n >= kWidth) return load(p);
  return n > 0 ? load(p, static_cast<int>(n)) : Vec{};
}

// The first n of kWidth elements, n of any size or sign.
template <class S>
inline void store_some(S* p, Vec x, int64_t n) {
  if (n >= kWidth) return store(p, x);
  if (n > 0) store(p, x, static_cast<int>(n));
}

// kWidth lanes of the row at p, of which n elements remain, times `factor`.
template <bool kPaired, class S>
inline Vec row_lanes(const S* p, int64_t n, Vec factor) {
  if constexpr (kPaired) {
    return pair_adjacent(load_some(p, n) * factor, load_some(p + kWidth, n - kWidth) * factor);
  } else {
    return load_some(p, n) * factor;
  }
}

// Left operand by rows: `rows` of `depth` elements to lanes [rows, stride], each row times its factor, each column
// times its own; null stands for ones. Writes round_up(lanes, kWidth) of each row.
template <bool kPaired, class S>
void pack_rows(Matrix<const S> source, const float* row_factors, const float* column_factors, float* out,
               int64_t stride) {
  constexpr int64_t kElements = kPaired ? 2 * kWidth : kWidth;
  for (int64_t r = 0; r < source.rows; ++r, out += stride) {
    const S* p = source.row(r);
    const Vec factor = splat(row_factors ? row_factors[r] : 1.f);
    float* lane = out;
    for (int64_t k = 0; k < source.cols; k += kElements, lane += kWidth) {
      const int64_t n = source.cols - k;
      if (!column_factors) {
        store(lane, row_lanes<kPaired>(p + k, n, factor));
        continue;
      }
      const Vec low = load_some(p + k, n) * load_some(column_factors + k, n);
      if constexpr (kPaired) {
        const int64_t m = n - kWidth;
        const Vec high = load_some(p + k + kWidth, m) * load_some(column_factors + k + kWidth, m);
        store(lane, pair_adjacent(low, high));
      } else {
        store(lane, low);
      }
    }
  }
}

// Either operand where the inner dimension runs down the rows of `source`: lane (step, column) goes to
// out[column / kPanel · panel_stride + step · step_stride + column % kPanel]; row k is multiplied by factors[k], null
// standing for ones. Columns are filled up to a multiple of kPanel with zeros.
template <bool kPaired, class S>
void pack_depth(Matrix<const S> source, const float* factors, float* out, int64_t panel_stride, int64_t step_stride) {
  constexpr int kRows = kPaired ? 2 : 1;
  const int64_t width = round_up(source.cols, kPanel);
  for (int64_t k = 0; k < source.rows; k += kRows, out += step_stride) {
    const S* p = source.row(k);
    const Vec factor = splat(factors ? factors[k] : 1.f);
    const bool last = k + 1 == source.rows;
    const S* q = last || kRows == 1 ? p : source.row(k + 1);
    const Vec second_factor = splat(last || kRows == 1 ? 0.f : factors ? factors[k + 1] : 1.f);
    for (int64_t column = 0; column < width; column += kWidth) {
      const int64_t n = source.cols - column;
      Vec x = load_some(p + column, n) * factor;
      if constexpr (kPaired) x = pair_across(x, last ? Vec{} : load_some(q + column, n) * second_factor);
      store(out + column / kPanel * panel_stride + column % kPanel, x);
    }
  }
}

// Right operand of a product with the transpose of `source`: its rows become columns. Lane (step, row) goes to
// out[row / kPanel · steps · kPanel + step · kPanel + row % kPanel]; each row is multiplied by its factor.
template <bool kPaired, class S>
void pack_transposed(Matrix<const S> source, const float* factors, float* out) {
  const int64_t steps = lanes<kPaired>(source.cols), height = round_up(source.rows, kPanel);
  for (int64_t row = 0; row < height; row += kWidth) {
    float* column = out + row / kPanel * steps * kPanel + row % kPanel;
    for (int64_t step = 0; step < steps; step += kWidth) {
      const int64_t k = kPaired ? 2 * step : step;
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        square[i] = row + i < source.rows
                        ? row_lanes<kPaired>(source.row(row + i) + k, source.cols - k, splat(factors[row + i]))
                        : Vec{};
      }
      transpose(square);
      const int64_t n = std::min<int64_t>(kWidth, steps - step);
      for (int64_t i = 0; i < n; ++i) store(column + (step + i) * kPanel, square[i]);
    }
  }
}

// --- products ---

// Memory of one thread for packed operands and a block of results.
struct ProductScratch {
  Buffer left, right, block;
};
inline thread_local ProductScratch product_scratch;

// Steps of a score's inner dimension that are summed one after the other. In one run of 1,024 the error is four times
// that of a good library's product; in parts it is no larger, for 2 % of the time.
inline constexpr int64_t kSumSteps = 128;

// Columns of scores computed at a time: their packed operand stays in the second-level cache.
inline constexpr int64_t kScoreColumns = 256;

// Raw products of rows [first_row, first_row + row_count) of a, times their power of two, with `columns` ≤ kScoreColumns
// columns that pack_transposed packed, a few rows at a time: consume(i, products) gets those of row i, products[j] being
// with column j.
template <class T, class Consume>
void score_rows(Matrix<const T> a, const float* a_power, bool a_unscaled, int64_t first_row, int64_t row_count,
                const float* right, int64_t columns, Consume&& consume) {
  constexpr bool kPaired = kPairs<T>;
  const int64_t steps = lanes<kPaired>(a.cols), panels = ceil_div(columns, kPanel);
  const int64_t parts = std::max<int64_t>(ceil_div(steps, kSumSteps), 1);
  float* block = product_scratch.block.reserve(kTileRows * kScoreColumns);
  // Rows that are lanes as they lie in memory need no packing.
  constexpr bool kLanesInMemory = kPaired || std::is_same_v<T, float>;
  constexpr int64_t kElements = kPaired ? 2 : 1;
  const bool direct = kLanesInMemory && a_unscaled && a.stride % kElements == 0 && a.cols % kElements == 0;
  const int64_t packed_stride = round_up(steps, kWidth) + 16;  // no multiple of the cache's period
  float* packed = direct ? nullptr : product_scratch.left.reserve(kTileRows * packed_stride);
  for_row_groups(row_count, [&](int64_t group, int64_t count) {
    const int64_t row = first_row + group;
    const T* rows = a.row(row);
    const float* left = reinterpret_cast<const float*>(rows);
    int64_t stride = a.stride / kElements;
    if (!direct) {
      pack_rows<kPaired, T>({rows, count, a.cols, a.stride}, a_power + row, nullptr, packed, packed_stride);
      left = packed;
      stride = packed_stride;
    }
    const Tile multiply = tile_of<kPaired, false>(count);
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = right + p * kPanel * steps;
      for (int64_t k = 0; k < parts; ++k) {
        const int64_t step = steps * k / parts, count = steps * (k + 1) / parts - step;
        multiply(left + step, stride, panel + step * kPanel, kPanel, count, block + p * kPanel, kScoreColumns, k > 0);
      }
    }
    for (int64_t r = 0; r < count; ++r) consume(row + r, block + r * kScoreColumns);
  });
}

// The same with the rows of b (b.rows ≤ kScoreColumns), times their power of two, for columns.
template <class T, class Consume>
void score_block(Matrix<const T> a, const float* a_power, bool a_unscaled, int64_t first_row, int64_t row_count,
                 Matrix<const T> b, const float* b_power, Consume&& consume) {
  float* right = product_scratch.right.reserve(round_up(b.rows, kPanel) * lanes<kPairs<T>>(b.cols));
  pack_transposed<kPairs<T>>(b, b_power, right);
  score_rows<T>(a, a_power, a_unscaled, first_row, row_count, right, b.rows, consume);
}

// Nanoseconds that the product of [m, k] and [k, n] takes, roughly.
inline int64_t product_cost(int64_t m, int64_t n, int64_t k) { return m * n * (k + kPanel) / (8 * kWidth); }

// How the scores of m rows with n others are divided among threads: in blocks of columns, and of rows too where there
// are few of those. Depends on the shapes alone.
struct ScoreBlocks {
  ScoreBlocks(int64_t m, int64_t n)
      : m(m),
        n(n),
        columns(std::min(kScoreColumns, std::max<int64_t>(round_up(ceil_div(n, 4), kPanel), 2 * kPanel))),
        column_blocks(ceil_div(n, columns)),
        row_blocks(std::min(ceil_div(16, std::max<int64_t>(column_blocks, 1)), ceil_div(m, 128))) {}

  // Calls consume(i, j, count, products) for each row i of a and each block of `count` rows of b from j on, on all
  // threads: products[c], which may be overwritten, is the raw product of row i with row j + c, both times their power
  // of two.
  template <class T, class Scales, class Consume>
  void for_each(Matrix<const T> a, const Scales& a_scales, Matrix<const T> b, const Scales& b_scales,
                Consume&& consume) const {
    parallel(column_blocks * row_blocks, product_cost(m, n, a.cols), [&](int64_t unit) {
      const int64_t j = unit % column_blocks * columns, count = std::min(columns, n - j), part = unit / column_blocks;
      const int64_t first = m * part / row_blocks, last = m * (part + 1) / row_blocks;
      score_block<T>(a, a_scales.power(), a_scales.unscaled(), first, last - first, {b.row(j), count, b.cols, b.stride},
                     b_scales.power() + j, [&](int64_t i, float* products) { consume(i, j, count, products); });
    });
  }

  int64_t m, n, columns, column_blocks, row_blocks;
};

// Rows of results and steps of the inner dimension that a thread works on at a time.
inline constexpr int64_t kBlockRows = 192;
inline constexpr int64_t kBlockDepth = 256;

// c[rows, round_up(b.cols, kPanel)] = (or, onto it, +=) left · b, the rows of b times their power of two.
// pack(k, depth, out, stride) packs steps [k, k + depth) of the left operand, of rows ≤ kBlockRows rows, by rows or
// (kDepthMajor) by steps.
template <class T, bool kDepthMajor, class Pack>
void accumulate(int64_t rows, Matrix<const T> b, const float* b_power, float* c, int64_t c_stride, bool onto,
                Pack&& pack) {
  constexpr bool kPaired = kPairs<T>;
  const int64_t panels = ceil_div(b.cols, kPanel);
  const int64_t most_steps = lanes<kPaired>(std::min(b.rows, kBlockDepth));
  const int64_t stride = kDepthMajor ? round_up(rows, kPanel) : round_up(most_steps, kWidth) + 16;
  float* left = product_scratch.left.reserve(stride * (kDepthMajor ? most_steps : rows));
  float* right = product_scratch.right.reserve(panels * kPanel * most_steps);
  for (int64_t k = 0; k < std::max<int64_t>(b.rows, 1); k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, b.rows - k), steps = lanes<kPaired>(depth);
    pack(k, depth, left, stride);
    pack_depth<kPaired, T>({b.row(k), depth, b.cols, b.stride}, b_power + k, right, steps * kPanel, kPanel);
    for (int64_t p = 0; p < panels; ++p) {
      for_row_groups(rows, [&](int64_t group, int64_t count) {
        tile_of<kPaired, kDepthMajor>(count)(left + group * (kDepthMajor ? 1 : stride), stride,
                                             right + p * kPanel * steps, kPanel, steps,
                                             c + group * c_stride + p * kPanel, c_stride, onto || k > 0);
      });
    }
  }
}

}  // namespace triton_st
