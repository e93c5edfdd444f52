// The first of two passes over a block of loss rows: similarities with all candidates, a strip of them at a time, their
// exponentials relative to the strip's maximum, and from the strips' sums the exact loss and each strip's coefficient.
//
// Scores lie candidate by candidate, [candidates, rows]: sums over candidates are then sums of whole vectors, and a
// candidate's row is an operand of both gradient products as it is.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "mnrl_problem.h"

namespace triton_st::mnrl {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLowest = std::numeric_limits<float>::lowest();
inline constexpr float kNegligible = -104.f;  // e to this power is 0

inline Vec masked(Vec x, Ints mask) { return mask ? splat(-kInfinity) : x; }

// Where one float of each row of a block belongs: by prefix, padded to whole panels with zeros.
class RowValues {
 public:
  RowValues(int64_t kinds, int64_t stride) : stride_(stride), memory_(kinds * stride) {
    std::fill_n(memory_.get(), kinds * stride, 0.f);
  }
  float* operator[](int64_t kind) const { return memory_.get() + kind * stride_; }

 private:
  int64_t stride_;
  Buffer memory_;
};

// Rows [first, first + rows) of the loss.
template <class T>
class RowBlock {
 public:
  static constexpr bool kPaired = kPairs<T>;

  RowBlock(const Problem<T>& problem, int64_t most_rows)
      : p_(problem),
        stride_(round_up(most_rows, kPanel) + (most_rows > 2 * kPanel ? kWidth : 0)),  // not the cache's period
        prefixes_(problem.prefixes()),
        keeps_logits_(prefixes_ > 1),
        steps_(problem.ranges.back().first_step + problem.ranges.back().steps),
        scores_(problem.options.gradients ? prefixes_ * candidates() * stride_ : 0),
        most_(prefixes_ * strips() * stride_),
        sums_(prefixes_ * strips() * stride_),
        products_(prefixes_ * strips() * stride_),
        inverse_(2 * prefixes_, stride_),
        norms_(2 * prefixes_, stride_),
        positive_(prefixes_, stride_),
        bound_(prefixes_, stride_),
        scale_(1, stride_),
        weight_(1, stride_),
        pair_weight_(prefixes_, stride_),
        radial_(2 * prefixes_, stride_),
        rival_count_(problem.options.diagnostics ? problem.segments[0].strips * stride_ : 0),
        rival_most_(problem.options.diagnostics ? problem.segments[0].strips * stride_ : 0),
        ids_(2 * stride_),
        target_lanes_(stride_) {
    const int64_t lanes_of_rows = round_up(most_rows, kPanel);
    for (const Side side : {kQuery, kPositive}) {
      if (!problem.has_side(side)) continue;
      transposed_[side].reserve(lanes_of_rows * steps_);
      const Range& last = problem.ranges.back();
      if (problem.options.gradients) deep_[side].reserve((last.first_panel + last.panels) * kPanel * lanes_of_rows);
    }
    if (problem.targets) gathered_.reserve(most_rows * problem.queries.cols * sizeof(T) / sizeof(float) + kPanel);
  }

  // Where results go, row by row of the whole loss; null what is not asked for.
  struct Rows {
    float *losses, *grad_scale, *diagnostics;
  };
  void score(int64_t first, int64_t rows, const Rows& out);

  int64_t first() const { return first_; }
  int64_t rows() const { return rows_; }
  int64_t stride() const { return stride_; }
  int64_t candidates() const { return p_.segments.back().first_row + p_.segments.back().rows; }
  int64_t strips() const { return p_.segments.back().first_strip + p_.segments.back().strips; }
  bool keeps_logits() const { return keeps_logits_; }

