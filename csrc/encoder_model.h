// The weights of a BERT encoder, packed once into one piece of memory: its sizes, then every layer's panels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "encoder_product.h"
#include "encoder_rows.h"

namespace triton_st {

enum class Precision : int64_t { kFloat32, kFloat16, kBFloat16, kInt8 };

// Calls f with a value of the type of `precision`.
template <class F>
auto with_precision(Precision precision, F&& f) {
  switch (precision) {
    case Precision::kFloat32:
      return f(Float32Precision());
    case Precision::kFloat16:
      return f(Float16Precision());
    case Precision::kBFloat16:
      return f(BFloat16Precision());
    case Precision::kInt8:
      return f(Int8Precision());
  }
  STD_TORCH_CHECK(false, "not a precision: ", static_cast<int64_t>(precision));
}

inline constexpr int64_t kPackedMagic = 0x7473742d656e6304;
// What the layout depends on besides the sizes: vectors, tiles, and how int8's weights are stored.
inline constexpr int64_t kPackedForm =
    2 * kWidth + kAmx + 64 * Int8Precision::kStep + 2 * Int8Precision::kWeightOffset;

struct Sizes {
  int64_t magic, bytes, precision, form;
  int64_t layers, hidden, heads, intermediate;
  double eps;

  int64_t head() const { return hidden / heads; }
  // Padded sizes: zeros stand in the rest, and stay zeros from layer to layer.
  int64_t padded_hidden() const { return round_up(hidden, kPanel); }
  int64_t padded_intermediate() const { return round_up(intermediate, kPanel); }
  int64_t padded_head() const {
    // Tiles multiply 32 numbers of bf16 at a time.
    const bool tiled = kAmx && (precision == static_cast<int64_t>(Precision::kBFloat16) ||
                                precision == static_cast<int64_t>(Precision::kInt8));
    return round_up(head(), tiled ? kPanel : kWidth);
  }
  int64_t context() const { return round_up(heads * padded_head(), kPanel); }
};

// A LayerNorm. Where rows are scaled the layer that it feeds takes x̂ · spread instead of x̂ · gain + shift, with the rest
// of the gain folded into the weights and the shift into the bias: no feature stretches a token's range alone.
struct Norm {
  const float *gain, *shift, *spread;
};

struct Layer {
  Dense qkv, out, up, down;
  Norm attention_norm, output_norm;
  const float* hidden_factors;  // where rows are scaled: of each hidden activation, the inverse folded into `down`
};

struct Model {
  Sizes sizes;
  Norm norm;
  std::vector<Layer> layers;
};

// Hands out pieces of the packed memory, each from a cache line's beginning on.
class Pieces {
 public:
  explicit Pieces(char* begin) : begin_(begin) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = at_;
    at_ = round_up(at_ + count * static_cast<int64_t>(sizeof(T)), kLine);
    return reinterpret_cast<T*>(begin_ + at);
  }
  int64_t bytes() const { return at_; }

 private:
  char* begin_;
  int64_t at_ = 0;
};

template <class P>
Dense lay_out_dense(Pieces& pieces, int64_t inputs, int64_t outputs) {
  Dense dense{};
  dense.inputs = inputs;
  dense.outputs = outputs;
  dense.panel_steps = panel_steps<P>(inputs);
  dense.panels = pieces.take<typename P::Weight>(dense.panel_steps * outputs);
  dense.bias = pieces.take<float>(outputs);
  if constexpr (P::kScaled) dense.scales = pieces.take<float>(outputs);
  if constexpr (P::kQuantised) dense.offsets = pieces.take<float>(outputs);
  return dense;
}

template <class P>
Norm lay_out_norm(Pieces& pieces, int64_t hidden) {
  Norm norm{};
  norm.gain = pieces.take<float>(hidden);
  norm.shift = pieces.take<float>(hidden);
  if constexpr (P::kScaled) norm.spread = pieces.take<float>(hidden);
  return norm;
}

