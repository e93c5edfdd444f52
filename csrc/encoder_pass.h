// One forward pass over a run of whole sequences in one workspace, cut into stages. A stage's units may run in any
// order and on any thread once the stage before is done; every unit computes the same bits however stages are cut.
#pragma once

#include <optional>
#include <utility>

#include "encoder_attention.h"
#include "encoder_model.h"
#include "encoder_tiles.h"

namespace triton_st {

// --- elementwise ---

// x · Φ(x), to within 4e-7: Φ(−|x|) as in Abramowitz & Stegun 26.2.17.
[[gnu::always_inline]] inline Vec gelu(Vec x, float) {
  const Vec size = absolute(x), t = reciprocal(fma(size, splat(0.2316419f), splat(1.f)));
  Vec p = fma(splat(0.5307027145f), t, splat(-0.7265760135f));
  p = fma(p, t, splat(0.7107068705f));
  p = fma(p, t, splat(-0.142248368f));
  p = fma(p, t, splat(0.127414796f));
  const Vec tail = p * t * exp2_below(x * x * -0.72134752f);
  return fma(-size, tail, maximum(Vec{}, x));  // NaN comes through
}

// x · Φ(x), to within 2e-3, a fraction of a byte's step.
[[gnu::always_inline]] inline Vec gelu(Vec x, int8_t) {
  const Vec positive = maximum(Vec{}, x);  // NaN comes through
  const Vec end = splat(3.3f);
  Vec size = absolute(x);
  size = size < end ? size : end;
  Vec p = fma(splat(0.02031988f), size, splat(-0.17932324f));
  p = fma(p, size, splat(0.5310474f));
  p = fma(p, size, splat(-0.52986197f));
  return fma(p, size, positive);
}

// x · Φ(x), to within 4e-5: less than bf16 can hold of it.
[[gnu::always_inline]] inline Vec gelu(Vec x, BFloat16) {
  constexpr float kEnd = 4.5f;
#if defined(TRITON_ST_AVX512)
  const Vec inside = _mm512_range_ps(x, splat(kEnd), 0b0010);  // the lesser magnitude, the sign of x
#else
  const Vec high = splat(kEnd);
  Vec inside = x > high ? high : x;
  inside = inside < -high ? -high : inside;
#endif
  const Vec t = inside * inside;
  Vec p = fma(splat(3.000311668e-11f), t, splat(-3.284190113e-9f));
  p = fma(p, t, splat(1.580361761e-7f));
  p = fma(p, t, splat(-4.431894246e-6f));
  p = fma(p, t, splat(8.121211597e-5f));
  p = fma(p, t, splat(-1.036269050e-3f));
  p = fma(p, t, splat(9.580708940e-3f));
  p = fma(p, t, splat(-6.597735957e-2f));
  p = fma(p, t, splat(3.987086181e-1f));
  return x * fma(p, inside, splat(0.5f));  // NaN and inf come through
}

// Layer normalisation in place of kRows rows of n values, `stride` from each other; what lies behind them up to a
// multiple of kPanel is and stays 0. Rows beside each other hide the time that sums across lanes take. With kSpread,
// row r of `spread`, round_up(n, kPanel) long, gets x̂ · norm.spread, and ranges[r] its range.
template <bool kSpread, int kRows>
void layer_norm(float* x, int64_t stride, int64_t n, const Norm& norm, float eps, float* spread, Range* ranges) {
  const int64_t padded = round_up(n, kPanel);
  Vec mean[kRows], inverse[kRows], most[kRows] = {}, least[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    const float* row = x + r * stride;
    Vec sums[4] = {};
    for (int64_t i = 0; i < padded; i += kPanel) {
      sums[i / kPanel % 2] += load(row + i);
      sums[2 + i / kPanel % 2] += load(row + i + kWidth);
    }
    mean[r] = splat(sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n));
  }
  const Ints lanes = lane_numbers();
  for (int r = 0; r < kRows; ++r) {
    const float* row = x + r * stride;
    Vec squares[2] = {};
    for (int64_t i = 0; i < padded; i += kPanel) {
      for (int v = 0; v < 2; ++v) {
        Vec off = load(row + i + v * kWidth) - mean[r];
        if (i + kPanel > n) off = lanes < static_cast<int32_t>(n - i - v * kWidth) ? off : Vec{};
        squares[v] = fma(off, off, squares[v]);
      }
    }
    inverse[r] = splat(1.f / std::sqrt(sum(squares[0] + squares[1]) / static_cast<float>(n) + eps));
  }
  for (int64_t i = 0; i < padded; i += kWidth) {
    const Vec gain = load(norm.gain + i), shift = load(norm.shift + i);
    const Vec factor = kSpread ? load(norm.spread + i) : Vec{};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* value = x + r * stride + i;
      const Vec unit = (load(value) - mean[r]) * inverse[r];
      store(value, fma(unit, gain, shift));
      if constexpr (kSpread) {
        const Vec fed = unit * factor;
        store(spread + r * padded + i, fed);
        most[r] = maximum(fed, most[r]);
        least[r] = maximum(-fed, least[r]);
      }
    }
  }
  if constexpr (kSpread) {
    // What is not finite in a row makes its mean or its variance so, and what is not in `spread`, the weights' scales.
    for (int r = 0; r < kRows; ++r) {
      ranges[r] = {largest_lane(least[r]), largest_lane(most[r]), (mean[r][0] + inverse[r][0]) * 0.f};
    }
  }
}

