// linear.h by AMX's tiles: bf16 is multiplied as it is, fp32 as three parts. Operands are packed chunk by chunk of 16
// pairs, with zeros to the end, so that no tile is ragged.
#pragma once

#include "amx.h"
#include "operand.h"

#if defined(TRITON_ST_AMX)

namespace triton_st {

// Parts of an operand of type C.
template <class C>
inline constexpr int kTileParts = std::is_same_v<C, BFloat16> ? 1 : 3;

// Chunks of 16 lanes, pairs, that `depth` steps take, zeros included.
inline int64_t tile_chunks(int64_t depth) { return ceil_div(depth, 2 * kAmxLanes); }

// Lanes of a chunk of a right operand.
template <int kParts>
inline constexpr int64_t right_lanes = kParts * kAmxLanes * kPanel;

// Part by part, as pairs: lane i = (low[2 i], low[2 i + 1]), then those of `high`; or lane i = (first[i], second[i]).
template <int kParts, class F>
inline void for_adjacent_parts(Vec low, Vec high, F&& f) {
  for (int part = 0; part < kParts; ++part) f(part, kParts == 1 ? pair_adjacent(low, high) : take_part(low, high));
}
template <int kParts, class F>
inline void for_parts_across(Vec first, Vec second, F&& f) {
  for (int part = 0; part < kParts; ++part) {
    f(part, kParts == 1 ? pair_across(first, second) : take_part_across(first, second));
  }
}

template <class S>
inline Vec load_of_row(Matrix<const S> source, int64_t row, int64_t column) {
  return row < source.rows ? load_some(source.row(row) + column, source.cols - column) : Vec{};
}

// Right operand whose steps are the rows of `source`: columns [column, column + kPanel), [chunks][kParts][16][kPanel].
template <int kParts, class S>
void pack_right(Matrix<const S> source, int64_t column, float* out) {
  for (int64_t chunk = 0; chunk < tile_chunks(source.rows); ++chunk, out += right_lanes<kParts>) {
    for (int64_t pair = 0; pair < kAmxLanes; ++pair) {
      const int64_t row = 2 * (chunk * kAmxLanes + pair);
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        for_parts_across<kParts>(
            load_of_row(source, row, column + v), load_of_row(source, row + 1, column + v),
            [&](int part, Vec pairs) { store(out + (part * kAmxLanes + pair) * kPanel + v, pairs); });
      }
    }
  }
}

// The same of at most kPanel rows, which become columns.
template <int kParts, class S>
void pack_right_transposed(Matrix<const S> source, float* out) {
  for (int64_t chunk = 0; chunk < tile_chunks(source.cols); ++chunk, out += right_lanes<kParts>) {
    for (int64_t v = 0; v < kPanel; v += kWidth) {
      Vec squares[kParts][kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t column = chunk * 2 * kAmxLanes;
        for_adjacent_parts<kParts>(load_of_row(source, v + i, column), load_of_row(source, v + i, column + kWidth),
                                   [&](int part, Vec pairs) { squares[part][i] = pairs; });
      }
      for (int part = 0; part < kParts; ++part) {
        transpose(squares[part]);
        for (int64_t i = 0; i < kWidth; ++i) store(out + (part * kAmxLanes + i) * kPanel + v, squares[part][i]);
      }
    }
  }
}

// A left operand in memory of this thread, with room for whole groups of rows; rows past the last are anything.
struct LeftTiles {
  float* lanes;
  int64_t stride, part_stride, chunks;

  LeftTiles(int64_t rows, int64_t depth, int parts)
      : stride(parts * tile_chunks(depth) * kAmxLanes + kAmxLanes),
        part_stride(tile_chunks(depth) * kAmxLanes),
        chunks(tile_chunks(depth)) {
    lanes = product_scratch.left.reserve(round_up(rows, kAmxBlock) * stride);
  }
};

template <int kParts, class S>
LeftTiles pack_left(Matrix<const S> source) {
  const LeftTiles left(source.rows, source.cols, kParts);
  for (int64_t r = 0; r < source.rows; ++r) {
    for (int64_t chunk = 0; chunk < left.chunks; ++chunk) {
      float* out = left.lanes + r * left.stride + chunk * kAmxLanes;
      const int64_t column = chunk * 2 * kAmxLanes;
      for_adjacent_parts<kParts>(load_of_row(source, r, column), load_of_row(source, r, column + kWidth),
                                 [&](int part, Vec pairs) { store(out + part * left.part_stride, pairs); });
    }
  }
  return left;
}

// The same of the transpose of `source`.
template <int kParts, class S>
LeftTiles pack_left_transposed(Matrix<const S> source) {
  const LeftTiles left(source.cols, source.rows, kParts);
  for (int64_t chunk = 0; chunk < left.chunks; ++chunk) {
    for (int64_t column = 0; column < source.cols; column += kWidth) {
      Vec squares[kParts][kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t row = 2 * (chunk * kAmxLanes + i);
        Vec first = load_of_row(source, row, column), second = load_of_row(source, row + 1, column);
        for_parts_across<kParts>(first, second, [&](int part, Vec pairs) { squares[part][i] = pairs; });
      }
      for (int part = 0; part < kParts; ++part) {
        transpose(squares[part]);
        float* out = left.lanes + column * left.stride + part * left.part_stride + chunk * kAmxLanes;
        for (int64_t i = 0; i < kWidth; ++i) store(out + i * left.stride, squares[part][i]);
      }
    }
  }
  return left;
}

