// The inference encoder: a BERT-family model's weights packed once; packed sequences in, embeddings out, in one call.
//
// Where there is work for it, each thread takes runs of whole sequences through all layers by itself, with no barrier,
// its activations in its own cache. A few short sequences are worked on by all threads together, stage by stage:
// reading the weights is then what takes time, and each thread reads its share. So are a few long ones that would leave
// half of the threads idle. Both ways give the same bits.
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <thread>

#include "encoder_pass.h"
#include "encoder_pool.h"

namespace triton_st {
namespace {

thread_local Workspace workspace;

// Tokens that one thread takes through all layers at a time, and the most that threads share. With AVX-512 runs of
// 256 take the time of longer ones and less memory; with tiles 384 alone was measured.
constexpr int64_t kRunTokens = kAmx ? 384 : kRowsAtOnce;
constexpr int64_t kLeastRunTokens = 64;
constexpr int64_t kSharedTokensPerThread = 64;
constexpr int64_t kSharedTokens = 2048;  // of long sequences: what all their activations take in memory stays allocated
constexpr int64_t kItemRows = 4, kItemColumns = 64;  // of a shared stage
constexpr int64_t kUnitsPerThread = 3;               // few to draw, and no long wait for the last

template <class P>
void finish_sequence(const Pass<P>& pass, const Batch& batch, const Output& output, int64_t hidden, int64_t s) {
  write_output(output, s, pass.states(s), pass.states_stride(), batch.cu_seqlens[s], batch.length(s), hidden,
               workspace.pooled);
}

// --- one thread, whole sequences ---

// Bytes of a thread's second-level cache.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    int64_t said = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    said = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return said > 0 ? std::clamp<int64_t>(said, 512 << 10, 4 << 20) : 1 << 20;
  }();
  return bytes;
}

// Rows of a block, for which half of the second-level cache is kept: for the widest activations, or, with tiles, which
// wait for memory sooner, for all of the feed-forward layers': sums, their operand, hidden activations and, where rows
// are scaled, their operand. Where vectors are short it is as many halves as a weight has bytes: they have time to fetch
// activations from behind that cache, and gain more by fetching weights less often.
template <class P>
int64_t most_block_rows(const Sizes& sizes) {
  constexpr int64_t kActivation = sizeof(typename P::Activation), kOperand = P::kSliced ? kSlices : 4 / P::kStep;
  const int64_t columns = std::min(sizes.padded_intermediate(), kFeedColumns<P>), hidden = sizes.padded_hidden();
  int64_t row_bytes = columns * kActivation;
  if (P::kTiled) row_bytes += (4 + kOperand) * hidden + (P::kScaled ? columns * kOperand : 0);
  const int64_t halves = kWidth == 16 ? 1 : sizeof(typename P::Weight) / P::kStep;
  return std::max<int64_t>(halves * cache_bytes() / 2 / row_bytes / kGroupRows<P>, 1) * kGroupRows<P>;
}

template <class P>
void run_alone(const Model& model, const Batch& batch, const Output& output, int64_t first, int64_t last) {
  const Sizes& sizes = model.sizes;
  const int64_t rows = batch.cu_seqlens[last] - batch.cu_seqlens[first], intermediate = sizes.padded_intermediate();
  const int64_t even = ceil_div(rows, std::max<int64_t>(ceil_div(rows, most_block_rows<P>(sizes)), 1));
  const int64_t block_rows = round_up(even, kGroupRows<P>);
  const int64_t feed_columns = std::min(intermediate, kFeedColumns<P>);
  Pass<P> pass(model, batch, workspace, first, last, block_rows, feed_columns);
  auto for_blocks = [&](auto&& f) {
    for (int64_t row = 0; row < rows; row += block_rows) f(row, std::min(block_rows, rows - row));
  };
  [[maybe_unused]] const Tiles<P> tiles;
  for (int64_t s = first; s < last; ++s) pass.embed(s);
  for (const Layer& layer : model.layers) {
    for_blocks([&](int64_t row, int64_t n) { pass.project_qkv(layer, row, n, 0, layer.qkv.outputs / kPanelColumns<P>); });
    for (int64_t s = first; s < last; ++s) {
      for (int64_t head = 0; head < sizes.heads; ++head) pass.attend_head(s, head);
    }
    for_blocks([&](int64_t row, int64_t n) {
      pass.finish_context(row, n);
      pass.project_out(layer, row, n, 0, layer.out.outputs / kPanelColumns<P>);
      pass.normalise(row, n, layer.attention_norm);
      for (int64_t column = 0; column < intermediate; column += feed_columns) {
        const int64_t columns = std::min(feed_columns, intermediate - column);
        pass.feed_up(layer, {row, column}, row, n, column / kPanelColumns<P>, columns / kPanelColumns<P>);
        pass.finish_hidden(0, n, columns);
        pass.feed_down(layer, {row, column}, row, n, 0, layer.down.outputs / kPanelColumns<P>, column, columns);
      }
      pass.normalise(row, n, layer.output_norm);
    });
  }
  for (int64_t s = first; s < last; ++s) finish_sequence(pass, batch, output, sizes.hidden, s);
}

