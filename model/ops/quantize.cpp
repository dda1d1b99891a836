// Rows on their way into 8 bits: of each the range is found, 0 included, and cut into 255 equal steps (arXiv 1712.05877).

#include "projection.h"

namespace slimpajama {

namespace {

struct Range {
  float least = 0.0f, most = 0.0f;  // most is NaN if any value is
};

Range range_of(const bf16* x, int64_t k, const float* factors) {
  Range range;
  for (int64_t i = 0; i < k; ++i) {
    const float value = to_float(x[i]) * (factors ? factors[i] : 1.0f);
    if (std::isnan(value)) return {0.0f, value};
    range = {std::min(range.least, value), std::max(range.most, value)};
  }
  return range;
}

void quantize(const bf16* x, int64_t k, const float* factors, float inverse, int32_t zero, uint8_t* out) {
  for (int64_t i = 0; i < k; ++i) {
    const float value = to_float(x[i]) * (factors ? factors[i] : 1.0f);
    out[i] = static_cast<uint8_t>(std::clamp(static_cast<int>(std::nearbyint(value * inverse)) + zero, 0, 255));
  }
}

#if HAS_X86
AVX512 __m512 sixteen(const bf16* x, const float* factors, int64_t i, __mmask16 mask) {
  const __m512 values = widen(_mm256_maskz_loadu_epi16(mask, x + i));
  return factors ? _mm512_mul_ps(values, _mm512_maskz_loadu_ps(mask, factors + i)) : values;
}

AVX512 __mmask16 mask_of(int64_t left) { return static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff); }

AVX512 Range range_of_avx512(const bf16* x, int64_t k, const float* factors) {
  __m512 least = _mm512_setzero_ps(), most = _mm512_setzero_ps();
  __mmask16 broken = 0;
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 values = sixteen(x, factors, i, mask_of(k - i));
    least = _mm512_min_ps(least, values);
    most = _mm512_max_ps(most, values);
    broken |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  }
  if (broken) return {0.0f, NAN};
  return {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most)};
}

AVX512 void quantize_avx512(const bf16* x, int64_t k, const float* factors, float inverse, int32_t zero, uint8_t* out) {
  const __m512 steps = _mm512_set1_ps(inverse);
  const __m512i offset = _mm512_set1_epi32(zero), nothing = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __mmask16 mask = mask_of(k - i);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(sixteen(x, factors, i, mask), steps));
    const __m512i moved = _mm512_max_epi32(nothing, _mm512_add_epi32(q, offset));
    _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtusepi32_epi8(moved));
  }
}
#endif

}  // namespace

Steps8 quantize_row(const bf16* x, int64_t k, const float* factors, uint8_t* out) {
#if HAS_X86
  const bool fast = has_avx512();
  const Range range = fast ? range_of_avx512(x, k, factors) : range_of(x, k, factors);
#else
  const Range range = range_of(x, k, factors);
#endif
  const float scale = (range.most - range.least) / 255.0f;
  if (!(scale > 0.0f && std::isfinite(scale))) {
    std::memset(out, 0, k);
    return {scale, 0};
  }
  const float inverse = 1.0f / scale;
  const auto zero = static_cast<int32_t>(std::nearbyint(-range.least * inverse));
#if HAS_X86
  if (fast) {
    quantize_avx512(x, k, factors, inverse, zero, out);
    return {scale, zero};
  }
#endif
  quantize(x, k, factors, inverse, zero, out);
  return {scale, zero};
}

}  // namespace slimpajama
