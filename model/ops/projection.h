// What the projections share: panels of packed weights, and where their results go.
#pragma once

#include <ATen/Parallel.h>

#include <optional>

#include "vectors.h"

namespace slimpajama {

constexpr int64_t PANEL = 16;  // outputs of a packed panel: one per 32-bit lane of a 512-bit register

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
#endif

// Splits panels among threads in multiples of 4, so that all but the last thread run the wide tile only.
template <typename Work>
void for_panels(int64_t panels, const Work& work) {
  at::parallel_for(0, (panels + 3) / 4, 1, [&](int64_t begin, int64_t end) {
    work(begin * 4, std::min(end * 4, panels));
  });
}

inline Output output_for(Tensor& result, const std::optional<Tensor>& bias) {
  const bool wide = result.scalar_type() == at::kFloat;
  return {wide ? result.data_ptr<float>() : nullptr, wide ? nullptr : mutable_data(result),
          bias ? bias->const_data_ptr<float>() : nullptr, result.size(1)};
}

}  // namespace slimpajama
