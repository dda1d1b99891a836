// Projections of float32 as sums of two bfloat16 (`Halves`), for the layers of encoders where AMX multiplies those many
// times faster than AVX-512 does float32.

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "multiply.h"

namespace slimpajama {

namespace {

constexpr int64_t INPUTS = 2 * TILE_GROUPS;  // whose nearest fill a line of a row, and whose rests the next

// weight [N, K], K a multiple of 32; returns [N / 16, K, 16, 2], N padded: as of 2 K numbers, those of `split_row`.
Tensor pack_halves(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.dim() == 2 && weight.size(1) % INPUTS == 0,
              "weight is a float32 matrix [N, K], K a multiple of ", INPUTS);
  const auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1), panels = padded(n, 2 * PANEL) / PANEL;
  auto packed = at::zeros({panels, k, PANEL, 2}, w.options().dtype(at::kBFloat16));
  const float* source = w.const_data_ptr<float>();
  bf16* target = mutable_data(packed);
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    std::vector<bf16> halves(2 * k);
    for (int64_t row = begin; row < end; ++row) {
      split_row(source + row * k, k, halves.data());
      bf16* lane = target + (row / PANEL * k * PANEL + row % PANEL) * 2;
      for (int64_t i = 0; i < 2 * k; ++i) lane[i / 2 * PANEL * 2 + i % 2] = halves[i];
    }
  });
  return packed;
}

}  // namespace

void split_row(const float* x, int64_t k, bf16* out) { FASTEST(split)(x, k, INPUTS, out); }

void project_halves(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Halves>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) { library.def("pack_halves(Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) { library.impl("pack_halves", slimpajama::pack_halves); }