// Where everything is in the memory from `begin` on; the number of bytes goes to sizes.bytes.
template <class P>
Model lay_out(Sizes sizes, char* begin) {
  Pieces pieces(begin);
  pieces.take<Sizes>(1);
  const int64_t hidden = sizes.padded_hidden(), intermediate = sizes.padded_intermediate(), context = sizes.context();
  Model model{sizes, lay_out_norm<P>(pieces, hidden), {}};
  for (int64_t i = 0; i < sizes.layers; ++i) {
    Layer layer{};
    layer.qkv = lay_out_dense<P>(pieces, hidden, 3 * context);
    layer.out = lay_out_dense<P>(pieces, context, hidden);
    layer.up = lay_out_dense<P>(pieces, hidden, intermediate);
    layer.down = lay_out_dense<P>(pieces, intermediate, hidden);
    layer.attention_norm = lay_out_norm<P>(pieces, hidden);
    layer.output_norm = lay_out_norm<P>(pieces, hidden);
    if constexpr (P::kScaled) layer.hidden_factors = pieces.take<float>(intermediate);
    model.layers.push_back(layer);
  }
  model.sizes.bytes = pieces.bytes();
  return model;
}

// --- packing ---

// A weight [N, K] with its bias [N], and where its rows and columns go in the padded product.
struct DenseSource {
  std::vector<const float*> rows;  // of each padded output; null stands for zeros
  std::vector<float> bias;
  std::vector<int64_t> columns;    // of each padded input; −1 stands for zeros
  std::vector<float> factors;      // of each padded input; none: ones
  std::vector<float> row_factors;  // of each padded output, which the bias has already; none: ones

  float at(int64_t output, int64_t input) const {
    if (!rows[output] || input >= static_cast<int64_t>(columns.size()) || columns[input] < 0) return 0.f;
    const float weight = rows[output][columns[input]] * (factors.empty() ? 1.f : factors[input]);
    return row_factors.empty() ? weight : weight * row_factors[output];
  }
};

// A column's weights as integers of magnitude up to `largest`: per-channel, symmetric. `scale` is what `unit` of them
// count, NaN where a weight is not finite.
class Channel {
 public:
  Channel(const DenseSource& source, int64_t output, int64_t inputs, int64_t largest, int64_t unit)
      : source_(source), output_(output) {
    float most = 0.f, nothing = 0.f;
    for (int64_t k = 0; k < inputs; ++k) {
      most = std::max(most, std::fabs(source.at(output, k)));
      nothing += source.at(output, k) * 0.f;
    }
    scale = most * (static_cast<float>(unit) / static_cast<float>(largest)) + nothing;
    if (most >= std::numeric_limits<float>::min() && nothing == 0.f) inverse_ = largest / static_cast<double>(most);
  }
  int64_t integer(int64_t input) const {
    return inverse_ == 0. ? 0 : static_cast<int64_t>(std::nearbyint(source_.at(output_, input) * inverse_));
  }
  float scale;

 private:
  const DenseSource& source_;
  int64_t output_;
  double inverse_ = 0.;
};

