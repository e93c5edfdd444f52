// Mean pooling of padded and of packed token states, and its gradient. Both directions move every byte once and are
// bound by memory. Sums run over pieces of at most kPiece tokens, whatever the number of threads, and pieces are added
// in order: one long sequence is shared by all threads and the result is the same, bit for bit, on any number of them.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "mask.h"
#include "sequences.h"
#include "tensor.h"

namespace triton_st {
namespace {

constexpr int64_t kPiece = 128;
constexpr int64_t kUnitBytes = 128 << 10;  // what a thread takes at a time
constexpr int64_t kBytesPerNanosecond = 30;

thread_local Buffer scratch;

// As parallel(), but each thread begins in its own stretch of neighbouring units, the same one in every call, and helps
// out in another's when it is done. Memory that is used again and again, as the allocator's is, then stays in the
// caches of the core that had it last, and no two threads wait for the system to clear the same new page: up to three
// times as fast as units taken in one order by all.
template <class F>
void parallel_stretches(int64_t units, int64_t nanoseconds, F&& f) {
  constexpr int64_t kMost = 64;
  struct alignas(64) Next {
    std::atomic<int64_t> unit;
  };
  const int64_t threads = nanoseconds < kWorthThreads
                              ? 1
                              : std::min<int64_t>({units, torch::stable::get_num_threads(), kMost});
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
    return;
  }
  std::array<Next, kMost> next;
  for (int64_t t = 0; t < threads; ++t) next[t].unit = units * t / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t t = (begin + i) % threads, end = units * (t + 1) / threads;
      for (int64_t unit; (unit = next[t].unit.fetch_add(1, std::memory_order_relaxed)) < end;) f(unit);
    }
  });
}

// --- sums and means of rows ---

// Vectors of a row whose sums stay in registers while the rows go by. A row that fits is then read as one stream with
// one instruction for each vector, which is what lets the processor have the most lines of memory on their way: half as
// fast again as sums kept in memory, and as fast as any sum of so many bytes.
#if defined(TRITON_ST_AVX512)
inline constexpr int kSumVectors = 24;
#else
inline constexpr int kSumVectors = 12;
#endif

// Tokens next to each other, all wanted.
template <class T>
struct Run {
  const T* first;
  int64_t count;
};

// Goes through the rows of runs as their sums do, about kPrefetchBytes earlier, to ask for them by name: the
// processor's own prefetching knows nothing of the run after this one, and is too slow for half precision, whose
// widening fills its window of instructions.
template <class T>
class Ahead {
 public:
  Ahead(const Run<T>* runs, int64_t count, int64_t row_bytes) : runs_(runs), last_(count - 1) {
    row_ = kPrefetchBytes / std::max<int64_t>(row_bytes, 1);
    for (; run_ < last_ && row_ >= runs_[run_].count; ++run_) row_ -= runs_[run_].count;
  }

  // The row to ask for now; the last one again and again where there are no more.
  const T* next(int64_t stride) {
    const Run<T> run = runs_[run_];
    const T* row = run.first + std::min(row_, run.count - 1) * stride;
    if (++row_ >= run.count && run_ < last_) {
      ++run_;
      row_ = 0;
    }
    return row;
  }

 private:
  static constexpr int64_t kPrefetchBytes = 8 << 10;

  const Run<T>* runs_;
  int64_t run_ = 0, last_, row_;
};

// `count` adjacent vectors of sums = (or, onto them, +=) those of the run's rows; of the last vector `last` elements
// count.
template <class T, int kCount, bool kWhole>
void add_columns(float* sums, Run<T> run, Ahead<T>& ahead, int64_t column, int64_t stride, int last, bool onto) {
  sums += column;
  Vec total[kCount];
#pragma GCC unroll 24
  for (int v = 0; v < kCount; ++v) total[v] = onto ? load(sums + v * kWidth) : Vec{};
  const T* row = run.first + column;
  for (int64_t r = 0; r < run.count; ++r, row += stride) {
    const T* later = ahead.next(stride) + column;
#pragma GCC unroll 24
    for (int v = 0; v < kCount; ++v) {
      if (v * kWidth * static_cast<int>(sizeof(T)) % kLine == 0) __builtin_prefetch(later + v * kWidth);
      total[v] += kWhole || v + 1 < kCount ? load(row + v * kWidth) : load(row + v * kWidth, last);
    }
  }
#pragma GCC unroll 24
  for (int v = 0; v < kCount; ++v) store(sums + v * kWidth, total[v]);
}