// --- the batch ---

// Packed sequences and the tables that their ids index.
struct Batch {
  const int32_t* ids;
  const int32_t* cu_seqlens;
  const int32_t* types;  // or null: all 0
  int64_t sequences;
  Matrix<const float> word, position;
  std::optional<Matrix<const float>> token_type;
  int64_t position_offset;
  std::optional<Matrix<const float>> position_bias;  // [heads, 2 · span − 1], of query − key from 1 − span on
  int64_t length(int64_t s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }
};

// Rows that memory is taken for at once: what grew row by row would leave holes.
inline constexpr int64_t kRowsAtOnce = 256;

// Memory that a pass works in; kept from call to call.
struct Workspace {
  Buffer x, x_lanes, qkv, context, context_lanes, hidden, hidden_lanes, row_scales, pooled;
  std::vector<RowExcess> x_excess, context_excess, hidden_excess;
};

inline thread_local Buffer spread_rows;

// Elements from row to row: no multiple of the cache's period.
template <class T>
int64_t padded_stride(int64_t n) {
  return n + 64 / static_cast<int64_t>(sizeof(T));
}

template <class P>
class Pass {
 public:
  using Activation = typename P::Activation;

  // Sequences [first, last) of the batch, with room for `hidden_columns` hidden activations of `hidden_rows` rows.
  Pass(const Model& model, const Batch& batch, Workspace& workspace, int64_t first, int64_t last, int64_t hidden_rows,
       int64_t hidden_columns)
      : model_(model),
        batch_(batch),
        base_(batch.cu_seqlens[first]),
        hidden_(model.sizes.padded_hidden()),
        context_(model.sizes.context()),
        x_stride_(padded_stride<float>(hidden_)),
        qkv_stride_(padded_stride<Activation>(3 * context_)),
        context_stride_(padded_stride<Activation>(context_)),
        fed_stride_(padded_stride<Activation>(hidden_columns)),
        hidden_rows_(hidden_rows) {
    const int64_t rows = round_up(batch.cu_seqlens[last] - base_, kRowsAtOnce);
    // Tiles read the last group of rows past its end.
    const int64_t spare = P::kTiled ? kGroupRows<P> : 0;
    x_ = workspace.x.reserve(rows * x_stride_);
    qkv_ = activations(workspace.qkv, (rows + spare) * qkv_stride_);
    attended_ = activations(workspace.context, (rows + spare) * context_stride_);
    fed_ = activations(workspace.hidden, (hidden_rows + spare) * fed_stride_);
    if constexpr (P::kScaled || !kFloatLanes) {
      x_operand_ = own_lanes(workspace.x_lanes, rows + spare, hidden_);
    } else {
      x_operand_ = {x_, x_stride_, 0};
    }
    if constexpr (P::kScaled) {
      context_operand_ = own_lanes(workspace.context_lanes, rows + spare, context_);
      hidden_operand_ = own_lanes(workspace.hidden_lanes, hidden_rows + spare, hidden_columns);
      const int64_t groups = ceil_div(hidden_columns, kFeedColumns<P>);
      float* scales = workspace.row_scales.reserve(4 * rows + 2 * groups * hidden_rows);
      auto take = [&](int64_t count) { return std::exchange(scales, scales + count); };
      auto complete = [&](Operand& operand, int64_t count, std::vector<RowExcess>& excess) {
        operand.scales = take(count), operand.shifts = take(count);
        if constexpr (P::kNarrowSums) {
          if (static_cast<int64_t>(excess.size()) < count) excess.resize(count);
          operand.excess = excess.data();
        }
      };
      complete(x_operand_, rows, workspace.x_excess);
      complete(context_operand_, rows, workspace.context_excess);
      complete(hidden_operand_, groups * hidden_rows, workspace.hidden_excess);
    } else {
      context_operand_ = {reinterpret_cast<const float*>(attended_), context_stride_ / P::kStep, 0};
      hidden_operand_ = {reinterpret_cast<const float*>(fed_), fed_stride_ / P::kStep, 0};
    }
  }