bool worth_sharing(const Batch& batch, int64_t tokens, int64_t threads) {
  const bool short_batch = tokens <= threads * kSharedTokensPerThread;
  const bool few_sequences = 2 * batch.sequences <= threads && tokens <= kSharedTokens;
  return threads > 1 && (short_batch || few_sequences);
}

// Runs of about `most` tokens, shorter towards the end so that threads finish together.
std::vector<int64_t> cut_runs(const Batch& batch, int64_t threads, int64_t most) {
  std::vector<int64_t> bounds{0};
  const int64_t total = batch.cu_seqlens[batch.sequences];
  for (int64_t s = 0; s < batch.sequences;) {
    const int64_t begin = batch.cu_seqlens[s];
    const int64_t wanted = std::clamp((total - begin) / (2 * threads), kLeastRunTokens, most);
    do {
      ++s;
    } while (s < batch.sequences && batch.cu_seqlens[s + 1] - begin <= wanted);
    bounds.push_back(s);
  }
  return bounds;
}

// --- all threads together, stage by stage ---

// Stages of items, which are cut into units. Units are numbered through all stages. Threads draw the next unit; it begins
// when all units of earlier stages are done. Whoever draws is running, so nobody ever waits for a thread that has not
// come.
class Stages {
 public:
  explicit Stages(int64_t threads) : threads_(threads) {}

  void add(int64_t items) {
    const int64_t size = std::max<int64_t>(ceil_div(items, kUnitsPerThread * threads_), 1);
    const int64_t begin = stages_.empty() ? 0 : stages_.back().end;
    stages_.push_back({items, size, begin, begin + ceil_div(items, size)});
  }

  // f(stage, item, items) works on so many items of a stage, from `item` on.
  template <class F>
  void work(F&& f) {
    for (int64_t index = 0;;) {
      const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
      if (unit >= stages_.back().end) return;
      while (unit >= stages_[index].end) ++index;
      const Stage& stage = stages_[index];
      for (int64_t spins = 0; done_.load(std::memory_order_acquire) < stage.begin; ++spins) {
        if (spins > 5000) std::this_thread::yield();
      }
      const int64_t item = (unit - stage.begin) * stage.size;
      f(index, item, std::min(stage.size, stage.items - item));
      done_.fetch_add(1, std::memory_order_release);
    }
  }