  // Exponentials of a candidate relative to its strip's maximum; or, of more than one prefix, their arguments.
  float* scores(int64_t prefix, const Segment& segment, int64_t candidate) const {
    return scores_.get() + (prefix * candidates() + segment.first_row + candidate) * stride_;
  }
  // What turns an exponential of the strip into d loss / d similarity, times the row's inverse norm.
  const float* factors(int64_t prefix, const Segment& segment, int64_t strip) const {
    return of_strip(sums_, prefix, segment, strip);
  }
  // The weight of each row's positive pair in the gradient, and Σ coefficient · similarity of each side.
  const float* pair_weight(int64_t prefix) const { return pair_weight_[prefix]; }
  const float* radial(Side side, int64_t prefix) const { return radial_[side * prefixes_ + prefix]; }
  const float* inverse(Side side, int64_t prefix) const {
    return inverse_[side * prefixes_ + prefix];
  }
  // Rows as the right operand of a product over them: of each range its panels, [steps of rows, kPanel].
  const float* deep(Side side, const Range& range) const {
    return deep_[side].get() + range.first_panel * kPanel * lanes<kPaired>(round_up(rows_, kPanel));
  }
  int64_t deep_steps() const { return lanes<kPaired>(round_up(rows_, kPanel)); }

  // The logit of candidate · similarity, and what of it differs for a row's own hard negatives.
  float multiplier(const Segment& segment, int64_t row) const { return scale_[0][row] + usual_strength(segment); }
  float usual_strength(const Segment& segment) const {
    if (segment.direction != kQueryToDoc) return 0;
    const int mode = p_.options.hardness_mode;
    return mode == kInBatchNegatives || mode == kAllNegatives ? p_.options.hardness_strength : 0.f;
  }
  // The strength of a query's own hard negatives, where it is not the usual one.
  bool own_differs(const Segment& segment) const {
    const int mode = p_.options.hardness_mode;
    return segment.direction == kQueryToDoc && !p_.targets && (mode == kInBatchNegatives || mode == kHardNegatives);
  }
  float own_strength() const {
    return p_.options.hardness_mode == kHardNegatives ? p_.options.hardness_strength : 0.f;
  }

  // The lane of the block's row that candidate j belongs to; outside [0, rows) if to none.
  int64_t own_lane(const Segment& segment, int64_t j) const {
    if (p_.targets) return -1;
    return (segment.pool == kDocuments ? j % p_.owners : j) - p_.options.offset - first_;
  }

  // Σ coefficient · similarity over the rows of the block, for one candidate, where logits were kept.
  float along(const Segment& segment, int64_t prefix, int64_t strip, int64_t j) const;

 private:
  void pack(int64_t panel);
  void score_strip(const Segment& segment, int64_t strip, int64_t first_panel, int64_t last_panel);
  void reduce_strip(const Segment& segment, int64_t strip, int64_t prefix, int64_t panel, const float* raw);
  void mask(const Segment& segment, int64_t prefix, int64_t lane, int64_t j, int64_t own, Vec (&x)[2]) const;
  void finish(int64_t panel, const Rows& out);

  float* of_strip(const Buffer& values, int64_t prefix, const Segment& segment, int64_t strip) const {
    return values.get() + (prefix * strips() + segment.first_strip + strip) * stride_;
  }

  // Calls f(segment, where its values begin) for each strip of a softmax.
  template <class F>
  void for_each_strip(int64_t prefix, int group, F&& f) const {
    for (const Segment& segment : p_.segments) {
      if (segment.group != group) continue;
      for (int64_t strip = 0; strip < segment.strips; ++strip) {
        f(segment, (prefix * strips() + segment.first_strip + strip) * stride_);
      }
    }
  }

