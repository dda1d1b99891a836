// A projection as the operators of whole layers keep it: which kind of weights it has, and where they are.
#pragma once

#include <vector>

#include "crew.h"
#include "projection.h"

namespace slimpajama {

struct Projection {
  Weights weights;
  decltype(&project_bf16) multiply;
  bool narrow;        // whether inputs are quantized first
  const float* bias;  // [N] or none
  int64_t n, k;

  int64_t pairs() const { return padded(n, 2 * PANEL) / (2 * PANEL); }  // of panels
};

// Of packed weights, what else they consist of (two tensors, empty where there is nothing) and a bias, empty likewise.
inline Projection projection_of(const Tensor* tensors, int64_t n, int64_t k) {
  const Tensor &packed = tensors[0], &bias = tensors[3];
  Projection found{{}, project_bf16, false, bias.numel() ? bias.const_data_ptr<float>() : nullptr, n, k};
  switch (packed.scalar_type()) {
    case at::kChar:
      found.weights = weights_in_8_bits(packed, tensors[1], tensors[2]);
      found.multiply = project_int8;
      found.narrow = true;
      break;
    case at::kByte:
      found.weights = weights_in_4_bits(packed, tensors[1]);
      found.multiply = project_int4;
      found.narrow = true;
      break;
    default: found.weights = {static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(1)};
  }
  const int64_t width = found.narrow ? padded(k, LINE) / 4 : k / 2;
  TORCH_CHECK(k % 32 == 0 && found.weights.groups == width &&
                  packed.numel() * packed.element_size() == found.weights.panel_bytes() * padded(n, 2 * PANEL) / PANEL,
              "packed weights of other sizes, or inputs that are no multiple of 32");
  return found;
}

// Of x [M, K], bfloat16 or where the weights want it so quantized, all outputs, shared out to whoever is there.
inline void project(Member& member, const Projection& projection, const Rows& x, const Output& out) {
  member.share(projection.pairs(), [&](int64_t begin, int64_t end) {
    projection.multiply(x, projection.weights, out, begin, end);
  });
}

}  // namespace slimpajama
