// The second pass over a block of loss rows: exponentials become coefficients, d loss / d similarity times both inverse
// norms, which are multiplied with the candidates and, transposed, with the rows, a few strips at a time. Inputs are
// multiplied as they are; the projections onto the unit sphere follow when all blocks are done.
#pragma once

#include <vector>

#include "mnrl_problem.h"
#include "mnrl_scores.h"

namespace triton_st::mnrl {

template <class T>
class Gradients {
 public:
  static constexpr bool kPaired = kPairs<T>;

  // grad_all_queries is grad_queries where the queries themselves are candidates, and null where no queries are.
  Gradients(const Problem<T>& problem, const RowBlock<T>& block, float* grad_queries, float* grad_documents,
            float* grad_all_queries)
      : p_(problem),
        block_(block),
        dim_(problem.dims.back()),
        stride_(block.stride()),
        grads_{grad_documents, grad_all_queries},
        grad_queries_(grad_queries),
        pair_weight_(problem.prefixes() * problem.queries.rows) {
    for (const Pool pool : {kDocuments, kAllQueries}) {
      for (const Segment& segment : problem.segments) {
        if (segment.pool == pool) segments_[pool].push_back(&segment);
      }
      if (segments_[pool].empty()) continue;
      units_[pool] = std::clamp<int64_t>(segments_[pool][0]->strips / 2, 1, kMostUnits);
      if (problem.prefixes() > 1) radial_[pool].assign(problem.prefixes() * problem.pool(pool).x.rows, 0.f);
    }
    partial_.reserve(2 * (units_[kDocuments] + units_[kAllQueries]) * dim_ * stride_);
    if (problem.prefixes() > 1) radial_query_.resize(problem.prefixes() * problem.queries.rows);
  }

  void add_block();  // of the rows whose scores the RowBlock holds
  void finish();

 private:
  static constexpr int64_t kMostUnits = 8;
  static constexpr int64_t kCandidates = kStripRows * kBlockStrips;

  struct Scratch {
    Buffer coefficients, left, across, candidates, corner;
  };
  static Scratch& scratch() {
    static thread_local Scratch mine;
    return mine;
  }

  // The other row of a row's own positive pair: its elements (null: there is no pair), its number among `scales`, and
  // the number of the pair.
  struct Pair {
    const T* x;
    const PrefixScales* scales;
    int64_t i, number;
  };

  void unit(Pool pool, int64_t number);
  void coefficients(const Segment& segment, int64_t strip, int64_t last_strip, int64_t prefix, float* out, bool onto);
  void multiply(const Segment& segment, int64_t j, int64_t rows, const Range& range, const float* coefficients,
                const float* candidates, int64_t candidate_stride, float* partial, bool partial_onto, bool onto);
  void add_side(Side side);
  template <class Radial>
  void finish_row(const T* x, const PrefixScales& scales, int64_t i, Radial&& radial, Pair pair, float* grad) const;
  void add_pairs_to_targets();

  // One unit's sums for one side of the rows, [dim, stride].
  float* partial_of(Side side, Pool pool, int64_t unit) const {
    const int64_t before = side * (units_[kDocuments] + units_[kAllQueries]);
    return partial_.get() + (before + (pool == kDocuments ? 0 : units_[kDocuments]) + unit) * dim_ * stride_;
  }