// sums[rows][kPanel], up to a multiple of kAmxRows rows, = rows of `left` from `row` on times a panel.
template <int kParts>
inline void multiply_group(const LeftTiles& left, int64_t row, int64_t rows, const float* panel, float* sums) {
  const float* a = left.lanes + row * left.stride;
  const auto nothing = [](int64_t) {};
  auto* vectors = reinterpret_cast<Vec*>(sums);
  if (rows > kAmxRows) {
    multiply_tiles<Vec, kParts, true>(a, left.stride, left.part_stride, panel, left.chunks, vectors, nothing);
  } else {
    multiply_tiles<Vec, kParts, false>(a, left.stride, left.part_stride, panel, left.chunks, vectors, nothing);
  }
}

// A weight [N, K] as the right operand of products: of x · Wᵀ (forward) or of y · W (backward).
template <class C>
class PackedWeight {
 public:
  // The right operand of x · Wᵀ, x [M, K].
  void transposed(Matrix<const float> weight) { reserve(weight.cols, weight.rows), forward_ = true, weight_ = weight; }
  // The right operand of y · W, y [M, N].
  void plain(Matrix<const float> weight) { reserve(weight.rows, weight.cols), forward_ = false, weight_ = weight; }

  int64_t panels() const { return ceil_div(columns_, kPanel); }
  int64_t panel_lanes() const { return panel_lanes_; }
  const float* panel(int64_t p) const { return memory_.get() + p * panel_lanes_; }

  void pack_panel(int64_t p) {
    const int64_t first = p * kPanel, count = std::min<int64_t>(kPanel, columns_ - first);
    float* out = memory_.get() + p * panel_lanes_;
    if (forward_) {
      pack_right_transposed<kTileParts<C>, float>({weight_.row(first), count, weight_.cols, weight_.stride}, out);
    } else {
      pack_right<kTileParts<C>>(weight_, first, out);
    }
  }

 private:
  void reserve(int64_t depth, int64_t columns) {
    panel_lanes_ = tile_chunks(depth) * right_lanes<kTileParts<C>>;
    columns_ = columns;
    memory_.reserve(panels() * panel_lanes_);
  }

  Buffer memory_;
  Matrix<const float> weight_{};
  int64_t panel_lanes_ = 0, columns_ = 0;
  bool forward_ = true;
};

// Products of the rows of x with a packed weight, kPanel columns at a time: epilogue(column, strip) finds the result of
// row r and column + c at strip[r · kPanel + c].
template <class C, class Epilogue>
void multiply(Matrix<const C> x, const PackedWeight<C>& weight, Buffer& strip_memory, Epilogue&& epilogue) {
  const AmxTiles tiles;
  const LeftTiles left = pack_left<kTileParts<C>>(x);
  float* strip = strip_memory.reserve(round_up(x.rows, kAmxBlock) * kPanel);
  for (int64_t p = 0; p < weight.panels(); ++p) {
    for (int64_t row = 0; row < x.rows; row += kAmxBlock) {
      multiply_group<kTileParts<C>>(left, row, x.rows - row, weight.panel(p), strip + row * kPanel);
    }
    epilogue(p * kPanel, strip);
  }
}

// sums[N, round_up(K, kPanel)] = (or, onto them, +=) dᵀ · x, the rows of d [M, N] and of x [M, K] being the steps: a
// weight's gradient. At most kBlockDepth rows are summed in one run.
template <class C, class S>
void accumulate_outer(Matrix<const C> d, Matrix<const S> x, float* sums, int64_t sums_stride, bool onto) {
  constexpr int kParts = kTileParts<C>;
  const AmxTiles tiles;
  const int64_t panels = ceil_div(x.cols, kPanel);
  alignas(64) float block[kAmxBlock * kPanel];
  for (int64_t k = 0; k < d.rows; k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, d.rows - k), panel_lanes = tile_chunks(depth) * right_lanes<kParts>;
    const LeftTiles left = pack_left_transposed<kParts, C>({d.row(k), depth, d.cols, d.stride});
    float* right = product_scratch.right.reserve(panels * panel_lanes);
    for (int64_t p = 0; p < panels; ++p) {
      pack_right<kParts, S>({x.row(k), depth, x.cols, x.stride}, p * kPanel, right + p * panel_lanes);
    }
    for (int64_t row = 0; row < d.cols; row += kAmxBlock) {
      const int64_t rows = std::min<int64_t>(kAmxBlock, d.cols - row);
      for (int64_t p = 0; p < panels; ++p) {
        multiply_group<kParts>(left, row, rows, right + p * panel_lanes, block);
        for (int64_t i = 0; i < rows * kPanel; i += kWidth) {
          float* to = sums + (row + i / kPanel) * sums_stride + p * kPanel + i % kPanel;
          const Vec sum = load(block + i);
          store(to, onto || k > 0 ? load(to) + sum : sum);
        }
      }
    }
  }
}

}  // namespace triton_st

#endif
