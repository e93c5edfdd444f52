// The contrastive loss with all its options. Similarities exist for a block of rows at a time, in memory of bounded
// size, and each is computed once; `triton_st/reference/mnrl_rows.py` is the specification.
#include <optional>
#include <vector>

#include "mnrl_gradients.h"
#include "mnrl_problem.h"
#include "mnrl_scores.h"
#include "tensor.h"

namespace triton_st {
namespace {

using namespace mnrl;

constexpr int64_t kMostRows = 256;              // of a block,
constexpr int64_t kScoreBytes = 24 << 20;       // as long as its scores are no more than this;
constexpr int64_t kFewRows = 128;               // so many even if they are more,
constexpr int64_t kMostScoreBytes = 160 << 20;  // but not more than this

int64_t block_rows(int64_t rows, int64_t row_bytes) {
  const int64_t fitting =
      std::max(std::min(kScoreBytes / row_bytes, kMostRows), std::min(kMostScoreBytes / row_bytes, kFewRows));
  const int64_t most = std::max<int64_t>(fitting / kPanel, 1) * kPanel;
  return std::min(round_up(ceil_div(rows, ceil_div(rows, most)), kPanel), most);
}

using MaybeTensor = std::optional<Tensor>;

struct Arguments {
  Tensor queries, documents;
  MaybeTensor all_queries, targets;
  Tensor scale;
  MaybeTensor row_weights, query_ids, document_ids, owner_ids;
  std::vector<int64_t> dims;
  std::vector<float> dim_weights;
  Options options;
};

struct Results {
  Tensor losses, grad_queries, grad_documents, grad_all_queries, grad_scale, diagnostics;
};

// One float per row: those of a vector, the one of a scalar, or `missing`.
std::vector<float> per_row(const Tensor* values, float missing, int64_t rows) {
  std::vector<float> result(rows, missing);
  if (!values) return result;
  const float* source = static_cast<const float*>(values->const_data_ptr());
  const int64_t stride = values->dim() ? values->stride(0) : 0;
  for (int64_t i = 0; i < rows; ++i) result[i] = source[i * stride];
  return result;
}

template <class T>
void compute(const Arguments& arguments, const Results& results) {
  const Options& options = arguments.options;
  const Matrix<const T> queries = matrix<T>(arguments.queries), documents = matrix<T>(arguments.documents);
  const PrefixScales query_scales(queries, arguments.dims, options.normalized);
  const PrefixScales document_scales(documents, arguments.dims, options.normalized);
  Problem<T> problem{.options = options,
                     .dims = arguments.dims,
                     .dim_weights = arguments.dim_weights,
                     .ranges = ranges_of<kPairs<T>>(arguments.dims),
                     .queries = queries,
                     .query_scales = &query_scales,
                     .documents = {documents, &document_scales}};
  problem.owners = arguments.all_queries ? arguments.all_queries->size(0) : queries.rows;
  problem.segments = segments_of(options, documents.rows, problem.owners);
  std::optional<PrefixScales> all_scales;
  if (arguments.all_queries) {
    const Matrix<const T> all = matrix<T>(*arguments.all_queries);
    all_scales.emplace(all, arguments.dims, options.normalized);
    problem.all_queries = {all, &*all_scales};
  } else {
    problem.all_queries = {queries, &query_scales};
  }
  if (arguments.targets) problem.targets = static_cast<const int64_t*>(arguments.targets->const_data_ptr());
  const std::vector<float> scale = per_row(&arguments.scale, 0.f, queries.rows);
  const std::vector<float> weights = per_row(arguments.row_weights ? &*arguments.row_weights : nullptr,
                                             1.f / static_cast<float>(queries.rows), queries.rows);
  problem.scale = scale.data();
  problem.weights = weights.data();
  std::vector<int32_t> document_ids, owner_ids;
  if (arguments.query_ids) {
    DenseIds dense(queries.rows + 2 * documents.rows);
    problem.query_ids = dense.of(*arguments.query_ids);
    document_ids = dense.of(*arguments.document_ids);
    owner_ids = dense.of(*arguments.owner_ids);
    problem.target_ids.resize(queries.rows);
    for (int64_t i = 0; i < queries.rows; ++i) problem.target_ids[i] = document_ids[problem.target(i)];
    problem.documents.first_id = problem.all_queries.second_id = document_ids.data();
    problem.documents.second_id = problem.all_queries.first_id = owner_ids.data();
  }

  const Segment& last = problem.segments.back();
  const int64_t row_bytes = (last.first_row + last.rows) * problem.prefixes() * static_cast<int64_t>(sizeof(float));
  const int64_t most_rows = block_rows(queries.rows, options.gradients ? row_bytes : row_bytes / kStripRows + 1);
  RowBlock<T> block(problem, most_rows);
  const typename RowBlock<T>::Rows rows{data<float>(results.losses), data<float>(results.grad_scale),
                                        data<float>(results.diagnostics)};
  std::optional<Gradients<T>> gradients;
  if (options.gradients) {
    const bool among_candidates = options.directions & (kQueryToQuery | kDocToQuery);
    float* grad_queries = data<float>(results.grad_queries);
    float* grad_all = arguments.all_queries ? data<float>(results.grad_all_queries) : grad_queries;
    if (arguments.all_queries && !among_candidates) std::fill_n(grad_all, results.grad_all_queries.numel(), 0.f);
    gradients.emplace(problem, block, grad_queries, data<float>(results.grad_documents),
                      among_candidates ? grad_all : nullptr);
  }
  const int64_t blocks = ceil_div(queries.rows, most_rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = queries.rows * b / blocks;
    block.score(first, queries.rows * (b + 1) / blocks - first, rows);
    if (gradients) gradients->add_block();
  }
  if (gradients) gradients->finish();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mnrl_rows(
    const Tensor& queries, const Tensor& documents, const MaybeTensor& all_queries, const MaybeTensor& targets,
    int64_t offset, const Tensor& scale, const MaybeTensor& row_weights, bool normalized, int64_t directions,
    bool joint, int64_t hardness_mode, double hardness_strength, const MaybeTensor& query_ids,
    const MaybeTensor& document_ids, const MaybeTensor& owner_ids, std::optional<double> margin, bool relative_margin,
    std::vector<int64_t> dims, std::vector<double> dim_weights, bool gradients, bool diagnostics) {
  const int64_t rows = queries.size(0), count = documents.size(0), cols = queries.size(1);
  auto fits = [&](const Tensor& x) { return x.size(1) == cols && x.scalar_type() == queries.scalar_type(); };
  STD_TORCH_CHECK(rows > 0 && count > 0 && fits(documents) && (!all_queries || fits(*all_queries)),
                  "queries, documents and all_queries do not fit");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float &&
                      (!row_weights || row_weights->scalar_type() == ScalarType::Float),
                  "scale and row_weights must be float32");
  auto dense_ids = [](const MaybeTensor& ids) { return ids ? MaybeTensor(torch::stable::contiguous(*ids)) : ids; };
  if (dims.empty()) {
    dims = {cols};
    dim_weights = {1.};
  }
  const Arguments arguments{
      dense_rows(queries), dense_rows(documents), all_queries ? MaybeTensor(dense_rows(*all_queries)) : all_queries,
      dense_ids(targets), scale, row_weights, dense_ids(query_ids), dense_ids(document_ids), dense_ids(owner_ids), dims,
      {dim_weights.begin(), dim_weights.end()},
      {.offset = offset, .normalized = normalized, .joint = joint, .relative_margin = relative_margin,
       .gradients = gradients, .diagnostics = diagnostics, .directions = static_cast<int>(directions),
       .hardness_mode = hardness_strength == 0 ? 0 : static_cast<int>(hardness_mode),
       .hardness_strength = static_cast<float>(hardness_strength),
       .margin = margin ? std::optional<float>(static_cast<float>(*margin)) : std::nullopt}};
  auto nothing = [] { return empty({0}, ScalarType::Float); };
  auto wanted = [&](bool asked, std::initializer_list<int64_t> sizes) {
    return asked ? empty(sizes, ScalarType::Float) : empty({0}, ScalarType::Float);
  };
  const Results results{empty({rows}, ScalarType::Float),
                        wanted(gradients, {rows, cols}),
                        wanted(gradients, {count, cols}),
                        gradients && all_queries ? empty({all_queries->size(0), cols}, ScalarType::Float) : nothing(),
                        wanted(gradients, {rows}),
                        wanted(diagnostics, {4, rows})};
  dispatch(queries.scalar_type(), [&](auto zero) { compute<decltype(zero)>(arguments, results); });
  return {results.losses, results.grad_queries, results.grad_documents, results.grad_all_queries, results.grad_scale,
          results.diagnostics};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(triton_st_cpp, m) {
  m.def(
      "mnrl_rows(Tensor queries, Tensor documents, Tensor? all_queries, Tensor? targets, int offset, Tensor scale, "
      "Tensor? row_weights, bool normalized, int directions, bool joint, int hardness_mode, float hardness_strength, "
      "Tensor? query_ids, Tensor? document_ids, Tensor? owner_ids, float? margin, bool relative_margin, int[] dims, "
      "float[] dim_weights, bool gradients, bool diagnostics) -> (Tensor losses, Tensor grad_queries, "
      "Tensor grad_documents, Tensor grad_all_queries, Tensor grad_scale, Tensor diagnostics)");
}

STABLE_TORCH_LIBRARY_IMPL(triton_st_cpp, CPU, m) { m.impl("mnrl_rows", TORCH_BOX(&mnrl_rows)); }

}  // namespace triton_st
