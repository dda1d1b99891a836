// What comes before and after an encoder's layers: embeddings summed and normalised, and the sums of texts' states.
// Too little to wake other threads for.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace {

using namespace slimpajama;

// A table [rows, E] and which of its rows each token adds; nothing where there is none.
template <typename Value>
struct Added {
  const Value* table = nullptr;
  const int64_t* rows = nullptr;
  int64_t num_rows = 0;

  Added(const std::optional<Tensor>& table_tensor, const Tensor& row_tensor, int64_t e) {
    if (!table_tensor) return;
    TORCH_CHECK(table_tensor->is_contiguous() && table_tensor->size(1) == e && row_tensor.is_contiguous(),
                "tables are [rows, E]");
    table = static_cast<const Value*>(table_tensor->const_data_ptr());
    rows = row_tensor.const_data_ptr<int64_t>();
    num_rows = table_tensor->size(0);
  }

  void add(int64_t token, int64_t e, float* sum) const {
    if (!table) return;
    const Value* row = table + rows[token] * e;
    for (int64_t i = 0; i < e; ++i) sum[i] += to_float(row[i]);
  }

  void check(int64_t tokens) const {
    for (int64_t t = 0; table && t < tokens; ++t)
      TORCH_CHECK_INDEX(rows[t] >= 0 && rows[t] < num_rows, "row ", rows[t], " of a table of ", num_rows);
  }
};

template <typename Value>
void embed(const Added<Value> (&added)[3], int64_t e, const Norm& norm, const Tensor& result) {
  for (const auto& part : added) part.check(result.size(0));
  auto* out = static_cast<Value*>(result.data_ptr());
  std::vector<float> sum(e);
  const auto step = FASTEST(layer_norm<Value>);
  for (int64_t token = 0; token < result.size(0); ++token) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (const auto& part : added) part.add(token, e, sum.data());
    step(sum.data(), e, norm, out + token * e);
  }
}

// ids, type_ids and positions [T] int64 with their tables, of which all but the tokens' may be missing; weight and bias
// float32 [E]. Returns layer_norm(sum of rows) [T, E], float32 or bfloat16 as the tables are.
Tensor embed_tokens(const Tensor& ids, const Tensor& tokens, const Tensor& type_ids, const std::optional<Tensor>& types,
                    const Tensor& positions, const std::optional<Tensor>& places, const Tensor& weight,
                    const Tensor& bias, double epsilon) {
  const int64_t e = tokens.size(1);
  const Norm norm{weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), static_cast<float>(epsilon)};
  auto result = at::empty({ids.size(0), e}, tokens.options());
  if (tokens.scalar_type() == at::kFloat)
    embed<float>({{tokens, ids, e}, {types, type_ids, e}, {places, positions, e}}, e, norm, result);
  else
    embed<bf16>({{tokens, ids, e}, {types, type_ids, e}, {places, positions, e}}, e, norm, result);
  return result;
}

template <typename Value>
void sum_rows(const Value* hidden, const int64_t* begins, const int64_t* ends, int64_t e, const Tensor& result) {
  for (int64_t text = 0; text < result.size(0); ++text) {
    float* sum = result.data_ptr<float>() + text * e;
    std::fill(sum, sum + e, 0.0f);
    for (int64_t row = begins[text]; row < ends[text]; ++row)
      for (int64_t i = 0; i < e; ++i) sum[i] += to_float(hidden[row * e + i]);
  }
}

// hidden [T, E] float32 or bfloat16; returns the sums of the rows from each begin to its end, float32 [B, E].
Tensor sum_texts(const Tensor& hidden, const Tensor& begins, const Tensor& ends) {
  check_rows(hidden, hidden.scalar_type());
  const int64_t e = hidden.size(1), b = begins.size(0);
  const auto *first = begins.const_data_ptr<int64_t>(), *last = ends.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < b; ++i)
    TORCH_CHECK_INDEX(0 <= first[i] && last[i] <= hidden.size(0), "rows beyond the ", hidden.size(0), " there are");
  auto result = at::empty({b, e}, hidden.options().dtype(at::kFloat));
  if (hidden.scalar_type() == at::kFloat) sum_rows(hidden.const_data_ptr<float>(), first, last, e, result);
  else sum_rows(data(hidden), first, last, e, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "embed_tokens(Tensor ids, Tensor tokens, Tensor type_ids, Tensor? types, Tensor positions, Tensor? places, "
      "Tensor weight, Tensor bias, float epsilon) -> Tensor");
  library.def("sum_texts(Tensor hidden, Tensor begins, Tensor ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("embed_tokens", embed_tokens);
  library.impl("sum_texts", sum_texts);
}