  const Problem<T>& p_;
  const RowBlock<T>& block_;
  const int64_t dim_, stride_;
  float* const grads_[2];
  float* const grad_queries_;
  std::vector<const Segment*> segments_[2];
  int64_t units_[2] = {0, 0};
  Buffer partial_;
  std::vector<float> pair_weight_;               // [prefix][row]
  std::vector<float> radial_[2], radial_query_;  // Σ coefficient · similarity [prefix][row], of more than one prefix
};

// d loss / d similarity times both inverse norms for strips [strip, last_strip), [candidates, stride]; or onto those of
// a longer prefix.
template <class T>
void Gradients<T>::coefficients(const Segment& segment, int64_t strip, int64_t last_strip, int64_t prefix, float* out,
                                bool onto) {
  const Candidates<T>& pool = p_.pool(segment.pool);
  const int64_t width = round_up(block_.rows(), kPanel);
  const bool shared = p_.prefixes() > 1;
  for (; strip < last_strip; ++strip) {
    const float* factors = block_.factors(prefix, segment, strip);
    for (int64_t j = segment.strip_begin(strip); j < segment.strip_begin(strip + 1); ++j, out += stride_) {
      const float* scores = block_.scores(prefix, segment, j);
      const Vec inverse = splat(pool.scales->inverse(prefix)[j]);
      if (shared) {
        radial_[segment.pool][prefix * pool.x.rows + j] += block_.along(segment, prefix, strip, j);
        for (int64_t i = 0; i < width; i += kWidth) {
          const Vec c = exp(load(scores + i)) * load(factors + i) * inverse;
          store(out + i, onto ? load(out + i) + c : c);
        }
      } else {
        for (int64_t i = 0; i < width; i += kWidth) store(out + i, load(scores + i) * load(factors + i) * inverse);
      }
    }
  }
}

// Adds coefficients · rows to the candidates' sums and coefficientsᵀ · candidates to those of one side of the rows, in
// the columns of one range. `candidates` are lanes [steps, ≥ dim].
template <class T>
void Gradients<T>::multiply(const Segment& segment, int64_t j, int64_t rows, const Range& range,
                            const float* coefficients, const float* candidates, int64_t candidate_stride,
                            float* partial, bool partial_onto, bool onto) {
  const int64_t width = round_up(block_.rows(), kPanel), dim = p_.queries.cols;
  const float *left = coefficients, *right = coefficients;
  int64_t left_stride = stride_;
  if constexpr (kPaired) {
    left_stride = round_up(stride_ / 2, kWidth) + kWidth;
    float* adjacent = scratch().left.reserve(kCandidates * left_stride);
    pack_rows<kPaired, float>({coefficients, rows, width, stride_}, nullptr, nullptr, adjacent, left_stride);
    float* across = scratch().across.reserve((kCandidates / 2 + 1) * stride_);
    pack_depth<kPaired, float>({coefficients, rows, width, stride_}, nullptr, across, kPanel, stride_);
    left = adjacent;
    right = across;
  }
  for (int64_t i = 0; i < width; i += kPanel) {
    for_row_groups(range.width, [&](int64_t column, int64_t count) {
      const int64_t d = range.begin + column;
      tile_of<kPaired, true>(count)(candidates + d, candidate_stride, right + i, stride_, lanes<kPaired>(rows),
                                    partial + d * stride_ + i, stride_, partial_onto);
    });
  }
  float* corner = scratch().corner.reserve(kTileRows * kPanel);
  for (int64_t panel = 0; panel < range.panels; ++panel) {
    const float* deep = block_.deep(segment.side, range) + panel * block_.deep_steps() * kPanel;
    const int64_t d = panel * kPanel, columns = std::min<int64_t>(kPanel, range.width - d);
    for_row_groups(rows, [&](int64_t row, int64_t count) {
      float* out = grads_[segment.pool] + (j + row) * dim + range.begin + d;
      const Tile multiply = tile_of<kPaired, false>(count);
      const int64_t steps = lanes<kPaired>(block_.rows());
      if (columns == kPanel) {
        multiply(left + row * left_stride, left_stride, deep, kPanel, steps, out, dim, onto);
        return;
      }
      multiply(left + row * left_stride, left_stride, deep, kPanel, steps, corner, kPanel, false);
      for (int64_t r = 0; r < count; ++r, out += dim) {
        for (int64_t k = 0; k < columns; k += kWidth) {
          const Vec x = load(corner + r * kPanel + k);
          store_some(out + k, onto ? load_some(out + k, columns - k) + x : x, columns - k);
        }
      }
    });
  }
}

// A part of a pool's candidates, in every direction that they are part of.
template <class T>
void Gradients<T>::unit(Pool pool, int64_t number) {
  const Candidates<T>& candidates = p_.pool(pool);
  const Segment& shape = *segments_[pool][0];
  const int64_t first = shape.strips * number / units_[pool], last = shape.strips * (number + 1) / units_[pool];
  const int64_t blocks = ceil_div(last - first, kBlockStrips);
  const bool direct = std::is_same_v<T, float> && candidates.scales->unscaled();
  const int64_t stride = direct ? candidates.x.stride : round_up(dim_, kPanel) + kWidth;
  float* packed = direct ? nullptr : scratch().candidates.reserve(kCandidates * stride);
  float* values = scratch().coefficients.reserve(kCandidates * stride_);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t strip = first + (last - first) * b / blocks, end = first + (last - first) * (b + 1) / blocks;
    const int64_t j = shape.strip_begin(strip), rows = shape.strip_begin(end) - j;
    if (!direct) {
      pack_depth<kPaired, T>({candidates.x.row(j), rows, dim_, candidates.x.stride}, candidates.scales->power() + j,
                             packed, kPanel, stride);
    }
    const float* lanes = direct ? reinterpret_cast<const float*>(candidates.x.row(j)) : packed;
    bool seen[2] = {b > 0, b > 0};
    for (const Segment* segment : segments_[pool]) {
      const bool onto = block_.first() > 0 || segment != segments_[pool][0];
      for (int64_t k = p_.prefixes() - 1; k >= 0; --k) {
        coefficients(*segment, strip, end, k, values, k + 1 < p_.prefixes());
        multiply(*segment, j, rows, p_.ranges[k], values, lanes, stride, partial_of(segment->side, pool, number),
                 seen[segment->side], onto);
      }
      seen[segment->side] = true;
    }
  }
}

