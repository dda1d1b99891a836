// Projections with weights in int8, symmetric per output: w ~ scale[n] * q.
//
// Inputs are quantized on the way in, symmetric per row, and stored with 128 added, because the instructions multiply
// unsigned by signed; what the 128 adds, 128 * sum(q[n]), is subtracted again. Sums are exact (int32), so every path
// gives the same.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "multiply.h"

namespace slimpajama {

namespace {

// weight [N, K] of any float type; returns values [N / 16, K / 4, 16, 4], scales and offsets [N], N and K padded.
std::tuple<Tensor, Tensor, Tensor> pack_int8(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "weight is a matrix [N, K]");
  const auto w = weight.to(at::kFloat).contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, quads = padded(k, 4 * TILE_GROUPS) / 4;
  auto packed = at::zeros({panels, quads, PANEL, 4}, w.options().dtype(at::kChar));
  auto scales = at::zeros({panels * PANEL}, w.options());
  auto offsets = at::zeros({panels * PANEL}, w.options().dtype(at::kInt));
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
      offsets.data_ptr<int32_t>()[row] = 128 * sum;
    }
  });
  return {packed, scales, offsets};
}

// The largest |x|, NaN and infinity above all: as integers, the magnitudes of bfloat16 are in order.
float largest_of(const bf16* x, int64_t k) {
  bf16 top = 0;
  for (int64_t i = 0; i < k; ++i) top = std::max<bf16>(top, x[i] & 0x7fff);
  return to_float(top);
}

#if HAS_X86
AVX512 float largest_of_avx512(const bf16* x, int64_t k) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i top = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 32) {
    const __mmask32 mask = k - i < 32 ? (1u << (k - i)) - 1 : ~0u;
    top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), magnitude));
  }
  const __m512i pairs = _mm512_max_epu32(_mm512_srli_epi32(top, 16), _mm512_and_si512(top, _mm512_set1_epi32(0xffff)));
  return to_float(static_cast<bf16>(_mm512_reduce_max_epu32(pairs)));
}

AVX512 void quantize_avx512(const bf16* x, int64_t k, float inverse, uint8_t* out) {
  const __m512 factor = _mm512_set1_ps(inverse);
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 mask = static_cast<__mmask16>(k - i < 16 ? (1 << (k - i)) - 1 : 0xffff);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + i)), 16);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(wide), factor));
    _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
  }
}
#endif

// x [M, K] bfloat16 over int8 weights (see pack_int8); returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& offsets,
                   const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), k = x.size(1), panels = packed.size(0), groups = packed.size(1);
  TORCH_CHECK(padded(k, 4 * TILE_GROUPS) == groups * 4 && padded(n, 2 * PANEL) == panels * PANEL,
              "x and the packed weights do not fit");
  // What is beyond K meets weights of zero, whatever it is.
  auto values = at::empty({m, groups * 4}, x.options().dtype(at::kByte));
  auto row_scales = at::empty({m}, x.options().dtype(at::kFloat));
  const bf16* source = data(x);
  auto* quantized = values.data_ptr<uint8_t>();
  auto* found = row_scales.data_ptr<float>();
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      found[row] = quantize_row(source + row * k, k, quantized + row * groups * 4);
  });
  auto result = at::empty({m, n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const Rows rows{quantized, m, groups, found};
  const Weights weights{static_cast<const uint8_t*>(packed.const_data_ptr()), groups, scales.const_data_ptr<float>(),
                        offsets.const_data_ptr<int32_t>()};
  at::parallel_for(0, panels / 2, 1, [&](int64_t begin, int64_t end) { project_int8(rows, weights, out, begin, end); });
  return result;
}

}  // namespace

float quantize_row(const bf16* x, int64_t k, uint8_t* out) {
#if HAS_X86
  const bool fast = has_avx512();
  const float scale = (fast ? largest_of_avx512(x, k) : largest_of(x, k)) / 127.0f;
#else
  const float scale = largest_of(x, k) / 127.0f;
#endif
  if (!(scale > 0.0f && std::isfinite(scale))) {
    std::memset(out, 128, k);
    return scale;
  }
  const float inverse = 1.0f / scale;
#if HAS_X86
  if (fast) {
    quantize_avx512(x, k, inverse, out);
    return scale;
  }
#endif
  for (int64_t i = 0; i < k; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(to_float(x[i]) * inverse)) + 128);
  return scale;
}

void project_int8(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Int8>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_int8(Tensor weight) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor offsets, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_int8", slimpajama::pack_int8);
  library.impl("linear_int8", slimpajama::linear_int8);
}
