// Rows on their way into 8 bits: of each the range is found, 0 included, and cut into 255 equal steps (arXiv 1712.05877).

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "projection.h"

namespace slimpajama {

Steps8 quantize_row(const bf16* x, int64_t k, const float* factors, uint8_t* out) {
  const Range range = FASTEST(range_of)(x, k, factors);
  const float scale = (range.most - range.least) / 255.0f, inverse = 1.0f / scale;
  if (!(std::isfinite(scale) && std::isfinite(inverse))) {  // something is no number, or all is as good as zero
    std::memset(out, 0, k);
    return {scale, 0};
  }
  const float zero = std::nearbyint(-range.least * inverse);
  FASTEST(quantize)(x, k, factors, inverse, zero, out);
  return {scale, static_cast<int32_t>(zero)};
}

QuantizedRows quantize_rows(const Tensor& x, int64_t groups) {
  const int64_t m = x.size(0), k = x.size(1);
  auto values = at::empty({m, groups * 4}, x.options().dtype(at::kByte));
  auto scales = at::empty({m}, x.options().dtype(at::kFloat)), zeros = at::empty({m}, x.options().dtype(at::kInt));
  const bf16* source = data(x);
  auto* quantized = values.data_ptr<uint8_t>();
  auto* found = scales.data_ptr<float>();
  auto* found_zeros = zeros.data_ptr<int32_t>();
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Steps8 steps = quantize_row(source + row * k, k, nullptr, quantized + row * groups * 4);
      found[row] = steps.scale;
      found_zeros[row] = steps.zero;
    }
  });
  return {values, scales, zeros, {quantized, m, groups, found, found_zeros}};
}

}  // namespace slimpajama