// The units' sums for one side of the block's rows, added up and turned to rows.
template <class T>
void Gradients<T>::add_side(Side side) {
  std::vector<const float*> parts;
  for (const Pool pool : {kDocuments, kAllQueries}) {
    for (const Segment* segment : segments_[pool]) {
      if (segment->side != side) continue;
      for (int64_t unit = 0; unit < units_[pool]; ++unit) parts.push_back(partial_of(side, pool, unit));
    }
  }
  const int64_t rows = block_.rows(), cols = p_.queries.cols;
  const bool onto = side == kPositive || grads_[kAllQueries] == grad_queries_;
  parallel(ceil_div(dim_, kWidth), rows * dim_ * static_cast<int64_t>(parts.size()) / 8, [&](int64_t unit) {
    const int64_t d = unit * kWidth, columns = std::min<int64_t>(kWidth, dim_ - d);
    for (int64_t i = 0; i < rows; i += kWidth) {
      Vec square[kWidth] = {};
      for (int64_t c = 0; c < columns; ++c) {
        for (const float* part : parts) square[c] += load(part + (d + c) * stride_ + i);
      }
      transpose(square);
      for (int64_t r = 0; r < std::min<int64_t>(kWidth, rows - i); ++r) {
        const int64_t row = block_.first() + i + r;
        float* out = (side == kQuery ? grad_queries_ + row * cols : grads_[kDocuments] + p_.target(row) * cols) + d;
        store_some(out, onto ? load_some(out, columns) + square[r] : square[r], columns);
      }
    }
  });
}

template <class T>
void Gradients<T>::add_block() {
  const int64_t units = units_[kDocuments] + units_[kAllQueries];
  parallel(units, 2 * product_cost(block_.rows(), block_.candidates(), dim_), [&](int64_t number) {
    const bool documents = number < units_[kDocuments];
    unit(documents ? kDocuments : kAllQueries, documents ? number : number - units_[kDocuments]);
  });
  add_side(kQuery);
  if (p_.has_side(kPositive)) add_side(kPositive);
  const int64_t count = p_.queries.rows, documents = p_.documents.x.rows;
  for (int64_t k = 0; k < p_.prefixes(); ++k) {
    std::copy_n(block_.pair_weight(k), block_.rows(), pair_weight_.data() + k * count + block_.first());
    if (p_.prefixes() == 1) continue;
    for (int64_t i = 0; i < block_.rows(); ++i) {
      const int64_t row = block_.first() + i;
      radial_query_[k * count + row] = block_.radial(kQuery, k)[i];
      radial_[kDocuments][k * documents + p_.target(row)] += block_.radial(kPositive, k)[i];
    }
  }
}

// --- through the normalisation ---