  const Problem<T>& p_;
  const int64_t stride_, prefixes_;
  const bool keeps_logits_;
  const int64_t steps_;
  const Buffer scores_, most_, sums_, products_;
  const RowValues inverse_, norms_, positive_, bound_, scale_, weight_, pair_weight_, radial_;
  const Buffer rival_count_, rival_most_;
  std::vector<int32_t> ids_, target_lanes_;
  Buffer transposed_[2], deep_[2], gathered_;
  int64_t first_ = 0, rows_ = 0;
};

// --- packing ---

// Rows panel · kPanel … of the block, both sides, and the similarity of each pair, summed in the order of the scores.
template <class T>
void RowBlock<T>::pack(int64_t panel) {
  const int64_t lane = panel * kPanel, count = std::min<int64_t>(kPanel, rows_ - lane), i = first_ + lane;
  const int64_t cols = p_.queries.cols;
  float power[2][kPanel] = {};
  Matrix<const T> sides[2] = {{p_.queries.row(i), count, cols, p_.queries.stride}, {}};
  if (p_.targets) {
    T* rows = reinterpret_cast<T*>(gathered_.get()) + lane * cols;
    for (int64_t r = 0; r < count; ++r) std::copy_n(p_.documents.x.row(p_.target(i + r)), cols, rows + r * cols);
    sides[kPositive] = {rows, count, cols, cols};
  } else {
    sides[kPositive] = {p_.documents.x.row(p_.target(i)), count, cols, p_.documents.x.stride};
  }
  for (int64_t r = 0; r < kPanel; ++r) {
    const bool real = r < count;
    const int64_t target = real ? p_.target(i + r) : 0;
    power[kQuery][r] = real ? p_.query_scales->power()[i + r] : 0.f;
    power[kPositive][r] = real ? p_.documents.scales->power()[target] : 0.f;
    for (int64_t k = 0; k < prefixes_; ++k) {
      inverse_[k][lane + r] = real ? p_.query_scales->inverse(k)[i + r] : 0.f;
      inverse_[prefixes_ + k][lane + r] = real ? p_.documents.scales->inverse(k)[target] : 0.f;
      norms_[k][lane + r] = real ? p_.query_scales->divisor(k)[i + r] : 0.f;
      norms_[prefixes_ + k][lane + r] = real ? p_.documents.scales->divisor(k)[target] : 0.f;
    }
    scale_[0][lane + r] = real ? p_.scale[i + r] : 1.f;
    weight_[0][lane + r] = real ? p_.weights[i + r] : 0.f;
    target_lanes_[lane + r] = real ? static_cast<int32_t>(target) : -1;
    if (!p_.query_ids.empty()) {
      ids_[lane + r] = real ? p_.query_ids[i + r] : -2;
      ids_[stride_ + lane + r] = real ? p_.target_ids[i + r] : -2;
    }
  }
  Vec total[2] = {};
  for (size_t k = 0; k < p_.ranges.size(); ++k) {
    const Range& range = p_.ranges[k];
    const float* packed[2];
    for (const Side side : {kQuery, kPositive}) {
      const bool kept = p_.has_side(side);
      float* out = kept ? transposed_[side].get() + range.first_step * round_up(rows_, kPanel) +
                              panel * range.steps * kPanel
                        : product_scratch.right.reserve(range.steps * kPanel);
      const Matrix<const T> part{sides[side].data + range.begin, count, range.width, sides[side].stride};
      pack_transposed<kPaired>(part, power[side], out);
      packed[side] = out;
      if (!kept || !p_.options.gradients) continue;
      float* deep_out = deep_[side].get() + range.first_panel * kPanel * deep_steps() + lanes<kPaired>(lane) * kPanel;
      pack_depth<kPaired, T>(part, power[side], deep_out, deep_steps() * kPanel, kPanel);
    }
    const int64_t parts = std::max<int64_t>(ceil_div(range.steps, kSumSteps), 1);
    for (int64_t part = 0; part < parts; ++part) {
      Vec sums[2] = {};
      for (int64_t step = range.steps * part / parts; step < range.steps * (part + 1) / parts; ++step) {
        for (int half = 0; half < 2; ++half) {
          const int64_t at = step * kPanel + half * kWidth;
          sums[half] = multiply_add<kPaired>(load(packed[kPositive] + at), load(packed[kQuery] + at), sums[half]);
        }
      }
      for (int half = 0; half < 2; ++half) total[half] = k + part > 0 ? total[half] + sums[half] : sums[half];
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t at = lane + half * kWidth;
      const Vec similarity = total[half] * load(inverse(kPositive, k) + at) * load(inverse(kQuery, k) + at);
      store(positive_[k] + at, similarity);
      if (p_.options.margin) {
        const Vec unit = p_.options.relative_margin ? absolute(similarity) : splat(1.f);
        store(bound_[k] + at, similarity - splat(*p_.options.margin) * unit);
      }
    }
  }
}

// --- scores ---

// Candidates of one strip against panels [first_panel, last_panel) of the block's rows.
template <class T>
void RowBlock<T>::score_strip(const Segment& segment, int64_t strip, int64_t first_panel, int64_t last_panel) {
  const Candidates<T>& pool = p_.pool(segment.pool);
  const int64_t j = segment.strip_begin(strip), count = segment.strip_begin(strip + 1) - j;
  // Rows that are lanes as they lie in memory need no packing.
  constexpr bool kLanesInMemory = kPaired || std::is_same_v<T, float>;
  constexpr int64_t kElements = kPaired ? 2 : 1;
  bool direct = kLanesInMemory && pool.scales->unscaled() && pool.x.stride % kElements == 0;
  for (const Range& range : p_.ranges) direct = direct && range.begin % kElements == 0 && range.width % kElements == 0;
  const int64_t packed_stride = steps_ + prefixes_ * kWidth + kWidth;
  float* packed = direct ? nullptr : product_scratch.left.reserve(kStripRows * packed_stride);
  if (!direct) {
    for (const Range& range : p_.ranges) {
      const int64_t at = range.first_step + (&range - p_.ranges.data()) * kWidth;
      pack_rows<kPaired, T>({pool.x.row(j) + range.begin, count, range.width, pool.x.stride}, pool.scales->power() + j,
                            nullptr, packed + at, packed_stride);
    }
  }
  float* raw = product_scratch.block.reserve(2 * kStripRows * kPanel);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (int64_t k = 0; k < prefixes_; ++k) {
      const Range& range = p_.ranges[k];
      const float* right = transposed_[segment.side].get() + range.first_step * round_up(rows_, kPanel) +
                           panel * range.steps * kPanel;
      const float* left = direct ? reinterpret_cast<const float*>(pool.x.row(j) + range.begin)
                                 : packed + range.first_step + k * kWidth;
      const int64_t stride = direct ? pool.x.stride / kElements : packed_stride;
      const int64_t parts = std::max<int64_t>(ceil_div(range.steps, kSumSteps), 1);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t step = range.steps * part / parts, depth = range.steps * (part + 1) / parts - step;
        for_row_groups(count, [&](int64_t row, int64_t rows) {
          tile_of<kPaired, false>(rows)(left + row * stride + step, stride, right + step * kPanel, kPanel, depth,
                                        raw + row * kPanel, kPanel, k + part > 0);
        });
      }
      reduce_strip(segment, strip, k, panel, raw);
    }
  }
}