 private:
  struct Stage {
    int64_t items, size;  // of the stage, of a unit
    int64_t begin, end;   // units
  };
  std::vector<Stage> stages_;
  int64_t threads_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

template <class P>
void run_together(const Model& model, const Batch& batch, const Output& output, int64_t threads) {
  const Sizes& sizes = model.sizes;
  const int64_t rows = batch.cu_seqlens[batch.sequences];
  Pass<P> pass(model, batch, workspace, 0, batch.sequences, rows, sizes.padded_intermediate());
  auto columns = [](const Dense& dense) { return ceil_div(dense.outputs, kItemColumns); };
  const int64_t groups = ceil_div(rows, kItemRows), heads = batch.sequences * sizes.heads;
  constexpr int64_t kPerLayer = 9, kItemPanels = kItemColumns / kPanelColumns<P>;
  Stages stages(threads);
  stages.add(batch.sequences);
  for (const Layer& layer : model.layers) {
    for (const int64_t items : {columns(layer.qkv), heads, pass.finishes_context() ? groups : 0, columns(layer.out),
                                groups, columns(layer.up), P::kScaled ? groups : 0, columns(layer.down), groups}) {
      stages.add(items);
    }
  }
  stages.add(batch.sequences);
  auto run_unit = [&](int64_t stage, int64_t item, int64_t items) {
    auto each = [&](auto&& f) {
      for (int64_t i = item; i < item + items; ++i) f(i);
    };
    if (stage == 0) return each([&](int64_t s) { pass.embed(s); });
    if (stage == 1 + kPerLayer * sizes.layers) {
      return each([&](int64_t s) { finish_sequence(pass, batch, output, sizes.hidden, s); });
    }
    const Layer& layer = model.layers[(stage - 1) / kPerLayer];
    const int64_t row = item * kItemRows, n = std::min(items * kItemRows, rows - row), panel = item * kItemPanels;
    auto panels = [&](const Dense& dense) {
      return std::min(items * kItemPanels, dense.outputs / kPanelColumns<P> - panel);
    };
    switch ((stage - 1) % kPerLayer) {
      case 0:
        return pass.project_qkv(layer, 0, rows, panel, panels(layer.qkv));
      case 1:
        return each([&](int64_t i) { pass.attend_head(i / sizes.heads, i % sizes.heads); });
      case 2:
        return pass.finish_context(row, n);
      case 3:
        return pass.project_out(layer, 0, rows, panel, panels(layer.out));
      case 4:
        return pass.normalise(row, n, layer.attention_norm);
      case 5:
        return pass.feed_up(layer, {0, 0}, 0, rows, panel, panels(layer.up));
      case 6:
        return pass.finish_hidden(row, n, sizes.padded_intermediate());
      case 7:
        return pass.feed_down(layer, {0, 0}, 0, rows, panel, panels(layer.down), 0, sizes.padded_intermediate());
      default:
        return pass.normalise(row, n, layer.output_norm);
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const Tiles<P> tiles;
    stages.work(run_unit);
  });
}

// --- operators ---

Tensor encoder_pack(int64_t precision, int64_t layers, int64_t hidden, int64_t heads, int64_t intermediate, double eps,
                    const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(heads > 0 && hidden % heads == 0, "encoder_pack: hidden should be a multiple of heads");
#if defined(__GLIBC__)
  malloc_trim(0);  // what scaling the weights took lies in the heap in holes, as much as packed weights take
#endif
  const Sizes sizes{kPackedMagic, 0, precision, kPackedForm, layers, hidden, heads, intermediate, eps};
  return with_precision(static_cast<Precision>(precision), [&](auto p) { return pack<decltype(p)>(sizes, weights); });
}

// Whether rows of activations have scales, so that weights are scaled to match (LayerNorms come with `spread`).
bool encoder_scales_rows(int64_t precision) {
  return with_precision(static_cast<Precision>(precision), [](auto p) { return decltype(p)::kScaled; });
}

// x [n, K] · weight [N, K]ᵀ + bias, every row's bits its own: a library's product depends on how many rows there are.
Tensor encoder_dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && x.is_contiguous() &&
                      weight.is_contiguous() && x.scalar_type() == ScalarType::Float &&
                      weight.scalar_type() == ScalarType::Float,
                  "encoder_dense: expected contiguous float32 [n, K] and [N, K]");
  STD_TORCH_CHECK(!bias || (bias->numel() == weight.size(0) && bias->is_contiguous() &&
                            bias->scalar_type() == ScalarType::Float),
                  "encoder_dense: expected a contiguous float32 bias [N]");
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0), padded = round_up(outputs, kPanel);
  Buffer panels(inputs * padded), biases(padded);
  const Dense dense{panels.get(), biases.get(), nullptr, nullptr, inputs, padded, inputs};
  DenseSource source{{}, {}, plain_features(inputs, inputs), {}};
  for (int64_t n = 0; n < padded; ++n) {
    source.rows.push_back(n < outputs ? static_cast<const float*>(weight.const_data_ptr()) + n * inputs : nullptr);
    source.bias.push_back(bias && n < outputs ? static_cast<const float*>(bias->const_data_ptr())[n] : 0.f);
  }
  pack_dense<FloatPrecision>(dense, source);
  Tensor out = empty({rows, outputs}, ScalarType::Float);
  float* result = data<float>(out);
  const Operand operand{static_cast<const float*>(x.const_data_ptr()), inputs, 0};
  constexpr int64_t kRows = 8 * kTileRows;
  parallel(ceil_div(rows, kRows), rows * inputs * outputs / 64, [&](int64_t block) {
    const int64_t row = block * kRows;
    dense_product<FloatPrecision>(operand, row, std::min(kRows, rows - row), dense, 0, padded / kPanel,
                                  [&](int64_t r, int64_t c, Vec low, Vec high) {
                                    store_some(result + r * outputs + c, low, outputs - c);
                                    store_some(result + r * outputs + c + kWidth, high, outputs - c - kWidth);
                                  });
  });
  return out;
}