template <class P>
void pack_dense(const Dense& dense, const DenseSource& source) {
  using Weight = typename P::Weight;
  auto* panels = static_cast<Weight*>(const_cast<void*>(dense.panels));
  const int64_t steps = dense.panel_steps;
  constexpr int64_t kColumns = kPanelColumns<P>;
  parallel(dense.outputs / kColumns, dense.outputs * dense.inputs, [&](int64_t panel) {
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t n = panel * kColumns + c;
      Weight* out = panels + panel * steps * kColumns + c;
      const_cast<float*>(dense.bias)[n] = source.bias[n];
      if constexpr (P::kQuantised) {
        const Channel channel(source, n, dense.inputs, 127, 1);
        int64_t sum = 0;
        for (int64_t step = 0; step < steps; ++step, out += kColumns) {
          typename P::Number numbers[P::kStep];
          for (int i = 0; i < P::kStep; ++i) {
            const int64_t integer = channel.integer(step * P::kStep + i);
            numbers[i] = static_cast<typename P::Number>(integer + P::kWeightOffset);
            sum += integer;
          }
          std::memcpy(out, numbers, sizeof numbers);
        }
        const_cast<float*>(dense.scales)[n] = channel.scale;
        const_cast<float*>(dense.offsets)[n] = static_cast<float>(P::kNarrowSums ? P::kWeightOffset : sum);
#if defined(TRITON_ST_AMX)
      } else if constexpr (P::kSliced) {
        constexpr int kCount = P::kWeightSlices;
        const Channel channel(source, n, dense.inputs, largest_fixed(kCount), 1 << 8 * (kCount - 1));
        // Slice by slice of each chunk of kAmxLanes steps.
        for (int64_t step = 0; step < steps / kCount; ++step) {
          int8_t slices[kCount][P::kStep];
          for (int i = 0; i < P::kStep; ++i) {
            int64_t rest = channel.integer(step * P::kStep + i);
            for (int slice = kCount - 1; slice >= 0; --slice) {
              slices[slice][i] = static_cast<int8_t>(rest);  // its low byte: what is left is a multiple of 256
              rest = (rest - slices[slice][i]) / 256;
            }
          }
          for (int slice = 0; slice < kCount; ++slice) {
            const int64_t at = (step / kAmxLanes * kCount + slice) * kAmxLanes + step % kAmxLanes;
            std::memcpy(out + at * kColumns, slices[slice], sizeof slices[slice]);
          }
        }
        const_cast<float*>(dense.scales)[n] = channel.scale;
#endif
      } else if constexpr (P::kStep == 2) {
        for (int64_t step = 0; step < steps; ++step, out += kColumns) {
          const BFloat16 pair[2] = {BFloat16(source.at(n, 2 * step)), BFloat16(source.at(n, 2 * step + 1))};
          std::memcpy(out, pair, sizeof pair);
        }
      } else {
        for (int64_t step = 0; step < steps; ++step, out += kColumns) *out = static_cast<Weight>(source.at(n, step));
      }
    }
  });
}

// Makes weights for x̂ · spread of weights for x̂ · gain + shift.
inline void fold(const Norm& norm, DenseSource& source) {
  const int64_t inputs = static_cast<int64_t>(source.columns.size());
  for (size_t n = 0; n < source.rows.size(); ++n) {
    double sum = source.bias[n];
    for (int64_t k = 0; k < inputs; ++k) sum += static_cast<double>(source.at(n, k)) * norm.shift[k];
    source.bias[n] = static_cast<float>(sum);
  }
  for (int64_t k = 0; k < inputs; ++k) {
    source.factors.push_back(norm.spread[k] == 0.f ? 0.f : norm.gain[k] / norm.spread[k]);
  }
}

inline void copy_padded(const float* from, int64_t n, const float* to, int64_t padded) {
  float* out = const_cast<float*>(to);
  std::copy_n(from, n, out);
  std::fill_n(out + n, padded - n, 0.f);
}

// Source of each of `padded` features, −1 past the n-th.
inline std::vector<int64_t> plain_features(int64_t n, int64_t padded) {
  std::vector<int64_t> features(padded, -1);
  for (int64_t i = 0; i < n; ++i) features[i] = i;
  return features;
}

// The same where each head is padded by itself.
inline std::vector<int64_t> head_features(const Sizes& sizes) {
  std::vector<int64_t> features(sizes.context(), -1);
  for (int64_t i = 0; i < sizes.hidden; ++i) {
    features[i / sizes.head() * sizes.padded_head() + i % sizes.head()] = i;
  }
  return features;
}

