// CPU operators for bfloat16 and int8 networks: projections over weights packed once, decode attention that reads the
// paged cache in place, and the small element-wise steps between them, each fused into one pass.
//
// AVX-512 (BF16, VNNI) code is chosen when the CPU has it; the plain loops beside it are the fallback and say what is
// computed. Bound as torch operators `slimpajama::*`; `model.ops.library` builds and loads this file, and the tests hold
// every operator against float64. Threads are torch's own (at::parallel_for).
//
// Legend: M rows (tokens), N outputs, K inputs, H query heads, G key/value heads, D head size.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

namespace {

using at::Tensor;
using bf16 = uint16_t;

constexpr int64_t PANEL = 16;  // outputs of a packed panel: one per 32-bit lane of a 512-bit register

bool cpu_is_fast() {
#if HAS_X86
  static const bool fast = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return fast;
#else
  return false;
#endif
}

inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline bf16 to_bf16(float value) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline const bf16* data(const Tensor& tensor) { return static_cast<const bf16*>(tensor.const_data_ptr()); }
inline bf16* mutable_data(const Tensor& tensor) { return static_cast<bf16*>(tensor.data_ptr()); }

#if HAS_X86
AVX512 inline __m512 widen(const bf16* source) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

AVX512 inline void narrow(bf16* target, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}
#endif

void check_rows(const Tensor& x, at::ScalarType type) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.dim() == 2 && x.is_contiguous(),
              "expected a contiguous CPU matrix of ", type);
}

// ---------------------------------------------------------------------------------------------------------------------
// Projections. Packed bfloat16 weights are [N / 16][K / 2][16][2]: for a pair of inputs, the pair of each of 16 outputs,
// which is what one dpbf16 instruction multiplies by a broadcast pair of x. N is padded to 16, K to 2, with zeros.

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

struct Output {  // where a projection's results go: bfloat16 or float32 [M, N], with an optional float32 bias [N]
  float* wide;
  bf16* narrow;
  const float* bias;
  int64_t n;

  void store(int64_t row, int64_t first, const float* values, int64_t count) const {
    for (int64_t j = 0; j < count; ++j) {
      const float value = values[j] + (bias ? bias[first + j] : 0.0f);
      if (wide) wide[row * n + first + j] = value;
      else narrow[row * n + first + j] = to_bf16(value);
    }
  }
};

#if HAS_X86
AVX512 inline void store_avx512(const Output& out, int64_t row, int64_t first, __m512 sum) {
  const int64_t count = std::min<int64_t>(PANEL, out.n - first);
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (out.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out.bias + first));
  if (out.wide) _mm512_mask_storeu_ps(out.wide + row * out.n + first, mask, sum);
  else
    _mm256_mask_storeu_epi16(out.narrow + row * out.n + first, mask,
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
}

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

// Splits panels among threads in multiples of 4, so that all but the last thread run the wide tile only.
template <typename Work>
void for_panels(int64_t panels, const Work& work) {
  at::parallel_for(0, (panels + 3) / 4, 1, [&](int64_t begin, int64_t end) {
    work(begin * 4, std::min(end * 4, panels));
  });
}