template <class T>
using AddColumns = void (*)(float*, Run<T>, Ahead<T>&, int64_t, int64_t, int, bool);

template <class T, bool kWhole>
AddColumns<T> add_columns_of(int64_t count) {
  static constexpr auto table = []<int... kCounts>(std::integer_sequence<int, kCounts...>) {
    return std::array<AddColumns<T>, kSumVectors>{&add_columns<T, kCounts + 1, kWhole>...};
  }(std::make_integer_sequence<int, kSumVectors>());
  return table[count - 1];
}

// sums[0 … round_up(d, kWidth)) = (or, onto them, +=) Σ of the run's rows, `stride` elements apart.
template <class T>
void add_run(float* sums, Run<T> run, Ahead<T>& ahead, int64_t d, int64_t stride, bool onto) {
  const int64_t vectors = ceil_div(d, kWidth), blocks = ceil_div(vectors, kSumVectors);
  const Ahead<T> begun = ahead;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = vectors * block / blocks, count = vectors * (block + 1) / blocks - begin;
    const int64_t column = begin * kWidth;
    const int last = static_cast<int>(std::min<int64_t>(d - column - (count - 1) * kWidth, kWidth));
    const auto add = last == kWidth ? add_columns_of<T, true>(count) : add_columns_of<T, false>(count);
    ahead = begun;
    add(sums, run, ahead, column, stride, last, onto);
  }
}

// out = sums / max(count, 1)
template <class T>
void write_mean(T* out, const float* sums, int64_t count, int64_t d) {
  const Vec divisor = splat(static_cast<float>(std::max<int64_t>(count, 1)));
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) store(out + i, load(sums + i) / divisor);
  if (i < d) store(out + i, load(sums + i) / divisor, static_cast<int>(d - i));
}

// out = (first + Σ over n other partial sums of d columns, `stride` floats apart) / max(count, 1). A few at a time are
// added up before they join the others, which loses fewer digits of a very long sequence.
template <class T>
void write_mean_of_partials(T* out, const float* first, const float* others, int64_t n, int64_t stride, int64_t count,
                            int64_t d) {
  constexpr int64_t kFew = 32;
  float* total = scratch.reserve(round_up(d, kWidth));
  for (int64_t i = 0; i < d; i += kWidth) {
    Vec x = load(first + i);
    for (int64_t p = 0; p < n;) {
      Vec few{};
      for (const int64_t end = std::min(p + kFew, n); p < end; ++p) few += load(others + p * stride + i);
      x += few;
    }
    store(total + i, x);
  }
  write_mean(out, total, count, d);
}

// --- padded sequences ---

int64_t pieces_of(int64_t length) { return std::max<int64_t>(ceil_div(length, kPiece), 1); }

// The two forward operators refuse here all that they cannot take: Python looks only to name what was refused.

