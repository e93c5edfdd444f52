// What the contrastive loss is computed from: pools of candidates with the scales of their prefixes, the blocks of
// similarities that its directions need, and the options. `triton_st/reference/mnrl_rows.py` says what it all means.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "gemm.h"
#include "normalize.h"
#include "tensor.h"

namespace triton_st::mnrl {

enum Direction { kQueryToDoc = 1, kQueryToQuery = 2, kDocToQuery = 4, kDocToDoc = 8 };
enum Hardness { kNone = 0, kInBatchNegatives = 1, kHardNegatives = 2, kAllNegatives = 3 };
enum Side { kQuery = 0, kPositive = 1 };        // which row of a pair is compared with the candidates
enum Pool { kDocuments = 0, kAllQueries = 1 };  // which rows are the candidates

struct Options {
  int64_t offset;
  bool normalized, joint, relative_margin, gradients, diagnostics;
  int directions, hardness_mode;
  float hardness_strength;
  std::optional<float> margin;
};

// The columns between one prefix and the next. Each is packed by itself, so that the products of a prefix are those of
// the one before plus one range's.
struct Range {
  int64_t begin, width;
  int64_t steps;         // lanes of a row
  int64_t first_step;    // of the ranges before
  int64_t panels;        // kPanel columns each
  int64_t first_panel;
};

template <bool kPaired>
std::vector<Range> ranges_of(const std::vector<int64_t>& dims) {
  std::vector<Range> ranges;
  int64_t begin = 0, step = 0, panel = 0;
  for (const int64_t end : dims) {
    ranges.push_back({begin, end - begin, lanes<kPaired>(end - begin), step, ceil_div(end - begin, kPanel), panel});
    begin = end;
    step += ranges.back().steps;
    panel += ranges.back().panels;
  }
  return ranges;
}

// Rows' scales as in normalize.h for each prefix. One power of two per row serves all its prefixes; their inverses and
// divisors refer to row · power. Without normalisation all are 1.
class PrefixScales {
 public:
  template <class T>
  PrefixScales(Matrix<const T> x, const std::vector<int64_t>& dims, bool normalized)
      : stride_(round_up(x.rows, kWidth) + 4 * kWidth), prefixes_(dims.size()),
        memory_((1 + 2 * prefixes_) * stride_) {
    constexpr int64_t kGroup = 16;
    std::atomic<bool> unscaled{true};
    parallel(ceil_div(x.rows, kGroup), normalized ? x.rows * (20 + x.cols / 16) : x.rows, [&](int64_t unit) {
      for (int64_t i = unit * kGroup; i < std::min((unit + 1) * kGroup, x.rows); ++i) {
        RowScale whole{1.f, 1.f, 1.f};
        if (normalized) whole = row_scale(x.row(i), dims.back());
        memory_.get()[i] = whole.power;
        if (whole.power != 1.f) unscaled.store(false, std::memory_order_relaxed);
        for (int64_t k = 0; k < prefixes_; ++k) {
          RowScale scale = whole;
          if (normalized && k + 1 < prefixes_) {
            scale = row_scale(x.row(i), dims[k]);
            scale.divisor *= whole.power / scale.power;
            scale.inverse *= scale.power / whole.power;
          }
          array(1 + 2 * k)[i] = scale.inverse;
          array(2 + 2 * k)[i] = scale.divisor;
        }
      }
    });
    for (int64_t kind = 0; kind < 1 + 2 * prefixes_; ++kind) {
      std::fill(array(kind) + x.rows, array(kind) + stride_, 0.f);
    }
    unscaled_ = unscaled.load();
  }

  const float* power() const { return memory_.get(); }
  const float* inverse(int64_t prefix) const { return array(1 + 2 * prefix); }
  const float* divisor(int64_t prefix) const { return array(2 + 2 * prefix); }
  bool unscaled() const { return unscaled_; }  // all powers are 1
  RowScale at(int64_t prefix, int64_t i) const { return {power()[i], inverse(prefix)[i], divisor(prefix)[i]}; }