Output output_for(Tensor& result, const std::optional<Tensor>& bias) {
  const bool wide = result.scalar_type() == at::kFloat;
  return {wide ? result.data_ptr<float>() : nullptr, wide ? nullptr : mutable_data(result),
          bias ? bias->const_data_ptr<float>() : nullptr, result.size(1)};
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

// ---------------------------------------------------------------------------------------------------------------------
// int8 projections. Weights are symmetric per output: w ~ scale[n] * q. Activations are quantized on the way in,
// symmetric per row, and stored with 128 added, because the instruction multiplies unsigned by signed; what the 128
// adds, 128 * sum(q[n]), is subtracted again. Packed weights are [N / 16][K / 4][16][4].

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

// ---------------------------------------------------------------------------------------------------------------------
// Element-wise steps of a decoder layer, one pass each. All arithmetic is float32.

#if HAS_X86
AVX512 inline __m512 exp_avx512(__m512 x) {  // e^x, relative error below 2e-7 (Cephes' polynomial)
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

AVX512 void silu_mul_avx512(const bf16* gate, const bf16* up, int64_t f, bf16* out) {  // f is a multiple of 16
  for (int64_t i = 0; i < f; i += 16) {
    const __m512 g = widen(gate + i);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    narrow(out + i, _mm512_mul_ps(_mm512_div_ps(g, below), widen(up + i)));
  }
}
#endif

// Adds `residual` [M, E] to x in place where it is given, then returns rms_norm(x) * weight (arXiv 1910.07467).
Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double epsilon) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), e = x.size(1);
  auto result = at::empty_like(x);
  bf16 *rows = mutable_data(x), *normed = mutable_data(result);
  const bf16 *added = residual ? data(*residual) : nullptr, *weights = data(weight);
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      bf16 *values = rows + row * e, *out = normed + row * e;
      const bf16* more = added ? added + row * e : nullptr;
      float sum = 0.0f;
      for (int64_t i = 0; i < e; ++i) {
        if (more) values[i] = to_bf16(to_float(values[i]) + to_float(more[i]));
        const float value = to_float(values[i]);
        sum += value * value;
      }
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(e) + static_cast<float>(epsilon));
      for (int64_t i = 0; i < e; ++i)
        out[i] = to_bf16(to_float(to_bf16(to_float(values[i]) * scale)) * to_float(weights[i]));
    }
  });
  return result;
}

// gate_up [M, 2 F], gate first; returns silu(gate) * up [M, F] (arXiv 2002.05202).
Tensor silu_mul(const Tensor& gate_up) {
  check_rows(gate_up, at::kBFloat16);
  const int64_t m = gate_up.size(0), f = gate_up.size(1) / 2;
  auto result = at::empty({m, f}, gate_up.options());
  const bf16* source = data(gate_up);
  bf16* target = mutable_data(result);
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
#if HAS_X86
      if (cpu_is_fast() && f % 16 == 0) {
        silu_mul_avx512(source + row * 2 * f, source + row * 2 * f + f, f, target + row * f);
        continue;
      }
#endif
      for (int64_t i = 0; i < f; ++i) {
        const float gate = to_float(source[row * 2 * f + i]), up = to_float(source[row * 2 * f + f + i]);
        target[row * f + i] = to_bf16(gate / (1.0f + std::exp(-gate)) * up);
      }
    }
  });
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Decode attention: one query per sequence over keys and values where they lie in the paged cache
// [blocks][block_size][G][D]. Softmax runs online (arXiv 1805.02867), a block at a time.

struct DecodeShape {
  int64_t heads, groups, head_size, block_size, max_blocks;
  float scale;
};

constexpr int64_t MAX_SHARED = 8;     // query heads that share a key head on the fast path
constexpr int64_t MAX_HEADS = 64;     // query heads, and
constexpr int64_t MAX_SUMS = 1 << 14;  // their sums, that one pass over a sequence keeps

struct Groups {  // key heads that are read in one pass
  int64_t begin, end;
};

void attend_plain(const bf16* query, const bf16* keys, const bf16* values, const int32_t* blocks, int64_t first,
                  int64_t length, Groups groups, const DecodeShape& s, bf16* out) {
  const int64_t d = s.head_size, per_group = s.heads / s.groups;
  std::vector<float> sum(d);
  for (int64_t h = groups.begin * per_group; h < groups.end * per_group; ++h) {
    const int64_t group = h / per_group;
    float largest = -INFINITY, total = 0.0f;
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t position = first; position < length; ++position) {
      const int64_t slot = blocks[position / s.block_size] * s.block_size + position % s.block_size;
      const bf16 *key = keys + (slot * s.groups + group) * d, *value = values + (slot * s.groups + group) * d;
      float score = 0.0f;
      for (int64_t i = 0; i < d; ++i) score += to_float(query[h * d + i]) * to_float(key[i]);
      score *= s.scale;
      const float now = std::max(largest, score), shrink = std::exp(largest - now), weight = std::exp(score - now);
      for (int64_t i = 0; i < d; ++i) sum[i] = sum[i] * shrink + weight * to_float(value[i]);
      total = total * shrink + weight;
      largest = now;
    }
    for (int64_t i = 0; i < d; ++i) out[h * d + i] = to_bf16(sum[i] / total);
  }
}

