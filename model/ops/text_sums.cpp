// The sums of texts' states: too little to wake other threads for.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "rows.h"

namespace {

using namespace slimpajama;

template <typename Value>
void sum_each(const Value* hidden, const int64_t* begins, const int64_t* ends, int64_t e, const Tensor& result) {
  const auto step = FASTEST(sum_rows<Value>);
  for (int64_t text = 0; text < result.size(0); ++text)
    step(hidden + begins[text] * e, ends[text] - begins[text], e, result.data_ptr<float>() + text * e);
}

// hidden [T, E] float32 or bfloat16; returns the sums of the rows from each begin to its end, float32 [B, E].
Tensor sum_texts(const Tensor& hidden, const Tensor& begins, const Tensor& ends) {
  check_rows(hidden, hidden.scalar_type());
  const int64_t e = hidden.size(1), b = begins.size(0);
  const auto *first = begins.const_data_ptr<int64_t>(), *last = ends.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < b; ++i)
    TORCH_CHECK_INDEX(0 <= first[i] && last[i] <= hidden.size(0), "rows beyond the ", hidden.size(0), " there are");
  auto result = at::empty({b, e}, hidden.options().dtype(at::kFloat));
  if (hidden.scalar_type() == at::kFloat) sum_each(hidden.const_data_ptr<float>(), first, last, e, result);
  else sum_each(data(hidden), first, last, e, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("sum_texts(Tensor hidden, Tensor begins, Tensor ends) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("sum_texts", sum_texts);
}
