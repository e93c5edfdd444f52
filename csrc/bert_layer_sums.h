// How a layer's backward pass sums the gradients of parameters: per unit of sequences, or, the weights of a wide layer,
// as products over tokens, block by block. Neither depends on the threads.
#pragma once

#include <array>
#include <vector>

#include "bert_layer.h"
#include "linear.h"

namespace triton_st {

inline constexpr int64_t kMostUnitWeights = 256 << 10;  // elements of weights that are summed per unit
inline constexpr int64_t kUnits = 16;
inline constexpr int64_t kWideTokens = 2048;  // whose operands a wide layer holds at a time
inline constexpr int64_t kBlockColumns = 384;

// Where each parameter's gradient is in a unit's sums: rows padded to whole panels, and [K, N] for the weights of qkv
// and up, so that the longer side is the one made of vectors. A wide layer's weights are absent.
struct SumsLayout {
  SumsLayout(const LayerSizes& sizes, bool weights) {
    const int64_t d = sizes.hidden, inner = sizes.inner;
    for (int p = 0; p < kParameters; ++p) {
      matrix[p] = p == kQkvWeight || p == kProjectionWeight || p == kUpWeight || p == kDownWeight;
      const bool by_inner = p == kUpWeight || p == kUpBias || p == kDownWeight;
      cols[p] = by_inner ? inner : p == kQkvWeight || p == kQkvBias ? 3 * d : d;
      rows[p] = matrix[p] ? d : 1;
    }
    for (const bool matrices : {false, true}) {
      for (int p = 0; p < kParameters; ++p) {
        if (matrix[p] != matrices || (matrices && !weights)) continue;
        at[p] = floats;
        floats += rows[p] * stride(p);
      }
      if (!matrices) vectors = floats;
    }
  }

  int64_t stride(int p) const { return round_up(cols[p], kPanel); }

  std::array<bool, kParameters> matrix{};
  std::array<int64_t, kParameters> rows{}, cols{}, at{};
  int64_t vectors = 0, floats = 0;
};

// Operands of a wide layer's weight gradients, of tokens from `begin` on.
template <class C>
struct WideOperands {
  int64_t begin = 0;
  Matrix<C> d_output{}, d_inner{}, inner{}, d_projected{}, hidden{}, d_qkv{};
};

template <class X>
Matrix<X> rows_of(Matrix<X> x, int64_t row, int64_t rows) {
  return {x.row(row), rows, x.cols, x.stride};
}
template <class X>
Matrix<const X> read_only(Matrix<X> x) {
  return {x.data, x.rows, x.cols, x.stride};
}

// Runs of chunks [first, last) with sums of their own.
struct Unit {
  int64_t first, last;
};

inline std::vector<Unit> units_of(const std::vector<Chunk>& chunks, int64_t tokens, bool wide) {
  std::vector<Unit> units;
  const int64_t count = static_cast<int64_t>(chunks.size()), share = wide ? 1 : ceil_div(tokens, kUnits);
  for (int64_t c = 0; c < count;) {
    const int64_t first = c;
    for (int64_t total = 0; c < count && total < share; ++c) total += chunks[c].tokens();
    units.push_back({first, c});
  }
  return units;
}

// sums[0 … floats) of the first unit becomes the sum of all units'; there is at least one.
inline void add_units(float* sums, int64_t units, int64_t floats, int64_t stride) {
  constexpr int64_t kPart = 64 * kPanel;
  parallel(ceil_div(floats, kPart), floats * units / 16, [&](int64_t part) {
    for (int64_t i = part * kPart; i < std::min((part + 1) * kPart, floats); i += kWidth) {
      Vec total = load(sums + i);
      for (int64_t u = 1; u < units; ++u) total += load(sums + u * stride + i);
      store(sums + i, total);
    }
  });
}

// A block of a wide layer's weight gradient.
struct Block {
  Parameter weight;
  int64_t row, rows, col, cols;
};

inline std::vector<Block> blocks_of(const LayerSizes& sizes) {
  std::vector<Block> blocks;
  const int64_t d = sizes.hidden, inner = sizes.inner;
  const auto add = [&](Parameter weight, int64_t n, int64_t k) {
    for (int64_t row = 0; row < n; row += kBlockRows) {
      for (int64_t col = 0; col < k; col += kBlockColumns) {
        blocks.push_back({weight, row, std::min(kBlockRows, n - row), col, std::min(kBlockColumns, k - col)});
      }
    }
  };
  add(kUpWeight, inner, d), add(kDownWeight, d, inner), add(kQkvWeight, 3 * d, d), add(kProjectionWeight, d, d);
  return blocks;
}

// A block of out[N, K] = (or, onto it, +=) dᵀ · x.
template <class C, class S>
void block_product(const Block& block, Matrix<const C> d, Matrix<const S> x, float* out, bool onto) {
  thread_local Buffer memory;
  const int64_t width = round_up(block.cols, kPanel);
  float* sums = memory.reserve(block.rows * width);
  accumulate_outer<C, S>({d.data + block.row, d.rows, block.rows, d.stride},
                         {x.data + block.col, x.rows, block.cols, x.stride}, sums, width, false);
  for (int64_t r = 0; r < block.rows; ++r) {
    float* to = out + (block.row + r) * x.cols + block.col;
    for (int64_t i = 0; i < block.cols; i += kWidth) {
      const int64_t n = block.cols - i;
      const Vec total = load(sums + r * width + i);
      store_some(to + i, onto ? total + load_some(to + i, n) : total, n);
    }
  }
}

}  // namespace triton_st