#if HAS_X86
// The 16 sums over lanes of 16 registers, by halving: lane t of the result is the sum of sums[t].
AVX512 inline __m512 sum_each(__m512 sums[16]) {
  const __m512i even = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i odd = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t)  // lanes alternate between sums[2 t] and sums[2 t + 1]
    sums[t] = _mm512_add_ps(_mm512_permutex2var_ps(sums[2 * t], even, sums[2 * t + 1]),
                            _mm512_permutex2var_ps(sums[2 * t], odd, sums[2 * t + 1]));
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {  // pairs of lanes
    const __m512d first = _mm512_castps_pd(sums[2 * t]), second = _mm512_castps_pd(sums[2 * t + 1]);
    sums[t] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  }
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t)  // quarters, first of both registers' even ones, then of their odd ones
    sums[t] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[2 * t], sums[2 * t + 1], 0x88),
                            _mm512_shuffle_f32x4(sums[2 * t], sums[2 * t + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(sums[0], sums[1], 0x88), _mm512_shuffle_f32x4(sums[0], sums[1], 0xdd));
}

// 16 positions at a time, for all query heads of the key heads asked for: each key and value is read once. The head
// size is a multiple of 32, at most 256; at most MAX_SHARED heads share a key head here.
template <int CHUNKS>
AVX512 void attend_avx512(const bf16* query, const bf16* keys, const bf16* values, const int32_t* blocks,
                          int64_t first, int64_t length, Groups groups, const DecodeShape& s, bf16* out) {
  constexpr int64_t TILE = 16, D = 32 * CHUNKS;
  const int64_t shared = s.heads / s.groups, first_head = groups.begin * shared;
  const int64_t heads = (groups.end - groups.begin) * shared;
  float largest[MAX_HEADS], totals[MAX_HEADS];
  alignas(64) float sums[MAX_SUMS], weights[MAX_SHARED][TILE];
  for (int64_t h = 0; h < heads; ++h) largest[h] = -INFINITY, totals[h] = 0.0f;
  std::fill(sums, sums + heads * D, 0.0f);
  for (int64_t start = first; start < length; start += TILE) {
    const int64_t count = std::min(TILE, length - start);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    int64_t offsets[TILE];
    for (int64_t t = 0; t < TILE; ++t) {
      const int64_t position = start + std::min(t, count - 1);  // past the end: the last one again, with weight zero
      offsets[t] = (blocks[position / s.block_size] * s.block_size + position % s.block_size) * s.groups * D;
    }
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      const bf16 *group_keys = keys + group * D, *group_values = values + group * D;
      const int64_t h0 = (group - groups.begin) * shared;
      for (int64_t t = 0; t < TILE; ++t)  // one head's rows are far apart, which the hardware does not foresee
        for (int64_t i = 0; i < D; i += 32)
          _mm_prefetch(reinterpret_cast<const char*>(group_values + offsets[t] + i), _MM_HINT_T0);
      for (int64_t h = 0; h < shared; ++h) {
        const bf16* q = query + (first_head + h0 + h) * D;
        __m512 dots[TILE];
#pragma GCC unroll 16
        for (int64_t t = 0; t < TILE; ++t) {
          dots[t] = _mm512_setzero_ps();
          for (int c = 0; c < CHUNKS; ++c)
            dots[t] = _mm512_dpbf16_ps(dots[t], reinterpret_cast<__m512bh>(_mm512_loadu_si512(q + 32 * c)),
                                       reinterpret_cast<__m512bh>(_mm512_loadu_si512(group_keys + offsets[t] + 32 * c)));
        }
        const __m512 scores = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask,
                                                 _mm512_mul_ps(sum_each(dots), _mm512_set1_ps(s.scale)));
        float &top = largest[h0 + h], *sum = sums + (h0 + h) * D;
        const float now = std::max(top, _mm512_reduce_max_ps(scores));
        const __m512 tile = _mm512_maskz_mov_ps(mask, exp_avx512(_mm512_sub_ps(scores, _mm512_set1_ps(now))));
        const float shrink = top == -INFINITY ? 0.0f : std::exp(top - now);
        totals[h0 + h] = totals[h0 + h] * shrink + _mm512_reduce_add_ps(tile);
        top = now;
        _mm512_store_ps(weights[h], tile);
        if (shrink != 1.0f)
          for (int64_t i = 0; i < D; i += 16)
            _mm512_store_ps(sum + i, _mm512_mul_ps(_mm512_load_ps(sum + i), _mm512_set1_ps(shrink)));
      }
      for (int64_t i = 0; i < D; i += 16) {
        __m512 wide[TILE];
#pragma GCC unroll 16
        for (int64_t t = 0; t < TILE; ++t) wide[t] = widen(group_values + offsets[t] + i);
        for (int64_t h = 0; h < shared; ++h) {
          float* sum = sums + (h0 + h) * D + i;
          __m512 even = _mm512_load_ps(sum), odd = _mm512_setzero_ps();
#pragma GCC unroll 8
          for (int64_t t = 0; t < TILE; t += 2) {
            even = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][t]), wide[t], even);
            odd = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][t + 1]), wide[t + 1], odd);
          }
          _mm512_store_ps(sum, _mm512_add_ps(even, odd));
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < D; i += 16)
      narrow(out + (first_head + h) * D + i,
             _mm512_mul_ps(_mm512_load_ps(sums + h * D + i), _mm512_set1_ps(1.0f / totals[h])));
}