const int32_t* integers(const std::optional<Tensor>& x) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Int && x->is_contiguous(), "expected contiguous int32");
  return static_cast<const int32_t*>(x->const_data_ptr());
}

// What Python has not checked yet: a wrong index would read anywhere.
void check(const Batch& batch, int64_t tokens) {
  STD_TORCH_CHECK(batch.cu_seqlens[0] == 0 && batch.cu_seqlens[batch.sequences] == tokens,
                  "cu_seqlens: expected to run from 0 to ", tokens);
  for (int64_t s = 0; s < batch.sequences; ++s) {
    STD_TORCH_CHECK(batch.length(s) >= 0 && batch.length(s) + batch.position_offset <= batch.position.rows,
                    "cu_seqlens: a sequence of ", batch.length(s), " tokens");
    STD_TORCH_CHECK(!batch.position_bias || batch.length(s) + kPanel <= batch.position_bias->cols / 2 + 1,
                    "position_bias: too narrow for a sequence of ", batch.length(s), " tokens");
  }
  for (int64_t t = 0; t < tokens; ++t) {
    STD_TORCH_CHECK(batch.ids[t] >= 0 && batch.ids[t] < batch.word.rows, "input_ids: ", batch.ids[t],
                    " is outside the vocabulary");
    if (!batch.types) continue;
    STD_TORCH_CHECK(batch.token_type && batch.types[t] >= 0 && batch.types[t] < batch.token_type->rows,
                    "token_type_ids: ", batch.types[t], " is not a type");
  }
}

void encoder_forward(const Tensor& packed, const Tensor& word, const Tensor& position,
                     const std::optional<Tensor>& token_type, const std::optional<Tensor>& position_bias,
                     int64_t position_offset, const Tensor& input_ids, const Tensor& cu_seqlens,
                     const std::optional<Tensor>& token_type_ids, int64_t pooling, int64_t prompt_length,
                     bool normalise, const Tensor& out) {
  Sizes sizes;
  STD_TORCH_CHECK(packed.numel() >= static_cast<int64_t>(sizeof sizes), "encoder_forward: not packed weights");
  char* begin = data<char>(packed);
  std::memcpy(&sizes, begin, sizeof sizes);
  STD_TORCH_CHECK(sizes.magic == kPackedMagic && sizes.bytes == packed.numel() && sizes.form == kPackedForm,
                  "encoder_forward: not weights that were packed for this processor");
  Batch batch{integers(input_ids), integers(cu_seqlens), integers(token_type_ids), cu_seqlens.numel() - 1,
              matrix<float>(word), matrix<float>(position), std::nullopt, position_offset, std::nullopt};
  if (token_type) batch.token_type = matrix<float>(*token_type);
  if (position_bias) batch.position_bias = matrix<float>(*position_bias);
  if (batch.sequences == 0) return;
  check(batch, input_ids.numel());
  const Output output{data<float>(out), out.stride(0), out.size(1), pooling, prompt_length, normalise};
  with_precision(static_cast<Precision>(sizes.precision), [&](auto p) {
    using P = decltype(p);
    const Model model = lay_out<P>(sizes, begin);
    const int64_t threads = torch::stable::get_num_threads();
    if (worth_sharing(batch, input_ids.numel(), threads)) return run_together<P>(model, batch, output, threads);
    // Tiles take a block through all products at a time, for what they wait for is weights.
    const int64_t most = P::kTiled ? std::max(most_block_rows<P>(sizes), kLeastRunTokens) : kRunTokens;
    const auto runs = cut_runs(batch, threads, most);
    parallel(static_cast<int64_t>(runs.size()) - 1, kWorthThreads,
             [&](int64_t run) { run_alone<P>(model, batch, output, runs[run], runs[run + 1]); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "encoder_pack(int precision, int layers, int hidden, int heads, int intermediate, float eps, Tensor[] weights) "
      "-> Tensor");
  m.def("encoder_scales_rows(int precision) -> bool");
  m.def("encoder_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "encoder_forward(Tensor packed, Tensor word, Tensor position, Tensor? token_type, Tensor? position_bias, "
      "int position_offset, Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, int pooling, "
      "int prompt_length, bool normalise, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CompositeExplicitAutograd, m) {
  m.impl("encoder_scales_rows", TORCH_BOX(&encoder_scales_rows));
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("encoder_pack", TORCH_BOX(&encoder_pack));
  m.impl("encoder_dense", TORCH_BOX(&encoder_dense));
  m.impl("encoder_forward", TORCH_BOX(&encoder_forward));
}

}  // namespace triton_st