Tensor masked_mean_pool(const Tensor& hidden_in, const Tensor& attention_mask) {
  STD_TORCH_CHECK(hidden_in.dim() == 3 && attention_mask.dim() == 2 && is_integer(attention_mask.scalar_type()),
                  "masked_mean_pool takes hidden [B, L, D] and attention_mask [B, L] of integers");
  const Tensor hidden = dense_rows(hidden_in);
  const Mask mask(attention_mask);
  const int64_t b_count = hidden.size(0), d = hidden.size(2);
  STD_TORCH_CHECK(mask.batch == b_count && mask.length == hidden.size(1), "attention_mask does not fit hidden");
  Tensor out = empty({b_count, d}, hidden.scalar_type());
  dispatch(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* input = static_cast<const T*>(hidden.const_data_ptr());
    T* output = data<T>(out);
    const int64_t batch_stride = hidden.stride(0), stride = hidden.stride(1);
    const int64_t padded = round_up(d, kWidth), pieces = pieces_of(mask.length);
    const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T));
    const int64_t piece_bytes = std::min(mask.length, kPiece) * row_bytes + 1;
    Buffer partials(pieces > 1 ? b_count * pieces * padded : 0);
    std::vector<int64_t> counts(b_count * pieces);

    const int64_t group = std::max<int64_t>(kUnitBytes / piece_bytes, 1), total = b_count * pieces;
    parallel_stretches(ceil_div(total, group), total * piece_bytes / kBytesPerNanosecond, [&](int64_t unit) {
      // All runs of the unit are listed first, so that one's end can ask for the next one's beginning.
      const int64_t first = unit * group, last = std::min(first + group, total);
      thread_local std::vector<Run<T>> runs;
      thread_local std::vector<int64_t> ends;  // of each piece's runs
      runs.clear();
      ends.clear();
      for (int64_t piece = first; piece < last; ++piece) {
        const int64_t b = piece / pieces, begin = piece % pieces * kPiece, end = std::min(begin + kPiece, mask.length);
        const T* origin = input + b * batch_stride + begin * stride;
        counts[piece] = mask.count(b, begin, end);
        mask.runs(b, begin, end, counts[piece],
                  [&](int64_t run, int64_t n) { runs.push_back({origin + run * stride, n}); });
        ends.push_back(static_cast<int64_t>(runs.size()));
      }
      Ahead<T> ahead(runs.data(), static_cast<int64_t>(runs.size()), row_bytes);
      for (int64_t piece = first, run = 0; piece < last; ++piece) {
        float* sums = pieces > 1 ? partials.get() + piece * padded : scratch.reserve(padded);
        const int64_t begin = run, end = ends[piece - first];
        if (begin == end) std::fill_n(sums, padded, 0.f);
        for (; run < end; ++run) add_run(sums, runs[run], ahead, d, stride, run > begin);
        if (pieces == 1) write_mean(output + piece * d, sums, counts[piece], d);
      }
    });
    if (pieces == 1) return;
    parallel(b_count, b_count * pieces * padded / 8, [&](int64_t b) {
      int64_t count = 0;
      for (int64_t p = b * pieces; p < (b + 1) * pieces; ++p) count += counts[p];
      const float* first = partials.get() + b * pieces * padded;
      write_mean_of_partials(output + b * d, first, first + padded, pieces - 1, padded, count, d);
    });
  });
  return out;
}

// --- packed sequences ---

