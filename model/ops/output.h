// Where a projection's results go, and what is still done to them.
#pragma once

#include "common.h"

namespace slimpajama {

constexpr int64_t PANEL = 16;  // outputs of a panel of weights: one per 32-bit lane of a 512-bit register

enum class Activation { none, gelu, gelu_tanh, relu, silu };

// bfloat16 or float32 [M, N], each activation(sum + bias) + added, of which all but the sum may be missing.
struct Output {
  float* wide;
  bf16* narrow;
  const float* bias;  // [N]
  int64_t n;
  int64_t stride = n;  // from row to row
  Activation activation = Activation::none;
  const float* added_wide = nullptr;  // [M, N] without gaps, or
  const bf16* added_narrow = nullptr;

  // Whether results are bfloat16 and no more is done to them than to add a bias.
  bool is_plain() const { return narrow && activation == Activation::none && !added_wide && !added_narrow; }
};

}  // namespace slimpajama
