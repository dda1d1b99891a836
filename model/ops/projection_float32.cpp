// Projections with weights in float32, for the layers of encoders. What a 512-bit register holds is one panel.

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "multiply.h"

namespace slimpajama {

namespace {

// weight [N, K]; returns the packed weights, [N / 16, K, 16, 1] with N and K padded.
Tensor pack_float32(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.dim() == 2, "weight is a float32 matrix [N, K]");
  const auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, inputs = padded(k, TILE_GROUPS);
  auto packed = at::zeros({panels, inputs, PANEL, 1}, w.options());
  const float* source = w.const_data_ptr<float>();
  float* target = packed.data_ptr<float>();
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < k; ++i) target[(row / PANEL * inputs + i) * PANEL + row % PANEL] = source[row * k + i];
  });
  return packed;
}

}  // namespace

void project_float32(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Float32>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) { library.def("pack_float32(Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) { library.impl("pack_float32", slimpajama::pack_float32); }
