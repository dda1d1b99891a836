// The activations that follow a projection, for one number and for sixteen.
#pragma once

#include "vectors.h"

namespace slimpajama {

enum class Activation { none, gelu, gelu_tanh, relu };

inline float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    default: return x;
  }
}

#if HAS_X86
// x Phi(x), Phi the normal distribution: Phi(x) - 1/2 is x times a polynomial in t = 2 (x / 5)^2 - 1 that was fitted at
// Chebyshev's points; beyond 5 it is that at 5. Off by less than 3e-6.
AVX512 inline __m512 gelu_avx512(__m512 x) {
  constexpr float LIMIT = 5.0f;
  constexpr float FITTED[] = {
      7.35376389e-04f, -1.67673098e-03f, 1.37459615e-03f, -2.52691673e-03f, 6.76652750e-03f,
      -1.13071249e-02f, 1.62360898e-02f, -2.32131283e-02f, 3.14767586e-02f, -4.04512824e-02f,
      5.15179297e-02f, -7.02959089e-02f, 1.41363818e-01f};
  const __m512 near = _mm512_min_ps(_mm512_set1_ps(LIMIT), _mm512_max_ps(_mm512_set1_ps(-LIMIT), x));
  const __m512 scale = _mm512_set1_ps(2.0f / (LIMIT * LIMIT));
  const __m512 t = _mm512_fmsub_ps(_mm512_mul_ps(near, near), scale, _mm512_set1_ps(1.0f));
  __m512 p = _mm512_set1_ps(FITTED[0]);
  for (size_t i = 1; i < std::size(FITTED); ++i) p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(FITTED[i]));
  return _mm512_mul_ps(x, _mm512_fmadd_ps(near, p, _mm512_set1_ps(0.5f)));
}

// x / (1 + e^(-2 u)), u the argument of the hyperbolic tangent.
AVX512 inline __m512 gelu_tanh_avx512(__m512 x) {
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 power = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-2.0f * 0.79788456f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_avx512(power)));
}

AVX512 inline __m512 activated_avx512(Activation activation, __m512 x) {
  switch (activation) {
    case Activation::gelu: return gelu_avx512(x);
    case Activation::gelu_tanh: return gelu_tanh_avx512(x);
    case Activation::relu: return _mm512_max_ps(_mm512_setzero_ps(), x);  // in this order NaN stays NaN
    default: return x;
  }
}
#endif

}  // namespace slimpajama
