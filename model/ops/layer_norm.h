// Layer normalization of one row (arXiv 1607.06450), in float32.
#pragma once

#include "vectors.h"

namespace slimpajama {

struct Norm {
  const float *weight, *bias;  // [E]
  float epsilon;
};

#if HAS_X86
template <typename Value>
AVX512 void layer_norm_avx512(const float* row, int64_t e, const Norm& norm, Value* out) {  // e is a multiple of 16
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < e; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(row + i));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(e));
  for (int64_t i = 0; i < e; i += 16) {
    const __m512 distance = _mm512_sub_ps(_mm512_loadu_ps(row + i), mean);
    squares = _mm512_fmadd_ps(distance, distance, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(e);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.epsilon));
  for (int64_t i = 0; i < e; i += 16) {
    const __m512 standard = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), mean), factor);
    narrow(out + i, _mm512_fmadd_ps(standard, _mm512_loadu_ps(norm.weight + i), _mm512_loadu_ps(norm.bias + i)));
  }
}
#endif

template <typename Value>
void layer_norm(const float* row, int64_t e, const Norm& norm, Value* out) {
#if HAS_X86
  if (has_avx512() && e % 16 == 0) return layer_norm_avx512(row, e, norm, out);
#endif
  float sum = 0.0f, squares = 0.0f;
  for (int64_t i = 0; i < e; ++i) sum += row[i];
  const float mean = sum / static_cast<float>(e);
  for (int64_t i = 0; i < e; ++i) squares += (row[i] - mean) * (row[i] - mean);
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(e) + norm.epsilon);
  for (int64_t i = 0; i < e; ++i) put(out + i, (row[i] - mean) * factor * norm.weight[i] + norm.bias[i]);
}

}  // namespace slimpajama
