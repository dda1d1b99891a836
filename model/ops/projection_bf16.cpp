// Projections with weights in bfloat16, sums in float32.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "crew.h"
#include "multiply.h"

namespace slimpajama {

namespace {

// weight [N, K]; returns the packed weights, [N / 16, K / 2, 16, 2] with N and K padded.
Tensor pack_bf16(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2, "weight is a bfloat16 matrix [N, K]");
  const auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, pairs = padded(k, 2 * TILE_GROUPS) / 2;
  auto packed = at::zeros({panels, pairs, PANEL, 2}, w.options());
  const bf16* source = data(w);
  bf16* target = mutable_data(packed);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t lane = 0; lane < std::min(PANEL, n - p * PANEL); ++lane)
        for (int64_t i = 0; i < k; ++i)
          target[((p * pairs + i / 2) * PANEL + lane) * 2 + i % 2] = source[(p * PANEL + lane) * k + i];
  });
  return packed;
}

// x [M, K] bfloat16, packed weights, bias float32 [N] or none; returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_bf16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), k = x.size(1), panels = packed.size(0), groups = packed.size(1);
  TORCH_CHECK(padded(k, 2 * TILE_GROUPS) == groups * 2 && padded(n, 2 * PANEL) == panels * PANEL,
              "x and the packed weights do not fit");
  Tensor values = x;
  if (k != groups * 2) {
    values = at::zeros({m, groups * 2}, x.options());
    values.narrow(1, 0, k).copy_(x);
  }
  auto result = at::empty({m, n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const Rows rows{static_cast<const uint8_t*>(values.const_data_ptr()), m, groups};
  const Weights weights{static_cast<const uint8_t*>(packed.const_data_ptr()), groups};
  go_through(1, [&](Member member) {
    member.share(panels / 2, [&](int64_t begin, int64_t end) { project_bf16(rows, weights, out, begin, end); });
  });
  return result;
}

}  // namespace

void project_bf16(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Bf16>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_bf16(Tensor weight) -> Tensor");
  library.def("linear_bf16(Tensor x, Tensor packed, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_bf16", slimpajama::pack_bf16);
  library.impl("linear_bf16", slimpajama::linear_bf16);
}