// Leaves out what is masked among candidate j's similarities with one panel of rows; `own` is the lane of the row that
// it belongs to.
template <class T>
void RowBlock<T>::mask(const Segment& segment, int64_t prefix, int64_t lane, int64_t j, int64_t own,
                       Vec (&x)[2]) const {
  const Candidates<T>& pool = p_.pool(segment.pool);
  const bool excludes_own = segment.direction != kQueryToDoc || j < p_.owners;
  for (int half = 0; half < 2; ++half) {
    const int64_t at = lane + half * kWidth;
    if (p_.targets) {
      x[half] = masked(x[half], load_ints(target_lanes_.data() + at) == splat_ints(static_cast<int32_t>(j)));
    } else if (excludes_own) {
      x[half] = masked(x[half], lane_numbers() == splat_ints(static_cast<int32_t>(own - half * kWidth)));
    }
    if (pool.first_id) {
      const Ints query = load_ints(ids_.data() + at), target = load_ints(ids_.data() + stride_ + at);
      const Ints first = splat_ints(pool.first_id[j]), second = splat_ints(pool.second_id[j]);
      const Ints second_of_row = segment.pool == kDocuments ? query : target;
      x[half] = masked(x[half], (first == query) | (first == target) | (second == second_of_row));
    }
    if (p_.options.margin) x[half] = masked(x[half], x[half] > load(bound_[prefix] + at));
  }
}