 private:
  float* array(int64_t kind) const { return memory_.get() + kind * stride_; }
  int64_t stride_, prefixes_;
  Buffer memory_;
  bool unscaled_ = true;
};

// Rows that are candidates, and their two ids if there are any. A candidate is left out where its first is one of the
// row's two, or its second is one of them (the row's query's for documents, its positive's for queries).
template <class T>
struct Candidates {
  Matrix<const T> x;
  const PrefixScales* scales;
  const int32_t *first_id = nullptr, *second_id = nullptr;
};

inline constexpr int64_t kStripRows = 64;   // candidates whose exponentials have one maximum
inline constexpr int64_t kBlockStrips = 4;  // strips whose coefficients are multiplied at a time

// One direction: which side of the pairs is compared with which pool.
struct Segment {
  Direction direction;
  Side side;
  Pool pool;
  int group;                    // which softmax it belongs to
  int64_t rows, strips;         // candidates
  int64_t first_row, first_strip;  // of the segments before
  int64_t strip_begin(int64_t strip) const { return rows * strip / strips; }
};

inline std::vector<Segment> segments_of(const Options& options, int64_t documents, int64_t all_queries) {
  static constexpr Segment kAll[] = {{kQueryToDoc, kQuery, kDocuments, 0, 0, 0, 0, 0},
                                     {kQueryToQuery, kQuery, kAllQueries, 0, 0, 0, 0, 0},
                                     {kDocToQuery, kPositive, kAllQueries, 0, 0, 0, 0, 0},
                                     {kDocToDoc, kPositive, kDocuments, 0, 0, 0, 0, 0}};
  std::vector<Segment> chosen;
  int64_t row = 0, strip = 0;
  for (Segment segment : kAll) {
    if (!(options.directions & segment.direction)) continue;
    segment.group = options.joint ? 0 : static_cast<int>(chosen.size());
    segment.rows = segment.pool == kDocuments ? documents : all_queries;
    segment.strips = ceil_div(segment.rows, kStripRows);
    segment.first_row = row;
    segment.first_strip = strip;
    row += segment.rows;
    strip += segment.strips;
    chosen.push_back(segment);
  }
  return chosen;
}

// Numbers 0, 1, 2 … in place of arbitrary int64 ids: 32 bits compare twice as fast. Open addressing.
class DenseIds {
 public:
  explicit DenseIds(int64_t most_ids) {
    int64_t capacity = 16;
    while (capacity < 2 * most_ids) capacity *= 2;
    keys_.resize(capacity);
    numbers_.assign(capacity, -1);
  }

  std::vector<int32_t> of(const Tensor& tensor) {
    const int64_t n = tensor.size(0), *ids = static_cast<const int64_t*>(tensor.const_data_ptr());
    std::vector<int32_t> result(n);
    const uint64_t mask = keys_.size() - 1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = ids[i];
      uint64_t slot = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
      slot = (slot ^ (slot >> 32)) & mask;
      while (numbers_[slot] >= 0 && keys_[slot] != id) slot = (slot + 1) & mask;
      if (numbers_[slot] < 0) {
        keys_[slot] = id;
        numbers_[slot] = next_++;
      }
      result[i] = numbers_[slot];
    }
    return result;
  }

 private:
  std::vector<int64_t> keys_;
  std::vector<int32_t> numbers_;
  int32_t next_ = 0;
};

// All that the passes share.
template <class T>
struct Problem {
  Options options;
  std::vector<int64_t> dims;
  std::vector<float> dim_weights;
  std::vector<Range> ranges;
  std::vector<Segment> segments;
  Matrix<const T> queries;         // [B, D]
  const PrefixScales* query_scales;
  Candidates<T> documents;         // [M, D]
  Candidates<T> all_queries;       // [W, D]
  int64_t owners = 0;              // W: document j belongs to query j mod W
  const int64_t* targets = nullptr;  // [B], or null: offset + i
  const float* scale = nullptr;    // [B]
  const float* weights = nullptr;  // [B]
  std::vector<int32_t> query_ids, target_ids;

  int64_t prefixes() const { return static_cast<int64_t>(dims.size()); }
  int groups() const { return segments.back().group + 1; }
  // How often the positive pair itself stands in one softmax.
  float multiplicity() const { return options.joint && (options.directions & kDocToQuery) ? 2.f : 1.f; }
  int64_t target(int64_t i) const { return targets ? targets[i] : options.offset + i; }
  const Candidates<T>& pool(Pool which) const { return which == kDocuments ? documents : all_queries; }
  bool has_side(Side side) const {
    for (const Segment& segment : segments) {
      if (segment.side == side) return true;
    }
    return false;
  }
};

}  // namespace triton_st::mnrl
