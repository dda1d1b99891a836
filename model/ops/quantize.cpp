// Rows on their way into 8 bits: of each the range is found, 0 included, and cut into 255 equal steps (arXiv 1712.05877).

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

}  // namespace slimpajama