// Exponentials of a strip's similarities with one panel of rows, from raw products [count, kPanel].
template <class T>
void RowBlock<T>::reduce_strip(const Segment& segment, int64_t strip, int64_t prefix, int64_t panel,
                               const float* raw) {
  const Candidates<T>& pool = p_.pool(segment.pool);
  const int64_t j = segment.strip_begin(strip), count = segment.strip_begin(strip + 1) - j, lane = panel * kPanel;
  float* logits = product_scratch.block.get() + kStripRows * kPanel;
  const float *row_inverse = inverse(segment.side, prefix) + lane;
  const float* column_inverse = pool.scales->inverse(prefix) + j;
  const Vec inverses[2] = {load(row_inverse), load(row_inverse + kWidth)};
  const Vec strength = splat(usual_strength(segment));
  const Vec multipliers[2] = {load(scale_[0] + lane) + strength, load(scale_[0] + lane + kWidth) + strength};
  const bool masks_all = p_.targets || pool.first_id || p_.options.margin;
  const bool differs = own_differs(segment);
  const bool counts = p_.options.diagnostics && segment.direction == kQueryToDoc && prefix + 1 == prefixes_;
  Vec most[2] = {splat(kLowest), splat(kLowest)}, rivals[2] = {}, hardest[2] = {splat(-kInfinity), splat(-kInfinity)};
  struct Exception {
    int64_t row, lane;
    float missing;  // from its logit
  } exceptions[kStripRows];
  int64_t exception_count = 0, own = own_lane(segment, j) - lane, wrap = (j / p_.owners + 1) * p_.owners;
  for (int64_t r = 0; r < count; ++r, ++own) {
    if (j + r == wrap) {
      own -= p_.owners;
      wrap += p_.owners;
    }
    const bool owned = own >= 0 && own < std::min<int64_t>(kPanel, rows_ - lane) && !p_.targets;
    const Vec column = splat(column_inverse[r]);
    Vec x[2];
    for (int half = 0; half < 2; ++half) x[half] = load(raw + r * kPanel + half * kWidth) * column * inverses[half];
    if (masks_all || owned) mask(segment, prefix, lane, j + r, own, x);
    if (counts) {
      for (int half = 0; half < 2; ++half) {
        rivals[half] += x[half] >= load(positive_[prefix] + lane + half * kWidth) ? splat(1.f) : Vec{};
        hardest[half] = maximum(x[half], hardest[half]);
      }
    }
    if (differs && owned && j + r >= p_.owners) {
      const float similarity = x[own / kWidth][own % kWidth], scale = scale_[0][lane + own];
      const float usual = scale + usual_strength(segment), actual = scale + own_strength();
      x[own / kWidth][own % kWidth] = similarity * (actual / usual);
      exceptions[exception_count++] = {r, own, similarity > -kInfinity ? similarity * (usual - actual) : 0.f};
    }
    for (int half = 0; half < 2; ++half) {
      const Vec logit = x[half] * multipliers[half];
      store(logits + r * kPanel + half * kWidth, logit);
      most[half] = maximum(logit, most[half]);  // in this order a NaN does not stay; it comes out of the sum
    }
  }
  const int64_t number = segment.first_strip + strip;
  Vec sums[2] = {}, products[2] = {};
  float* out = p_.options.gradients ? scores(prefix, segment, j) + lane : logits;
  const int64_t out_stride = p_.options.gradients ? stride_ : kPanel;
  for (int64_t r = 0; r < count; ++r) {
    for (int half = 0; half < 2; ++half) {
      Vec x = load(logits + r * kPanel + half * kWidth) - most[half];
      x = x < splat(kNegligible) ? splat(kNegligible) : x;  // −∞ times its exponential would be NaN
      const Vec e = exp(x);
      sums[half] += e;
      products[half] = fma(e, x, products[half]);
      store(out + r * out_stride + half * kWidth, keeps_logits_ ? x : e);
    }
  }
  for (int64_t n = 0; n < exception_count; ++n) {
    const auto& [row, at, missing] = exceptions[n];
    const float kept = out[row * out_stride + at];
    products[at / kWidth][at % kWidth] += (keeps_logits_ ? std::exp(kept) : kept) * missing;
  }
  const int64_t at = (prefix * strips() + number) * stride_ + lane;
  for (int half = 0; half < 2; ++half) {
    store(most_.get() + at + half * kWidth, most[half]);
    store(sums_.get() + at + half * kWidth, sums[half]);
    store(products_.get() + at + half * kWidth, products[half]);
    if (counts) {
      store(rival_count_.get() + number * stride_ + lane + half * kWidth, rivals[half]);
      store(rival_most_.get() + number * stride_ + lane + half * kWidth, hardest[half]);
    }
  }
}

