// Projections. Packed bfloat16 weights are [N / 16][K / 2][16][2]: for a pair of inputs, the pair of each of 16 outputs,
// which is what one dpbf16 instruction multiplies by a broadcast pair of x. N is padded to 16, K to 2, with zeros.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "projection.h"

namespace {

using namespace slimpajama;

Tensor pack_bf16(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2, "weight is a bfloat16 matrix [N, K]");
  auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1), panels = (n + PANEL - 1) / PANEL, pairs = (k + 1) / 2;
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

#if HAS_X86
template <int ROWS, int PANELS>
AVX512 inline void tile_bf16(const bf16* x, int64_t k, const bf16* w, int64_t pairs, const Output& out, int64_t row,
                             int64_t panel) {
  __m512 sums[ROWS][PANELS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS; ++j) sums[i][j] = _mm512_setzero_ps();
  const int64_t panel_size = pairs * PANEL * 2;
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh weights[PANELS];
    for (int j = 0; j < PANELS; ++j)
      weights[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + j * panel_size + p * PANEL * 2));
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * k + 2 * p, 4);
      const __m512bh values = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int j = 0; j < PANELS; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], weights[j], values);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS; ++j) store_avx512(out, row + i, (panel + j) * PANEL, sums[i][j]);
}

template <int PANELS>
AVX512 void rows_bf16(const bf16* x, int64_t m, int64_t k, const bf16* w, int64_t pairs, const Output& out,
                      int64_t panel) {
  constexpr int TALL = PANELS == 4 ? 6 : PANELS == 2 ? 12 : 24;  // 24 of the 32 registers hold sums
  int64_t row = 0;
  for (; row + TALL <= m; row += TALL) tile_bf16<TALL, PANELS>(x + row * k, k, w, pairs, out, row, panel);
  for (; row + 4 <= m; row += 4) tile_bf16<4, PANELS>(x + row * k, k, w, pairs, out, row, panel);
  for (; row < m; ++row) tile_bf16<1, PANELS>(x + row * k, k, w, pairs, out, row, panel);
}

AVX512 void panels_bf16(const bf16* x, int64_t m, int64_t k, const bf16* w, int64_t pairs, const Output& out,
                        int64_t begin, int64_t end) {
  const int64_t size = pairs * PANEL * 2;
  int64_t panel = begin;
  for (; panel + 4 <= end; panel += 4) rows_bf16<4>(x, m, k, w + panel * size, pairs, out, panel);
  for (; panel < end; ++panel) rows_bf16<1>(x, m, k, w + panel * size, pairs, out, panel);
}
#endif

void panels_bf16_plain(const bf16* x, int64_t m, int64_t k, const bf16* w, int64_t pairs, const Output& out,
                       int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel)
    for (int64_t row = 0; row < m; ++row) {
      float sums[PANEL] = {};
      for (int64_t i = 0; i < k; ++i) {
        const float value = to_float(x[row * k + i]);
        const bf16* weights = w + ((panel * pairs + i / 2) * PANEL) * 2 + i % 2;
        for (int64_t lane = 0; lane < PANEL; ++lane) sums[lane] += value * to_float(weights[2 * lane]);
      }
      out.store(row, panel * PANEL, sums, std::min(PANEL, out.n - panel * PANEL));
    }
}

// x [M, K] bfloat16, packed weights, bias float32 [N] or none; returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_bf16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), k = x.size(1), panels = packed.size(0), pairs = packed.size(1);
  TORCH_CHECK(k == pairs * 2 && (n + PANEL - 1) / PANEL == panels, "x and the packed weights do not fit");
  auto result = at::empty({m, n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const bf16 *rows = data(x), *weights = data(packed);
  for_panels(panels, [&](int64_t begin, int64_t end) {
#if HAS_X86
    if (cpu_is_fast()) return panels_bf16(rows, m, k, weights, pairs, out, begin, end);
#endif
    panels_bf16_plain(rows, m, k, weights, pairs, out, begin, end);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_bf16(Tensor weight) -> Tensor");
  library.def("linear_bf16(Tensor x, Tensor packed, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_bf16", pack_bf16);
  library.impl("linear_bf16", linear_bf16);
}