// `weights`: gain and shift of the embeddings' LayerNorm; then of each layer weight and bias of query, key, value and
// output projection, gain, shift, weight and bias of both feed-forward layers, gain, shift. Where rows are scaled each
// shift is followed by `spread`, and query and the feed-forward weights by what the values and the hidden activations
// are divided by.
template <class P>
Tensor pack(const Sizes& wanted, const std::vector<Tensor>& weights) {
  if constexpr (P::kScaled) {
    // Inputs whose products an integer can sum: three of signed bytes for each, or one of unsigned ones.
    constexpr int64_t kMost = 32768;
    static_assert(kMost * std::max(3 * 128 * 128, 255 * 255) <= std::numeric_limits<int32_t>::max());
    STD_TORCH_CHECK(std::max(wanted.hidden, P::kQuantised ? wanted.intermediate : 0) <= kMost,
                    "encoder_pack: more than ", kMost, " inputs of a layer");
  }
  const Sizes sizes = lay_out<P>(wanted, nullptr).sizes;
  Tensor packed = empty({sizes.bytes}, ScalarType::Byte);
  char* begin = data<char>(packed);
  std::memcpy(begin, &sizes, sizeof sizes);
  const Model model = lay_out<P>(sizes, begin);
  const int64_t hidden = sizes.hidden, padded = sizes.padded_hidden();
  const auto heads = head_features(sizes), plain = plain_features(hidden, padded),
             wide = plain_features(sizes.intermediate, sizes.padded_intermediate());
  size_t next = 0;
  auto take = [&](int64_t size) {
    STD_TORCH_CHECK(next < weights.size(), "encoder_pack: too few weights");
    const Tensor& x = weights[next++];
    STD_TORCH_CHECK(x.numel() == size && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                    "encoder_pack: weight ", next - 1, " should be ", size, " contiguous float32 values");
    return static_cast<const float*>(x.const_data_ptr());
  };
  auto read_norm = [&](const Norm& norm) {
    copy_padded(take(hidden), hidden, norm.gain, padded);
    copy_padded(take(hidden), hidden, norm.shift, padded);
    if (norm.spread) copy_padded(take(hidden), hidden, norm.spread, padded);
    return norm;
  };
  // What features are divided by, in their padded places; none: ones.
  auto read_factors = [&](int64_t size, const std::vector<int64_t>& features) {
    std::vector<float> factors;
    if constexpr (P::kScaled) {
      const float* from = take(size);
      for (const int64_t i : features) factors.push_back(i < 0 ? 1.f : from[i]);
    }
    return factors;
  };
  auto read_source = [&](int64_t inputs, int64_t outputs, const std::vector<int64_t>& columns,
                         const std::vector<int64_t>& rows, int parts) {
    DenseSource source;
    source.columns = columns;
    for (int part = 0; part < parts; ++part) {
      const float* weight = take(outputs * inputs);
      const float* bias = take(outputs);
      for (const int64_t n : rows) {
        source.rows.push_back(n < 0 ? nullptr : weight + n * inputs);
        source.bias.push_back(n < 0 ? 0.f : bias[n]);
      }
    }
    return source;
  };
  Norm norm = read_norm(model.norm);
  for (const Layer& layer : model.layers) {
    const std::vector<float> value_factors = read_factors(hidden, heads);
    DenseSource qkv = read_source(hidden, hidden, plain, heads, 3);
    if constexpr (P::kScaled) {
      qkv.row_factors.assign(qkv.rows.size(), 1.f);
      const size_t values = 2 * heads.size();
      for (size_t i = 0; i < heads.size(); ++i) {
        qkv.row_factors[values + i] = 1.f / value_factors[i];
        qkv.bias[values + i] /= value_factors[i];
      }
      fold(norm, qkv);
    }
    pack_dense<P>(layer.qkv, qkv);
    DenseSource out = read_source(hidden, hidden, heads, plain, 1);
    out.factors = value_factors;
    pack_dense<P>(layer.out, out);
    norm = read_norm(layer.attention_norm);
    const std::vector<float> hidden_factors = read_factors(sizes.intermediate, wide);
    DenseSource up = read_source(hidden, sizes.intermediate, plain, wide, 1);
    if constexpr (P::kScaled) fold(norm, up);
    pack_dense<P>(layer.up, up);
    DenseSource down = read_source(sizes.intermediate, hidden, wide, plain, 1);
    down.factors = hidden_factors;
    pack_dense<P>(layer.down, down);
    for (size_t i = 0; i < hidden_factors.size(); ++i) {
      const_cast<float*>(layer.hidden_factors)[i] = 1.f / hidden_factors[i];
    }
    norm = read_norm(layer.output_norm);
  }
  return packed;
}

}  // namespace triton_st