// --- losses ---
//
// With Z = Σ exp over a softmax, the positive pair's part of d loss / d similarity is minus the sum of the others': 1 −
// p of the positive would lose all digits once the loss is small.

template <class T>
void RowBlock<T>::finish(int64_t panel, const Rows& out) {
  const int64_t lane = panel * kPanel, count = std::min<int64_t>(kPanel, rows_ - lane);
  const int groups = p_.groups();
  const float copies = p_.multiplicity();
  std::fill_n(out.losses + first_ + lane, count, 0.f);
  if (p_.options.gradients) std::fill_n(out.grad_scale + first_ + lane, count, 0.f);
  for (int64_t k = 0; k < prefixes_; ++k) {
    const float share = p_.dim_weights[k] / static_cast<float>(groups);
    // Cosines of one column are ±1, without a gradient; sums shared with longer prefixes would leave rounding of it.
    const float moves = p_.options.normalized && prefixes_ > 1 && p_.dims[k] == 1 ? 0.f : 1.f;
    for (int half = 0; half < 2; ++half) {
      const int64_t at = lane + half * kWidth;
      const Vec positive = load(positive_[k] + at), scale = load(scale_[0] + at);
      const Vec positive_logit = positive * scale, weight = load(weight_[0] + at) * splat(share);
      Vec pair_weight{}, scale_sum{}, radial_sum[2] = {}, loss{};
      for (int group = 0; group < groups; ++group) {
        Vec most = positive_logit;
        for_each_strip(k, group, [&](const Segment&, int64_t strip) {
          most = maximum(load(most_.get() + strip + at), most);
        });
        Vec others{};
        for_each_strip(k, group, [&](const Segment&, int64_t strip) {
          others += load(sums_.get() + strip + at) * exp(load(most_.get() + strip + at) - most);
        });
        const Vec own = exp(positive_logit - most), total = others + own * splat(copies);
        for (int r = 0; r < kWidth; ++r) {
          const bool leads = positive_logit[r] == most[r];
          loss[r] += leads ? std::log1p(others[r] + (copies - 1)) : (most[r] - positive_logit[r]) + std::log(total[r]);
        }
        if (!p_.options.gradients) continue;
        const Vec gain = weight / total;
        pair_weight += others * gain * scale * splat(moves);
        for_each_strip(k, group, [&](const Segment& segment, int64_t strip) {
          const Vec factor = exp(load(most_.get() + strip + at) - most) * gain;
          const Vec multiplier = scale + splat(usual_strength(segment));
          const Vec sums = load(sums_.get() + strip + at);
          // Σ p · (similarity − positive): the difference first, of logits relative to one maximum.
          const Vec offset = load(most_.get() + strip + at) - positive * multiplier;
          Vec difference = fma(offset, sums, load(products_.get() + strip + at)) / multiplier * factor;
          difference = sums == 0 ? Vec{} : difference;
          scale_sum += difference;
          radial_sum[segment.side] += (difference + positive * sums * factor) * scale * splat(moves);
          store(sums_.get() + strip + at, factor * scale * splat(moves) * load(inverse(segment.side, k) + at));
        });
      }
      store(pair_weight_[k] + at, pair_weight);
      for (const Side side : {kQuery, kPositive}) {
        store(radial_[side * prefixes_ + k] + at, radial_sum[side] - pair_weight * positive);
      }
      for (int64_t r = 0; r < std::min<int64_t>(kWidth, count - half * kWidth); ++r) {
        out.losses[first_ + at + r] += loss[r] * share;
        if (p_.options.gradients) out.grad_scale[first_ + at + r] += scale_sum[r];
      }
    }
  }
  if (!p_.options.diagnostics) return;
  for (int64_t at = lane; at < lane + count; ++at) {
    float rivals = 0, hardest = -kInfinity;
    for (int64_t strip = 0; strip < p_.segments[0].strips; ++strip) {
      rivals += rival_count_.get()[strip * stride_ + at];
      hardest = std::max(hardest, rival_most_.get()[strip * stride_ + at]);
    }
    const float facts[] = {rivals == 0 ? 1.f : 0.f, 1 / (1 + rivals), positive_[prefixes_ - 1][at], hardest};
    for (int fact = 0; fact < 4; ++fact) out.diagnostics[fact * p_.queries.rows + first_ + at] = facts[fact];
  }
}