// The gradient of one row from its sums, which lack what its own positive pair adds.
template <class T>
template <class Radial>
void Gradients<T>::finish_row(const T* x, const PrefixScales& scales, int64_t i, Radial&& radial, Pair pair,
                              float* grad) const {
  const Vec power = splat(scales.power()[i]);
  const bool projects = p_.options.normalized;
  if (p_.prefixes() == 1) {
    const RowScale own = scales.at(0, i), other = pair.x ? pair.scales->at(0, pair.i) : RowScale{0.f, 0.f, 0.f};
    const Vec weight = splat(pair.x ? pair_weight_[pair.number] * other.inverse * other.power : 0.f);
    const Vec divisor = splat(own.divisor);
    auto unit_gradient = [&](int64_t c) {
      const Vec sums = load_some(grad + c, dim_ - c) * divisor;
      return pair.x ? sums - load_some(pair.x + c, dim_ - c) * weight : sums;
    };
    // Divided, not multiplied by the inverse: a unit row that is off by one rounding leaves that much of the radial
    // part in.
    auto unit = [&](int64_t c) { return load_some(x + c, dim_ - c) * power / divisor; };
    Vec dot{};
    for (int64_t c = 0; projects && c < dim_; c += kWidth) dot = fma(unit_gradient(c), unit(c), dot);
    // Where the row was divided by a constant, its gradient keeps the radial part.
    const Vec along = splat(own.divisor == kEps * own.power ? 0.f : sum(dot));
    for (int64_t c = 0; c < dim_; c += kWidth) {
      const Vec gradient = projects ? unit_gradient(c) - unit(c) * along : unit_gradient(c);
      store_some(grad + c, own.inverse == 0 ? Vec{} : gradient / divisor * power, dim_ - c);
    }
  } else {
    // Sums of several prefixes in one: their radial parts are known apart.
    float pair_factor = 0, radial_factor = 0;
    for (int64_t k = p_.prefixes() - 1; k >= 0; --k) {
      const RowScale own = scales.at(k, i);
      if (pair.x) {
        const RowScale other = pair.scales->at(k, pair.i);
        pair_factor += pair_weight_[k * p_.queries.rows + pair.number] * own.inverse * other.inverse * other.power;
      }
      if (projects && own.divisor != kEps * own.power) {
        radial_factor += radial(k) * own.inverse * own.inverse * own.power;
      }
      const Range& range = p_.ranges[k];
      for (int64_t c = 0; c < range.width; c += kWidth) {
        const int64_t at = range.begin + c, n = range.width - c;
        Vec sums = load_some(grad + at, n) - load_some(x + at, n) * splat(radial_factor);
        if (pair.x) sums = sums - load_some(pair.x + at, n) * splat(pair_factor);
        store_some(grad + at, sums * power, n);
      }
    }
  }
  std::fill(grad + dim_, grad + p_.queries.cols, 0.f);
}

// Several rows may have one target, so here the pairs' parts are added one after the other.
template <class T>
void Gradients<T>::add_pairs_to_targets() {
  for (int64_t i = 0; i < p_.queries.rows; ++i) {
    const int64_t target = p_.target(i);
    float* grad = grads_[kDocuments] + target * p_.queries.cols;
    float factor = 0;
    for (int64_t k = p_.prefixes() - 1; k >= 0; --k) {
      const RowScale query = p_.query_scales->at(k, i);
      factor += pair_weight_[k * p_.queries.rows + i] * p_.documents.scales->inverse(k)[target] * query.inverse *
                query.power;
      const Range& range = p_.ranges[k];
      for (int64_t c = 0; c < range.width; c += kWidth) {
        const int64_t at = range.begin + c, n = range.width - c;
        store_some(grad + at, load_some(grad + at, n) - load_some(p_.queries.row(i) + at, n) * splat(factor), n);
      }
    }
  }
}

template <class T>
void Gradients<T>::finish() {
  constexpr int64_t kGroup = 8;
  const int64_t count = p_.queries.rows, cols = p_.queries.cols;
  const Candidates<T>& documents = p_.documents;
  if (p_.targets) add_pairs_to_targets();
  const bool joined = grads_[kAllQueries] == grad_queries_, separate = grads_[kAllQueries] && !joined;
  const int64_t rows[] = {count, documents.x.rows, separate ? p_.all_queries.x.rows : 0};
  const int64_t groups[] = {ceil_div(rows[0], kGroup), ceil_div(rows[1], kGroup), ceil_div(rows[2], kGroup)};
  parallel(groups[0] + groups[1] + groups[2], (rows[0] + rows[1] + rows[2]) * dim_ / 3, [&](int64_t unit) {
    int kind = 0;
    while (unit >= groups[kind]) unit -= groups[kind++];
    for (int64_t i = unit * kGroup; i < std::min((unit + 1) * kGroup, rows[kind]); ++i) {
      if (kind == 0) {
        const int64_t target = p_.target(i);
        auto radial = [&](int64_t k) {
          return radial_query_[k * count + i] + (joined ? radial_[kAllQueries][k * count + i] : 0.f);
        };
        finish_row(p_.queries.row(i), *p_.query_scales, i, radial,
                   {documents.x.row(target), documents.scales, target, i}, grad_queries_ + i * cols);
        continue;
      }
      const Pool pool = kind == 1 ? kDocuments : kAllQueries;
      const int64_t query = i - p_.options.offset;
      Pair pair{nullptr, nullptr, 0, 0};
      if (pool == kDocuments && !p_.targets && query >= 0 && query < count) {
        pair = {p_.queries.row(query), p_.query_scales, query, query};
      }
      finish_row(p_.pool(pool).x.row(i), *p_.pool(pool).scales, i,
                 [&](int64_t k) { return radial_[pool][k * rows[kind] + i]; }, pair, grads_[pool] + i * cols);
    }
  });
}

}  // namespace triton_st::mnrl