using Attend = void (*)(const bf16*, const bf16*, const bf16*, const int32_t*, int64_t, int64_t, Groups,
                        const DecodeShape&, bf16*);

Attend attend_for(const DecodeShape& s) {
  if (!cpu_is_fast() || s.heads / s.groups > MAX_SHARED) return attend_plain;
  switch (s.head_size) {
    case 32: return attend_avx512<1>;
    case 64: return attend_avx512<2>;
    case 96: return attend_avx512<3>;
    case 128: return attend_avx512<4>;
    case 256: return attend_avx512<8>;
    default: return attend_plain;
  }
}
#endif

// query [B, H, D]; caches [blocks, block_size, G, D], all bfloat16; block_tables [B, max_blocks] and context_lens [B]
// int32. `window` 0 means none; else only the last `window` positions are seen. Returns [B, H, D].
Tensor decode_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_tables, const Tensor& context_lens, double scale, int64_t window) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && query.dim() == 3 && query.stride(2) == 1 &&
                  query.stride(1) == query.size(2) && key_cache.is_contiguous() && value_cache.is_contiguous(),
              "query is [B, H, D] bfloat16 with whole rows; caches are contiguous");
  const int64_t batch = query.size(0);
  const DecodeShape shape{query.size(1), key_cache.size(2), query.size(2), key_cache.size(1), block_tables.size(1),
                          static_cast<float>(scale)};
  auto result = at::empty({batch, shape.heads, shape.head_size}, query.options());
  const bf16 *keys = data(key_cache), *values = data(value_cache), *queries = data(query);
  bf16* out = mutable_data(result);
  const int32_t *tables = block_tables.const_data_ptr<int32_t>(), *lens = context_lens.const_data_ptr<int32_t>();
  const int64_t row_size = shape.heads * shape.head_size, query_stride = query.stride(0);
#if HAS_X86
  const Attend attend = attend_for(shape);
#else
  const auto attend = attend_plain;
