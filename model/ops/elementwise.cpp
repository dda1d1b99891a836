// Element-wise steps of a decoder layer, one pass each. All arithmetic is float32.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "operators.h"
#include "vectors.h"

namespace slimpajama {

namespace {

#if HAS_X86
AVX512 __m512 widen_some(const bf16* source, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, source)); }

AVX512 void narrow_some(bf16* target, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(target, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// What `add_rms_norm` does to a row.
AVX512 void add_rms_norm_avx512(bf16* values, const bf16* more, const bf16* weights, int64_t e, float epsilon,
                                bf16* out) {
  const auto mask_at = [&](int64_t i) { return static_cast<__mmask16>((1u << std::min<int64_t>(16, e - i)) - 1); };
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < e; i += 16) {
    const __mmask16 mask = mask_at(i);
    if (more)
      narrow_some(values + i, mask, _mm512_add_ps(widen_some(values + i, mask), widen_some(more + i, mask)));
    const __m512 x = widen_some(values + i, mask);
    squares = _mm512_fmadd_ps(x, x, squares);
  }
  const float sum = _mm512_reduce_add_ps(squares);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(sum / static_cast<float>(e) + epsilon));
  for (int64_t i = 0; i < e; i += 16) {
    const __mmask16 mask = mask_at(i);
    const __m512 scaled = _mm512_mul_ps(widen_some(values + i, mask), scale);
    const __m512 rounded = widen(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled)));
    narrow_some(out + i, mask, _mm512_mul_ps(rounded, widen_some(weights + i, mask)));
  }
}

// What `rotate` does to a head, whose half is a multiple of 16.
AVX512 void rotate_avx512(bf16* head, const bf16* c, const bf16* s, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 a = widen(head + i), b = widen(head + i + half);
    narrow(head + i, _mm512_fmadd_ps(a, widen(c + i), _mm512_mul_ps(b, widen(s + i))));
    narrow(head + i + half, _mm512_fmadd_ps(b, widen(c + i + half), _mm512_mul_ps(a, widen(s + i + half))));
  }
}

AVX512 void silu_mul_avx512(const bf16* gate, const bf16* up, int64_t f, bf16* out) {  // f is a multiple of 16
  for (int64_t i = 0; i < f; i += 16) {
    const __m512 g = widen(gate + i);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    narrow(out + i, _mm512_mul_ps(_mm512_div_ps(g, below), widen(up + i)));
  }
}
#endif

}  // namespace

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
#if HAS_X86
      if (has_avx512()) {
        add_rms_norm_avx512(values, more, weights, e, static_cast<float>(epsilon), out);
        continue;
      }
#endif
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
      if (has_avx512() && f % 16 == 0) {
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
#if HAS_X86
        if (has_avx512() && half % 16 == 0) {
          rotate_avx512(head, c, s, half);
          continue;
        }
#endif
        for (int64_t i = 0; i < half; ++i) {
          const float a = to_float(head[i]), b = to_float(head[i + half]);
          head[i] = to_bf16(a * to_float(c[i]) + b * to_float(s[i]));
          head[i + half] = to_bf16(b * to_float(c[i + half]) + a * to_float(s[i + half]));
        }
      }
    }
  });
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("add_rms_norm(Tensor(a!) x, Tensor? residual, Tensor weight, float epsilon) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def("rotate(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("add_rms_norm", slimpajama::add_rms_norm);
  library.impl("silu_mul", slimpajama::silu_mul);
  library.impl("rotate", slimpajama::rotate);
}