template <class T>
float RowBlock<T>::along(const Segment& segment, int64_t prefix, int64_t strip, int64_t j) const {
  const float *most = of_strip(most_, prefix, segment, strip), *factors = of_strip(sums_, prefix, segment, strip);
  const float *kept = scores(prefix, segment, j), *norms = norms_[segment.side * prefixes_ + prefix];
  const Vec strength = splat(usual_strength(segment));
  Vec total{};
  for (int64_t i = 0; i < rows_; i += kWidth) {
    const Vec x = load(kept + i), share = exp(x) * load(factors + i) * load(norms + i);
    total += share * (x + load(most + i)) / (load(scale_[0] + i) + strength);
  }
  float result = sum(total);
  const int64_t own = own_lane(segment, j);
  if (own_differs(segment) && j >= p_.owners && own >= 0 && own < rows_) {
    const float usual = scale_[0][own] + usual_strength(segment), actual = scale_[0][own] + own_strength();
    const float share = std::exp(kept[own]) * factors[own] * norms[own];
    result += share * (kept[own] + most[own]) * (1 / actual - 1 / usual);
  }
  return result;
}

template <class T>
void RowBlock<T>::score(int64_t first, int64_t rows, const Rows& out) {
  first_ = first;
  rows_ = rows;
  const int64_t panels = ceil_div(rows, kPanel), cols = p_.dims.back();
  parallel(panels, rows * cols / 4, [&](int64_t panel) { pack(panel); });
  // Units of a few strips, and where those are few, of some panels each.
  const int64_t parts = std::min(panels, std::max<int64_t>(ceil_div(16, strips()), 1));
  parallel(strips() * parts, product_cost(rows, candidates(), cols), [&](int64_t unit) {
    const int64_t strip = unit / parts, part = unit % parts;
    for (const Segment& segment : p_.segments) {
      if (strip < segment.first_strip || strip >= segment.first_strip + segment.strips) continue;
      score_strip(segment, strip - segment.first_strip, panels * part / parts, panels * (part + 1) / parts);
    }
  });
  parallel(panels, prefixes_ * strips() * rows, [&](int64_t panel) { finish(panel, out); });
}

}  // namespace triton_st::mnrl