  // --- stages; rows are counted from the first sequence's first token ---

  void embed(int64_t sequence) {
    const int64_t begin = batch_.cu_seqlens[sequence], n = batch_.length(sequence), hidden = model_.sizes.hidden;
    for (int64_t t = 0; t < n; ++t) {
      float* out = x_ + (begin - base_ + t) * x_stride_;
      const float* word = batch_.word.row(batch_.ids[begin + t]);
      const float* position = batch_.position.row(t + batch_.position_offset);
      const float* type =
          batch_.token_type ? batch_.token_type->row(batch_.types ? batch_.types[begin + t] : 0) : nullptr;
      for (int64_t i = 0; i < hidden_; i += kWidth) {
        Vec sum = load_some(word + i, hidden - i) + load_some(position + i, hidden - i);
        if (type) sum += load_some(type + i, hidden - i);
        store(out + i, sum);
      }
    }
    normalise(begin - base_, n, model_.norm);
  }

  void project_qkv(const Layer& layer, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    dense_product<P>(x_operand_, row, rows, layer.qkv, panel, panels, [&](int64_t r, int64_t c, auto... values) {
      put(qkv_ + r * qkv_stride_ + c, values...);
    });
  }

  void attend_head(int64_t sequence, int64_t head) {
    const int64_t row = batch_.cu_seqlens[sequence] - base_, size = model_.sizes.padded_head();
    const Activation* queries = qkv_ + row * qkv_stride_ + head * size;
    const Head<Activation> parts{queries,     queries + context_, queries + 2 * context_,
                                 qkv_stride_, size,               batch_.length(sequence)};
    const float* bias = nullptr;
    if (batch_.position_bias) bias = batch_.position_bias->row(head) + batch_.position_bias->cols / 2;
    attend(parts, 1.f / std::sqrt(static_cast<float>(model_.sizes.head())), bias,
           attended_ + row * context_stride_ + head * size, context_stride_);
  }

  // Whether finish_context() has anything to do.
  bool finishes_context() const { return P::kScaled || attended_columns() < context_; }

  void finish_context(int64_t row, int64_t rows) {
    for (int64_t r = row; r < row + rows; ++r) {
      Activation* values = attended_ + r * context_stride_;
      std::fill(values + attended_columns(), values + context_, Activation(0.f));
      if constexpr (P::kScaled) put_row(values, context_, range_of(values, context_), context_operand_, r);
    }
  }

  void project_out(const Layer& layer, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    dense_product<P>(context_operand_, row, rows, layer.out, panel, panels,
                     [&](int64_t r, int64_t c, auto... values) { add_to_x(r, c, values...); });
  }

  void normalise(int64_t row, int64_t rows, const Norm& norm) {
    int64_t r = row;
    for (; r + kNormRows <= row + rows; r += kNormRows) normalise_rows<kNormRows>(r, norm);
    for (; r < row + rows; ++r) normalise_rows<1>(r, norm);
  }

  // Hidden activations of row r and column c lie at (r − corner.row, c − corner.column) of their memory.
  struct Corner {
    int64_t row, column;
  };

  void feed_up(const Layer& layer, Corner corner, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
    using Accuracy =
        std::conditional_t<P::kQuantised, int8_t, std::conditional_t<kFloatActivations, float, BFloat16>>;
    dense_product<P>(x_operand_, row, rows, layer.up, panel, panels, [&](int64_t r, int64_t c, auto... values) {
      const float* factor = layer.hidden_factors + c;
      auto activated = [&](Vec x) {
        if constexpr (!P::kScaled) return gelu(x, Accuracy());
        return gelu(x, Accuracy()) * load(std::exchange(factor, factor + kWidth));
      };
      const Vec fed[] = {activated(values)...};
      Activation* to = fed_ + (r - corner.row) * fed_stride_ + c - corner.column;
      if constexpr (sizeof...(values) == 1) {
        put(to, fed[0]);
      } else {
        put(to, fed[0], fed[1]);
      }
    });
  }

  // Rows of the hidden activations' memory, of which `columns` are there.
  void finish_hidden(int64_t row, int64_t rows, int64_t columns) {
    if constexpr (P::kScaled) {
      for (int64_t r = row; r < row + rows; ++r) {
        for (int64_t column = 0; column < columns; column += kFeedColumns<P>) {
          const Activation* values = fed_ + r * fed_stride_ + column;
          const int64_t n = std::min(kFeedColumns<P>, columns - column);
          put_row(values, n, range_of(values, n), hidden_group(column), r);
        }
      }
    }
  }