Tensor packed_mean_pool(const Tensor& hidden_in, const Tensor& cu_seqlens) {
  const ScalarType offsets = cu_seqlens.scalar_type();
  STD_TORCH_CHECK(hidden_in.dim() == 2 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 &&
                      (offsets == ScalarType::Int || offsets == ScalarType::Long),
                  "packed_mean_pool takes hidden [T, D] and cu_seqlens [B + 1] of int32 or int64");
  const Tensor hidden = dense_rows(hidden_in);
  const Sequences sequences(cu_seqlens, hidden.size(0));
  const int64_t d = hidden.size(1), tokens = hidden.size(0);
  Tensor out = empty({sequences.count(), d}, hidden.scalar_type());
  dispatch(hidden.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> input = matrix<T>(hidden);
    T* output = data<T>(out);
    const int64_t padded = round_up(d, kWidth), row_bytes = d * static_cast<int64_t>(sizeof(T)) + 1;
    // Partial sums of sequences longer than a piece. Their first pieces start more than kPiece apart, and so do any two
    // of their other pieces, so the piece that starts at token t has slot 2·(t / kPiece), + 1 unless it is a first one,
    // alone.
    Buffer partials(sequences.longest() > kPiece ? 2 * ceil_div(tokens, kPiece) * padded : 0);
    auto slot = [&](int64_t token, bool first) {
      return partials.get() + (2 * (token / kPiece) + (first ? 0 : 1)) * padded;
    };
    auto pool_pieces = [&](int64_t s, int64_t from, int64_t before) {  // the pieces of s that start in [from, before)
      const int64_t start = sequences.start(s), length = sequences.length(s);
      for (int64_t offset = round_up(std::max<int64_t>(from - start, 0), kPiece);
           offset == 0 || (offset < length && start + offset < before); offset += kPiece) {
        const int64_t n = std::min(length - offset, kPiece);
        float* sums = length > kPiece ? slot(start + offset, offset == 0) : scratch.reserve(padded);
        const T* rows = input.row(start + offset);
        if (n == 0) std::fill_n(sums, padded, 0.f);
        const Run<T> rest{rows, tokens - start - offset};
        Ahead<T> ahead(&rest, 1, row_bytes);
        if (n > 0) add_run(sums, {rows, n}, ahead, d, input.stride, false);
        if (length <= kPiece) write_mean(output + s * d, sums, n, d);
      }
    };
    // A unit is a range of tokens and owns the pieces that start in it.
    const int64_t unit_tokens = std::max<int64_t>(kUnitBytes / row_bytes, 1);
    const int64_t units = std::max<int64_t>(ceil_div(tokens, unit_tokens), 1);
    const int64_t cost = tokens * row_bytes / kBytesPerNanosecond + 4 * sequences.count();
    parallel_stretches(units, cost, [&](int64_t unit) {
      const int64_t from = unit * unit_tokens, before = unit + 1 < units ? from + unit_tokens : tokens + 1;
      int64_t s = sequences.first_from(from);
      if (s > 0 && sequences.start(s - 1) + kPiece < before && sequences.length(s - 1) > kPiece) {
        pool_pieces(s - 1, from, before);
      }
      for (; s < sequences.count() && sequences.start(s) < before; ++s) pool_pieces(s, from, before);
    });
    if (sequences.longest() <= kPiece) return;
    parallel(sequences.count(), tokens / kPiece * padded / 8, [&](int64_t s) {
      const int64_t start = sequences.start(s), length = sequences.length(s);
      if (length <= kPiece) return;
      write_mean_of_partials(output + s * d, slot(start, true), slot(start + kPiece, false),
                             ceil_div(length, kPiece) - 1, 2 * padded, length, d);
    });
  });
  return out;
}

// --- gradients: every kept token of a sequence gets gradient / count ---

constexpr int64_t kMapped = 32 << 20;  // malloc maps larger memory anew each time

// A new tensor of grad's dtype; if it is large, it begins with a huge page and has no smaller ones. Those that its ends
// would else need take a quarter of the time of writing 50 MB. What is left unused before and after it is not mapped.
Tensor new_gradient(const Tensor& grad, std::initializer_list<int64_t> sizes) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t element_size = static_cast<int64_t>(grad.element_size());
  int64_t strides[3], elements = 1;
  for (size_t i = sizes.size(); i-- > 0; elements *= sizes.begin()[i]) strides[i] = elements;
  if (elements * element_size < kMapped) return empty(sizes, grad.scalar_type());
  const int64_t bytes = round_up(elements * element_size, kHugePage);
  const Tensor memory = empty({(bytes + kHugePage) / element_size}, grad.scalar_type());
  char* const begin = data<char>(memory);
  const int64_t skipped = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
  prefer_huge_pages(begin + skipped, bytes);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.begin(), strides, skipped / element_size,
                                                               &handle));
  return Tensor(handle);
}

// Outputs of so many bytes have mostly left the caches of a core by the time that somebody reads them, and are written
// past the caches: up to a third faster, and no slower with the reading. Not so those that are mapped anew, which the
// system has just cleared and has in the caches.
constexpr int64_t kStreamed = 8 << 20;

bool is_streamed(const Tensor& gradient) {
  const int64_t bytes = gradient.numel() * static_cast<int64_t>(gradient.element_size());
  return bytes >= kStreamed && bytes < kMapped;
}