#endif
  // Many sequences: a thread takes a whole one, and reads its cache from end to end. Few: they are split by key head.
  const bool whole = batch >= 2 * at::get_num_threads() && shape.heads <= MAX_HEADS && row_size <= MAX_SUMS;
  const int64_t parts = whole ? 1 : shape.groups, width = shape.groups / parts;
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / parts, group = item % parts * width, length = lens[b];
      const int64_t first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
      attend(queries + b * query_stride, keys, values, tables + b * shape.max_blocks, first, length,
             {group, group + width}, shape, out + b * row_size);
    }
  });
  return result;
}

// x [M, H, D], a view with whole rows of heads: turns each head by its position's cosines and signed sines [M, R]
// (halves paired, R <= D), in place.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 3 && x.stride(2) == 1 && x.stride(1) == x.size(2) &&
                  cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == at::kBFloat16,
              "x is [M, H, D] bfloat16 with whole rows, cos and sin are contiguous");
  const int64_t m = x.size(0), heads = x.size(1), d = x.size(2), stride = x.stride(0), half = cos.size(-1) / 2;
  bf16* rows = mutable_data(x);
  const bf16 *cosines = data(cos), *sines = data(sin);
  at::parallel_for(0, m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bf16 *c = cosines + row * 2 * half, *s = sines + row * 2 * half;
      for (int64_t h = 0; h < heads; ++h) {
        bf16* head = rows + row * stride + h * d;
        for (int64_t i = 0; i < half; ++i) {
          const float a = to_float(head[i]), b = to_float(head[i + half]);
          head[i] = to_bf16(a * to_float(c[i]) + b * to_float(s[i]));
          head[i + half] = to_bf16(b * to_float(c[i + half]) + a * to_float(s[i + half]));
        }
      }
    }
  });
}

// key and value [M, G, D] (views with whole rows) to `slots` [M] of the caches [blocks, block_size, G, D].
void store(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
           const Tensor& slots) {
  TORCH_CHECK(key.scalar_type() == at::kBFloat16 && key.stride(2) == 1 && key.stride(1) == key.size(2) &&
                  value.stride(2) == 1 && value.stride(1) == value.size(2) && key_cache.is_contiguous() &&
                  value_cache.is_contiguous() && key_cache.scalar_type() == at::kBFloat16,
              "keys and values are [M, G, D] bfloat16 with whole rows, caches are contiguous");
  const int64_t m = key.size(0), size = key.size(1) * key.size(2);
  const bf16 *keys = data(key), *values = data(value);
  bf16 *cached_keys = mutable_data(key_cache), *cached_values = mutable_data(value_cache);
  const int64_t *targets = slots.const_data_ptr<int64_t>(), key_stride = key.stride(0), value_stride = value.stride(0);
  at::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(cached_keys + targets[row] * size, keys + row * key_stride, size * sizeof(bf16));
      std::memcpy(cached_values + targets[row] * size, values + row * value_stride, size * sizeof(bf16));
    }
  });
}

}  // namespace

TORCH_LIBRARY(slimpajama, library) {
  library.def("pack_bf16(Tensor weight) -> Tensor");
  library.def("linear_bf16(Tensor x, Tensor packed, Tensor? bias, int n, bool wide) -> Tensor");
  library.def("pack_int8(Tensor weight) -> (Tensor, Tensor, Tensor)");
  library.def(
      "linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor offsets, Tensor? bias, int n, bool wide) -> Tensor");
  library.def("add_rms_norm(Tensor(a!) x, Tensor? residual, Tensor weight, float epsilon) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def(
      "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor context_lens, "
      "float scale, int window) -> Tensor");
  library.def("rotate(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
  library.def(
      "store(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_bf16", pack_bf16);
  library.impl("linear_bf16", linear_bf16);
  library.impl("pack_int8", pack_int8);
  library.impl("linear_int8", linear_int8);
  library.impl("add_rms_norm", add_rms_norm);
  library.impl("silu_mul", silu_mul);
  library.impl("decode_attention", decode_attention);
  library.impl("rotate", rotate);
  library.impl("store", store);
}
