// A transformer layer, taken a few sequences at a time through all of its steps: what both directions share.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "attention.h"
#include "layer_norm.h"
#include "linear.h"
#include "philox.h"
#include "relative_bias.h"
#include "sequences.h"
#include "tensor.h"
#include "vector.h"

namespace triton_st {

// Where a layer drops, counted from its stream.
enum Site : int64_t { kAttentionSite, kProjectionSite, kFeedForwardSite };

// A layer's parameters in the order in which operators take them.
enum Parameter {
  kQkvWeight,
  kQkvBias,
  kProjectionWeight,
  kProjectionBias,
  kNorm1Weight,
  kNorm1Bias,
  kUpWeight,
  kUpBias,
  kDownWeight,
  kDownBias,
  kNorm2Weight,
  kNorm2Bias,
  kParameters
};

using Parameters = std::array<const float*, kParameters>;

struct LayerSizes {
  int64_t tokens, hidden, inner, heads;
  int64_t head_size() const { return hidden / heads; }
  int64_t weights() const { return hidden * (4 * hidden + 2 * inner); }
  // Nanoseconds that `products` products of all tokens with all weights take, roughly.
  int64_t cost(int64_t products) const { return tokens * products * weights() / (8 * kWidth); }
};

struct LayerDropout {
  Dropout attention, projection, feed_forward;

  LayerDropout(const std::optional<Tensor>& seed, double attention_p, double projection_p, double hidden_p,
               int64_t stream)
      : attention(dropout_of(seed, attention_p, stream + kAttentionSite)),
        projection(dropout_of(seed, projection_p, stream + kProjectionSite)),
        feed_forward(dropout_of(seed, hidden_p, stream + kFeedForwardSite)) {}
};

// What the forward pass keeps for the backward pass, in the activations' type T, a row per token; F is float.
template <class T, class F>
struct Kept {
  T* qkv;        // [tokens, 3, heads, head size]
  F* logsumexp;  // [heads, tokens], of attention's scores
  T* attended;   // [tokens, hidden]
  T* norm1;      // [tokens, hidden], the first LayerNorm's result without its weight and bias
  F* rstd1;      // [tokens], what its sums were multiplied by
  T* pre;        // [tokens, inner], before GELU
  T* norm2;      // [tokens, hidden]
  F* rstd2;      // [tokens]
};

// Sequences [first, last), which are tokens [begin, end).
struct Chunk {
  int64_t first, last, begin, end;
  int64_t tokens() const { return end - begin; }
};

// Rows that go through products together: what becomes of them fits the second-level cache where layers are narrow, and
// weights are read seldom enough where they are wide.
inline constexpr int64_t kLayerRows = 192;

// Whole sequences of at most kLayerRows tokens together; a longer one is alone. Depends on the lengths alone.
inline std::vector<Chunk> chunks_of(const Sequences& sequences) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < sequences.count();) {
    const int64_t first = s++, begin = sequences.start(first);
    while (s < sequences.count() && sequences.start(s + 1) - begin <= kLayerRows) ++s;
    if (sequences.start(s) > begin) chunks.push_back({first, s, begin, sequences.start(s)});
  }
  return chunks;
}

// Calls f(row, count) for blocks of at most kLayerRows of `rows` rows.
template <class F>
void for_row_blocks(int64_t rows, F&& f) {
  const int64_t blocks = ceil_div(rows, kLayerRows);
  for (int64_t b = 0; b < blocks; ++b) f(rows * b / blocks, rows * (b + 1) / blocks - rows * b / blocks);
}

}  // namespace triton_st
