// Projections with weights in int8, symmetric per output: w ~ scale[n] * q.
//
// Inputs are quantized on the way in, each row in steps of its own: x ~ scale * (q - zero), q unsigned, because the
// instructions multiply unsigned by signed. What the zeros add, zero * sum(q[n]), is subtracted again. Sums are exact
// (int32), so every path gives the same.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "crew.h"
#include "multiply.h"

namespace slimpajama {

namespace {

// weight [N, K] of any float type; returns values [N / 16, K / 4, 16, 4], scales and sums of values [N], N and K padded.
std::tuple<Tensor, Tensor, Tensor> pack_int8(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "weight is a matrix [N, K]");
  const auto w = weight.to(at::kFloat).contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, quads = padded(k, 4 * TILE_GROUPS) / 4;
  auto packed = at::zeros({panels, quads, PANEL, 4}, w.options().dtype(at::kChar));
  auto scales = at::zeros({panels * PANEL}, w.options());
  auto sums = at::zeros({panels * PANEL}, w.options().dtype(at::kInt));
  const float* source = w.const_data_ptr<float>();
  auto* target = packed.data_ptr<int8_t>();
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float largest = 0.0f;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::abs(source[row * k + i]));
      const float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) {
        const auto q = static_cast<int8_t>(std::nearbyint(source[row * k + i] * inverse));
        target[(((row / PANEL) * quads + i / 4) * PANEL + row % PANEL) * 4 + i % 4] = q;
        sum += q;
      }
      scales.data_ptr<float>()[row] = scale;
      sums.data_ptr<int32_t>()[row] = sum;
    }
  });
  return {packed, scales, sums};
}

// x [M, K] bfloat16 over int8 weights (see pack_int8); returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& sums,
                   const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t k = x.size(1), panels = packed.size(0), groups = packed.size(1);
  TORCH_CHECK(padded(k, 4 * TILE_GROUPS) == groups * 4 && padded(n, 2 * PANEL) == panels * PANEL,
              "x and the packed weights do not fit");
  const QuantizedRows quantized = quantize_rows(x, groups);
  auto result = at::empty({x.size(0), n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const Weights weights = weights_in_8_bits(packed, scales, sums);
  go_through(1, [&](Member member) {
    member.share(panels / 2, [&](int64_t begin, int64_t end) { project_int8(quantized.rows, weights, out, begin, end); });
  });
  return result;
}

}  // namespace

void project_int8(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Int8>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_int8(Tensor weight) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_int8", slimpajama::pack_int8);
  library.impl("linear_int8", slimpajama::linear_int8);
}