  // Of inputs [column, column + columns), kFeedColumns at a time.
  void feed_down(const Layer& layer, Corner corner, int64_t row, int64_t rows, int64_t panel, int64_t panels,
                 int64_t column, int64_t columns) {
    for (int64_t begin = column; begin < column + columns; begin += kFeedColumns<P>) {
      Dense part = layer.down;
      if constexpr (P::kTiled && !P::kQuantised) {
        part.panels = static_cast<const typename P::Weight*>(part.panels) + panel_steps<P>(begin) * kPanelColumns<P>;
        part.inputs = std::min(kFeedColumns<P>, column + columns - begin);
        if (begin > 0) part.bias = nullptr;
      }
      dense_product<P>(hidden_group(begin - corner.column), row - corner.row, rows, part, panel, panels,
                       [&](int64_t r, int64_t c, auto... values) { add_to_x(r + corner.row, c, values...); });
    }
  }

  const float* states(int64_t sequence) const { return x_ + (batch_.cu_seqlens[sequence] - base_) * x_stride_; }
  int64_t states_stride() const { return x_stride_; }

 private:
  static constexpr int kNormRows = 4;
  static constexpr bool kFloatActivations = sizeof(Activation) == sizeof(float);
  static constexpr bool kFloatLanes = P::kStep == 1;  // activations are operands as they lie in memory

  // The rest of a row's last panel is written by no head.
  int64_t attended_columns() const { return model_.sizes.heads * model_.sizes.padded_head(); }

  static Activation* activations(Buffer& buffer, int64_t count) {
    return reinterpret_cast<Activation*>(buffer.reserve(ceil_div(count * sizeof(Activation), sizeof(float))));
  }

  static Operand own_lanes(Buffer& buffer, int64_t rows, int64_t inputs) {
    const int64_t lanes = row_lanes<P>(inputs), stride = (P::kSliced ? kSlices : 1) * lanes + 16;
    return {buffer.reserve(rows * stride), stride, lanes};
  }

  // The operand of hidden activations from `column` of their memory on, a multiple of kFeedColumns.
  Operand hidden_group(int64_t column) const {
    Operand operand = hidden_operand_;
    operand.lanes += column / P::kStep;
    if constexpr (P::kScaled) operand.scales += column / kFeedColumns<P> * hidden_rows_;
    return operand;
  }

  template <class... Vectors>
  void add_to_x(int64_t row, int64_t column, Vectors... values) {
    float* x = x_ + row * x_stride_ + column;
    ((store(x, load(x) + values), x += kWidth), ...);
  }

  template <int kRows>
  void normalise_rows(int64_t row, const Norm& norm) {
    const float eps = static_cast<float>(model_.sizes.eps);
    float *x = x_ + row * x_stride_, *spread = P::kScaled ? spread_rows.reserve(kNormRows * hidden_) : nullptr;
    Range ranges[kRows];
    layer_norm<P::kScaled, kRows>(x, x_stride_, model_.sizes.hidden, norm, eps, spread, ranges);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (P::kScaled) {
        put_row(spread + r * hidden_, hidden_, ranges[r], x_operand_, row + r);
      } else if constexpr (!kFloatLanes) {
        auto* out = reinterpret_cast<Activation*>(const_cast<float*>(x_operand_.lanes) + (row + r) * x_operand_.stride);
        for (int64_t i = 0; i < hidden_; i += kPanel) {
          put(out + i, load(x + r * x_stride_ + i), load(x + r * x_stride_ + i + kWidth));
        }
      }
    }
  }

  // n values (a multiple of kPanel) of this range as row `row` of an operand.
  template <class T>
  static void put_row(const T* values, int64_t n, const Range& range, const Operand& operand, int64_t row) {
    char* out = reinterpret_cast<char*>(const_cast<float*>(operand.lanes) + row * operand.stride);
    float* scale = const_cast<float*>(operand.scales) + row;
    if constexpr (P::kQuantised) {
      const Levels levels(range);
      float* shift = const_cast<float*>(operand.shifts) + row;
      auto* to = reinterpret_cast<Int8Precision::Level*>(out);
      *scale = levels.scale;
      if constexpr (P::kNarrowSums) {
        *shift = put_numbers(values, n, levels, to, operand.excess[row]);
      } else {
        *shift = levels.zero;
        put_levels(values, n, levels, to);
      }
    } else {
      *scale = put_slices(values, n, range, out, 4 * operand.slice_stride);
    }
  }

  const Model& model_;
  const Batch& batch_;
  int64_t base_, hidden_, context_;
  int64_t x_stride_, qkv_stride_, context_stride_, fed_stride_, hidden_rows_;
  float* x_;
  Activation *qkv_, *attended_, *fed_;
  Operand x_operand_, context_operand_, hidden_operand_;
};

}  // namespace triton_st
