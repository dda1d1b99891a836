// Sixteen float32 in one register of AVX-512; `lanes.h` has the same names for narrower ones.
#pragma once

#include "common.h"

#if HAS_X86
namespace slimpajama::avx512 {

using Floats = __m512;

AVX512 inline Floats all(float value) { return _mm512_set1_ps(value); }
AVX512 inline Floats zeros() { return _mm512_setzero_ps(); }

AVX512 inline Floats widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

AVX512 inline Floats widen(const bf16* source) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

AVX512 inline Floats widen(const float* source) { return _mm512_loadu_ps(source); }

AVX512 inline void narrow(bf16* target, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

AVX512 inline void narrow(float* target, Floats values) { _mm512_storeu_ps(target, values); }

AVX512 inline Floats as_bf16(Floats x) { return widen(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))); }  // rounded

AVX512 inline __mmask16 mask_of(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

AVX512 INLINE Floats widen_some(const float* source, int64_t count) {  // the first `count`, and zeros
  if (count == 16) return widen(source);
  return _mm512_maskz_loadu_ps(mask_of(count), source);
}

AVX512 INLINE Floats widen_some(const bf16* source, int64_t count) {
  if (count == 16) return widen(source);
  return widen(_mm256_maskz_loadu_epi16(mask_of(count), source));
}

AVX512 INLINE void narrow_some(float* target, int64_t count, Floats values) {
  if (count == 16) return narrow(target, values);
  _mm512_mask_storeu_ps(target, mask_of(count), values);
}

AVX512 INLINE void narrow_some(bf16* target, int64_t count, Floats values) {
  if (count == 16) return narrow(target, values);
  _mm256_mask_storeu_epi16(target, mask_of(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

AVX512 INLINE void narrow_some(uint8_t* target, int64_t count, Floats values) {  // from 0 on; 255 for what is above
  const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(values));
  if (count == 16) return _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
  _mm_mask_storeu_epi8(target, mask_of(count), bytes);
}

AVX512 inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
AVX512 inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // of NaN and b, b; of a and NaN, NaN
AVX512 inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // likewise
AVX512 inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, 8); }
AVX512 inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n, n whole

// The lanes from `first` to before `last` of x, elsewhere `other`.
AVX512 inline Floats chosen(int64_t first, int64_t last, Floats x, float other) {
  const auto within = static_cast<__mmask16>(mask_of(last) & ~mask_of(first));
  return _mm512_mask_mov_ps(all(other), within, x);
}

AVX512 inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
AVX512 inline float smallest(Floats x) { return _mm512_reduce_min_ps(x); }
AVX512 inline float greatest(Floats x) { return _mm512_reduce_max_ps(x); }
AVX512 inline bool any_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }

// x Phi(x), Phi the normal distribution, as max(x, 0) - |x| Phi(-|x|). Up to 5 Phi(-a) is one of sixteen cubics, each
// fitted to a third around a multiple of a third; beyond 5 it is that at 5. Off by less than 3e-6.
AVX512 INLINE Floats gelu(Floats x) {
  constexpr float LIMIT = 5.0f, WHOLE = 0x1p23f;  // from it on the last bits of a float32 are a whole number
  alignas(64) static constexpr float FITTED[][16] = {  // from the cubes on
      {6.53857663e-02f, 5.49270026e-02f, 2.90425476e-02f, -1.13506270e-04f, -2.11211815e-02f, -2.92845760e-02f,
       -2.68708039e-02f, -1.93860736e-02f, -1.16228517e-02f, -5.93976351e-03f, -2.62374105e-03f, -1.01041829e-03f,
       -3.41168750e-04f, -1.01402133e-04f, -2.66072948e-05f, -6.17749265e-06f},
      {2.08179801e-04f, 7.57681439e-03f, 4.77778725e-02f, 1.20769888e-01f, 1.93516150e-01f, 2.29277447e-01f,
       2.15339407e-01f, 1.66467011e-01f, 1.08321801e-01f, 6.01980276e-02f, 2.88562700e-02f, 1.20164929e-02f,
       4.36980044e-03f, 1.39319838e-03f, 3.90641042e-04f, 9.65714280e-05f},
      {-3.98955375e-01f, -4.00727391e-01f, -4.21864867e-01f, -4.83165711e-01f, -5.67406774e-01f, -6.19698763e-01f,
       -5.92900455e-01f, -4.86429542e-01f, -3.41158241e-01f, -2.05246300e-01f, -1.06459238e-01f, -4.78475839e-02f,
       -1.87160838e-02f, -6.39541680e-03f, -1.91507908e-03f, -5.03887073e-04f},
      {5.00000238e-01f, 5.00142097e-01f, 5.03898025e-01f, 5.21166503e-01f, 5.53790987e-01f, 5.79316676e-01f,
       5.62159419e-01f, 4.84771520e-01f, 3.63700569e-01f, 2.35679835e-01f, 1.31843388e-01f, 6.38187379e-02f,
       2.68139746e-02f, 9.81076714e-03f, 3.13535961e-03f, 8.77622399e-04f}};
  const Floats a = smaller(all(LIMIT), _mm512_abs_ps(x));
  const __m512i piece = _mm512_castps_si512(fma(a, all(15.0f / LIMIT), all(WHOLE)));
  Floats p = _mm512_permutexvar_ps(piece, widen(FITTED[0]));
  for (int i = 1; i < 4; ++i) p = fma(p, a, _mm512_permutexvar_ps(piece, widen(FITTED[i])));
  return _mm512_fnmadd_ps(a, p, greater(zeros(), x));
}

// sum + the pair of numbers at `both` times the pairs in the lanes of `others`.
AVX512 inline Floats add_pairs(Floats sum, const bf16* both, __m512i others) {
  int32_t pair;
  std::memcpy(&pair, both, 4);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)), reinterpret_cast<__m512bh>(others));
}

}  // namespace slimpajama::avx512
#endif
