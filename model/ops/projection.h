// What the projections share: the layout of packed weights, and where results go.
//
// Packed weights are [N / 16][K / g][16][g], g = 2 bfloat16 or 4 int8 inputs: 32 bits of each of 16 outputs side by
// side, which one instruction multiplies by the 32 bits of x they all meet. 16 such lines, one below the other, are
// also what AMX takes for a tile. N is padded to 32 (a pair of panels), K to 64 bytes (a tile's width), with zeros.
#pragma once

#include <optional>

#include "activations.h"

namespace slimpajama {

constexpr int64_t PANEL = 16;        // outputs of a panel: one per 32-bit lane of a 512-bit register
constexpr int64_t LINE = 64;         // bytes of a panel for one group of inputs
constexpr int64_t TILE_GROUPS = 16;  // groups of inputs that a tile multiplies

constexpr int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Weights {
  const uint8_t* values;
  int64_t groups;                    // of inputs, padded to TILE_GROUPS
  const float* scales = nullptr;     // int8: [N padded]
  const int32_t* sums = nullptr;     // int8: [N padded], of an output's weights

  const uint8_t* panel(int64_t index) const { return values + index * groups * LINE; }
};

struct Rows {
  const uint8_t* values;
  int64_t m, groups;
  const float* scales = nullptr;   // int8: [M], and
  const int32_t* zeros = nullptr;  // what stands for zero
  int64_t stride = groups * 4;     // bytes from row to row, no less than these

  const uint8_t* row(int64_t index) const { return values + index * stride; }
};

// Where results go: bfloat16 or float32 [M, N], each activation(sum + bias) + added, of which all but the sum may be
// missing.
struct Output {
  float* wide;
  bf16* narrow;
  const float* bias;  // [N]
  int64_t n;
  int64_t stride = n;  // from row to row
  Activation activation = Activation::none;
  const float* added_wide = nullptr;  // [M, N] without gaps, or
  const bf16* added_narrow = nullptr;

  // One row's results for the 32 outputs of a pair of panels.
  void store(int64_t row, int64_t pair, const float* sums) const {
    const int64_t first = pair * 2 * PANEL;
    for (int64_t j = 0; j < std::min(2 * PANEL, n - first); ++j) {
      float value = activated(activation, sums[j] + (bias ? bias[first + j] : 0.0f));
      if (added_wide) value += added_wide[row * n + first + j];
      if (added_narrow) value += to_float(added_narrow[row * n + first + j]);
      if (wide) wide[row * stride + first + j] = value;
      else narrow[row * stride + first + j] = to_bf16(value);
    }
  }

#if HAS_X86
  AVX512 void store(int64_t row, int64_t pair, __m512 left, __m512 right) const {
    store_panel(row, pair * 2 * PANEL, left);
    store_panel(row, pair * 2 * PANEL + PANEL, right);
  }

  AVX512 void store_panel(int64_t row, int64_t first, __m512 sum) const {
    const int64_t count = std::clamp<int64_t>(n - first, 0, PANEL);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + first));
    if (activation != Activation::none) sum = activated_avx512(activation, sum);
    if (added_wide) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, added_wide + row * n + first));
    if (added_narrow) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(mask, added_narrow + row * n + first)));
    if (wide) _mm512_mask_storeu_ps(wide + row * stride + first, mask, sum);
    else
      _mm256_mask_storeu_epi16(narrow + row * stride + first, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
#endif
};

// Results for the pairs of panels from `begin` to `end`; called from as many threads as there are ranges. A row's
// results do not depend, to a bit, on the rows beside it.
void project_float32(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_bf16(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_int8(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);

// x ~ scale * (q - zero).
struct Steps8 {
  float scale;
  int32_t zero;
};

// Quantizes a row of K, each value times its factor where there are factors. The scale is not finite if one of the
// values is not: then nor are the row's results.
Steps8 quantize_row(const bf16* x, int64_t k, const float* factors, uint8_t* out);

inline Output output_for(const Tensor& result, const std::optional<Tensor>& bias) {
  const bool wide = result.scalar_type() == at::kFloat;
  return {wide ? result.data_ptr<float>() : nullptr, wide ? nullptr : mutable_data(result),
          bias ? bias->const_data_ptr<float>() : nullptr, result.size(1)};
}

}  // namespace slimpajama
