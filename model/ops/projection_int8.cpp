// int8 projections. Weights are symmetric per output: w ~ scale[n] * q. Activations are quantized on the way in,
// symmetric per row, and stored with 128 added, because the instruction multiplies unsigned by signed; what the 128
// adds, 128 * sum(q[n]), is subtracted again. Packed weights are [N / 16][K / 4][16][4].

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "projection.h"

namespace {

using namespace slimpajama;

std::tuple<Tensor, Tensor, Tensor> pack_int8(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "weight is a matrix [N, K]");
  auto w = weight.to(at::kFloat).contiguous();
  const int64_t n = w.size(0), k = w.size(1), panels = (n + PANEL - 1) / PANEL, quads = (k + 3) / 4;
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

#if HAS_X86
// One row of k values, k a multiple of 16; returns the scale.
AVX512 float quantize_row_avx512(const bf16* source, int64_t k, uint8_t* target) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(widen(source + i)));
  const float scale = _mm512_reduce_max_ps(top) / 127.0f;
  const __m512 inverse = _mm512_set1_ps(scale > 0.0f ? 1.0f / scale : 0.0f);
  const __m512i offset = _mm512_set1_epi32(128);
  for (int64_t i = 0; i < k; i += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(widen(source + i), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(q, offset)));
  }
  return scale;
}
#endif

struct QuantizedRows {
  std::vector<uint8_t> values;  // [M, 4 * quads]
  std::vector<float> scales;    // [M]
};

QuantizedRows quantize_rows(const Tensor& x, int64_t quads) {
  const int64_t m = x.size(0), k = x.size(1);
  QuantizedRows result{std::vector<uint8_t>(m * quads * 4, 128), std::vector<float>(m)};
  const bf16* source = data(x);
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
#if HAS_X86
      if (cpu_is_fast() && k % 16 == 0) {
        result.scales[row] = quantize_row_avx512(source + row * k, k, result.values.data() + row * quads * 4);
        continue;
      }
#endif
      float largest = 0.0f;
      for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::abs(to_float(source[row * k + i])));
      const float scale = largest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      for (int64_t i = 0; i < k; ++i)
        result.values[row * quads * 4 + i] =
            static_cast<uint8_t>(static_cast<int>(std::nearbyint(to_float(source[row * k + i]) * inverse)) + 128);
      result.scales[row] = scale;
    }
  });
  return result;
}

struct Int8Weights {
  const int8_t* values;
  const float* scales;
  const int32_t* offsets;
  int64_t quads;
};

#if HAS_X86
// The compiler's own form of this instruction copies every sum before and after it.
AVX512 inline __m512i dot_int8(__m512i sum, __m512i x, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
  return sum;
}

template <int ROWS, int PANELS>
AVX512 inline void tile_int8(const uint8_t* x, const float* x_scales, const Int8Weights& w, const Output& out,
                             int64_t row, int64_t panel) {
  __m512i sums[ROWS][PANELS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS; ++j) sums[i][j] = _mm512_setzero_si512();
  const int8_t* first = w.values + panel * w.quads * PANEL * 4;
  for (int64_t q = 0; q < w.quads; ++q) {
    __m512i weights[PANELS];
    for (int j = 0; j < PANELS; ++j) weights[j] = _mm512_loadu_si512(first + (j * w.quads + q) * PANEL * 4);
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
      int32_t quad;
      std::memcpy(&quad, x + i * w.quads * 4 + 4 * q, 4);
      const __m512i values = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j) sums[i][j] = dot_int8(sums[i][j], values, weights[j]);
    }
  }
  for (int j = 0; j < PANELS; ++j) {
    const __m512 scales = _mm512_loadu_ps(w.scales + (panel + j) * PANEL);
    const __m512i offsets = _mm512_loadu_si512(w.offsets + (panel + j) * PANEL);
    for (int i = 0; i < ROWS; ++i) {
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][j], offsets));
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(exact, scales), _mm512_set1_ps(x_scales[i]));
      store_avx512(out, row + i, (panel + j) * PANEL, scaled);
    }
  }
}

template <int PANELS>
AVX512 void rows_int8(const QuantizedRows& x, int64_t m, const Int8Weights& w, const Output& out, int64_t panel) {
  constexpr int TALL = PANELS == 4 ? 6 : 24;
  const uint8_t* values = x.values.data();
  const float* scales = x.scales.data();
  const int64_t stride = w.quads * 4;
  int64_t row = 0;
  for (; row + TALL <= m; row += TALL)
    tile_int8<TALL, PANELS>(values + row * stride, scales + row, w, out, row, panel);
  for (; row + 4 <= m; row += 4) tile_int8<4, PANELS>(values + row * stride, scales + row, w, out, row, panel);
  for (; row < m; ++row) tile_int8<1, PANELS>(values + row * stride, scales + row, w, out, row, panel);
}

AVX512 void panels_int8(const QuantizedRows& x, int64_t m, const Int8Weights& w, const Output& out, int64_t begin,
                        int64_t end) {
  int64_t panel = begin;
  for (; panel + 4 <= end; panel += 4) rows_int8<4>(x, m, w, out, panel);
  for (; panel < end; ++panel) rows_int8<1>(x, m, w, out, panel);
}
#endif

void panels_int8_plain(const QuantizedRows& x, int64_t m, const Int8Weights& w, const Output& out, int64_t begin,
                       int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t row = 0; row < m; ++row) {
      int32_t sums[PANEL] = {};
      for (int64_t i = 0; i < w.quads * 4; ++i) {
        const int32_t value = x.values[row * w.quads * 4 + i];
        const int8_t* weights = w.values + ((panel * w.quads + i / 4) * PANEL) * 4 + i % 4;
        for (int64_t lane = 0; lane < PANEL; ++lane) sums[lane] += value * weights[4 * lane];
      }
      float results[PANEL];
      for (int64_t lane = 0; lane < PANEL; ++lane)
        results[lane] = static_cast<float>(sums[lane] - w.offsets[panel * PANEL + lane]) *
                        w.scales[panel * PANEL + lane] * x.scales[row];
      out.store(row, panel * PANEL, results, std::min(PANEL, out.n - panel * PANEL));
    }
}

// x [M, K] bfloat16 over int8 weights (see pack_int8); returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& offsets,
                   const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), panels = packed.size(0), quads = packed.size(1);
  TORCH_CHECK((x.size(1) + 3) / 4 == quads && (n + PANEL - 1) / PANEL == panels, "x and the packed weights do not fit");
  auto result = at::empty({m, n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const QuantizedRows rows = quantize_rows(x, quads);
  const Int8Weights weights{packed.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(),
                            offsets.const_data_ptr<int32_t>(), quads};
  for_panels(panels, [&](int64_t begin, int64_t end) {
#if HAS_X86
    if (cpu_is_fast()) return panels_int8(rows, m, weights, out, begin, end);
#endif
    panels_int8_plain(rows, m, weights, out, begin, end);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_int8(Tensor weight) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor offsets, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_int8", pack_int8);
  library.impl("linear_int8", linear_int8);
}