// A row repeated so that a block of it can be read at every offset below the row's size. Blocks begin with a cache line
// of the output, which is what keeps narrow rows as fast as wide ones.
class Share {
 public:
  // The row is grad / max(count, 1), of d elements; at most `most` bytes are written at a time. Lives in memory of this
  // thread until the next one is made.
  template <class T>
  Share(const T* grad, int64_t count, int64_t d, int64_t most, bool streamed)
      : row_bytes_(d * static_cast<int64_t>(sizeof(T))), streamed_(streamed) {
    const int64_t bytes = row_bytes_ + std::min(kBlock, most);
    memory_ = reinterpret_cast<char*>(scratch.reserve(ceil_div(bytes, 4)));
    T* row = reinterpret_cast<T*>(memory_);
    const Vec divisor = splat(static_cast<float>(std::max<int64_t>(count, 1)));
    int64_t i = 0;
    for (; i + kWidth <= d; i += kWidth) store(row + i, load(grad + i) / divisor);
    if (i < d) store(row + i, load(grad + i, static_cast<int>(d - i)) / divisor, static_cast<int>(d - i));
    for (int64_t done = row_bytes_, more; done < bytes; done += more) {
      more = std::min(done, bytes - done);
      std::memcpy(memory_ + done, memory_, more);
    }
  }

  // Writes `count` bytes of the repeated row to p. What is long and not streamed is copied from its own beginning: large
  // copies are the processor's own to make, and it makes them without reading first what they overwrite.
  void write(char* p, int64_t count) const {
    if (streamed_) return write_blocks(p, count, stream_line);
    auto copy_line = [](char* to, const char* from) { std::memcpy(to, from, kLine); };
    if (count < 2 * kFirst) return write_blocks(p, count, copy_line);
    int64_t done = round_up(kFirst, row_bytes_);
    if (done >= count) return write_blocks(p, count, copy_line);
    write_blocks(p, done, copy_line);
    for (const int64_t most = 2 * done; done < count;) {
      const int64_t more = std::min({done, count - done, most});
      std::memcpy(p + done, p, more);
      done += more;
    }
  }

 private:
  static constexpr int64_t kBlock = 1 << 10;
  static constexpr int64_t kFirst = 4 << 10;

  template <class WriteLine>
  void write_blocks(char* p, int64_t count, WriteLine write_line) const {
    const int64_t head = std::min(to_next_line(p), count);
    std::memcpy(p, memory_, head);
    const int64_t step = kBlock % row_bytes_;
    int64_t offset = head % row_bytes_;
    for (p += head, count -= head; count >= kBlock; count -= kBlock, p += kBlock) {
      const char* from = memory_ + offset;
#pragma GCC unroll 16
      for (int64_t line = 0; line < kBlock; line += kLine) write_line(p + line, from + line);
      offset += step;
      offset = offset >= row_bytes_ ? offset - row_bytes_ : offset;
    }
    std::memcpy(p, memory_ + offset, count);
  }

  char* memory_;
  int64_t row_bytes_;
  bool streamed_;
};

void write_zeros(char* p, int64_t count, bool streamed) {
  if (streamed) {
    alignas(kLine) static constexpr char zeros[kLine] = {};
    const int64_t head = std::min(to_next_line(p), count);
    std::memset(p, 0, head);
    for (p += head, count -= head; count >= kLine; count -= kLine, p += kLine) stream_line(p, zeros);
  }
  std::memset(p, 0, count);
}

Tensor masked_mean_pool_backward(const Tensor& grad_in, const Tensor& attention_mask) {
  const Tensor grad = dense_rows(grad_in);
  const Mask mask(attention_mask);
  const int64_t b_count = mask.batch, length = mask.length, d = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == b_count, "attention_mask does not fit grad");
  Tensor out = new_gradient(grad, {b_count, length, d});
  if (out.numel() == 0) return out;
  const bool streamed = is_streamed(out);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> gradient = matrix<T>(grad);
    char* output = reinterpret_cast<char*>(data<T>(out));
    const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T)), pieces = pieces_of(mask.length);
    std::vector<int64_t> counts(pieces > 1 ? b_count : 0);
    if (pieces > 1) parallel(b_count, b_count * length / 2, [&](int64_t b) { counts[b] = mask.count(b, 0, length); });
    const int64_t piece_bytes = std::min(length, kPiece) * row_bytes;
    const int64_t group = std::max<int64_t>(kUnitBytes / piece_bytes, 1), total = b_count * pieces;
    parallel_stretches(ceil_div(total, group), total * piece_bytes / kBytesPerNanosecond, [&](int64_t unit) {
      for (int64_t piece = unit * group; piece < std::min((unit + 1) * group, total); ++piece) {
        const int64_t b = piece / pieces, begin = piece % pieces * kPiece, end = std::min(begin + kPiece, length);
        const int64_t kept = mask.count(b, begin, end);
        prefetch(gradient.row(std::min(b + 1, b_count - 1)), row_bytes);
        const Share share(gradient.row(b), pieces > 1 ? counts[b] : kept, d, kept * row_bytes, streamed);
        char* p = output + (b * length + begin) * row_bytes;
        int64_t done = 0;
        mask.runs(b, begin, end, kept, [&](int64_t run, int64_t n) {
          write_zeros(p + done * row_bytes, (run - done) * row_bytes, streamed);
          share.write(p + run * row_bytes, n * row_bytes);
          done = run + n;
        });
        write_zeros(p + done * row_bytes, (end - begin - done) * row_bytes, streamed);
      }
      if (streamed) finish_streams();
    });
  });
  return out;
}

Tensor packed_mean_pool_backward(const Tensor& grad_in, const Tensor& cu_seqlens, int64_t tokens) {
  const Tensor grad = dense_rows(grad_in);
  const Sequences sequences(cu_seqlens, tokens);
  const int64_t d = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == sequences.count(), "cu_seqlens does not fit grad");
  Tensor out = new_gradient(grad, {tokens, d});
  if (out.numel() == 0) return out;
  const bool streamed = is_streamed(out);
  dispatch(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Matrix<const T> gradient = matrix<T>(grad);
    char* output = reinterpret_cast<char*>(data<T>(out));
    const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T));
    const int64_t unit_tokens = std::max<int64_t>(kUnitBytes / row_bytes, 1);
    parallel_stretches(ceil_div(tokens, unit_tokens), tokens * row_bytes / kBytesPerNanosecond, [&](int64_t unit) {
      const int64_t from = unit * unit_tokens, before = std::min(from + unit_tokens, tokens);
      for (int64_t s = std::max<int64_t>(sequences.first_from(from + 1) - 1, 0);
           s < sequences.count() && sequences.start(s) < before; ++s) {
        const int64_t begin = std::max(sequences.start(s), from), end = std::min(sequences.start(s + 1), before);
        if (begin >= end) continue;
        prefetch(gradient.row(std::min(s + 1, sequences.count() - 1)), row_bytes);
        const Share share(gradient.row(s), sequences.length(s), d, (end - begin) * row_bytes, streamed);
        share.write(output + begin * row_bytes, (end - begin) * row_bytes);
      }
      if (streamed) finish_streams();
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def("masked_mean_pool(Tensor hidden, Tensor attention_mask) -> Tensor");
  m.def("masked_mean_pool_backward(Tensor grad, Tensor attention_mask) -> Tensor");
  m.def("packed_mean_pool(Tensor hidden, Tensor cu_seqlens) -> Tensor");
  m.def("packed_mean_pool_backward(Tensor grad, Tensor cu_seqlens, SymInt total_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) {
  m.impl("masked_mean_pool", TORCH_BOX(&masked_mean_pool));
  m.impl("masked_mean_pool_backward", TORCH_BOX(&masked_mean_pool_backward));
  m.impl("packed_mean_pool", TORCH_BOX(&packed_mean_pool));
  m.impl("packed_mean_pool_backward", TORCH_BOX(&packed_mean_pool_backward));
}

}  // namespace triton_st
