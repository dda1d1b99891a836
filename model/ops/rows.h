// What is done to a row between the products, compiled for the registers of AVX-512 and for lanes.
#pragma once

#include "lanes.h"
#include "output.h"
#include "vectors.h"

namespace slimpajama {

struct Norm {
  const float *weight, *bias;  // [E]
  float epsilon;
};

// Values between which 0 is; `most` is NaN if any value is.
struct Range {
  float least, most;
};

// A row's softmax over a block of keys, or over all blocks so far: the largest scaled score, and the sum of the weights.
struct SoftmaxSum {
  float largest = -INFINITY, total = 0.0f;
};

constexpr float LOG2_E = 1.44269504f;

}  // namespace slimpajama

#if HAS_X86
namespace slimpajama::avx512 {
#define VECTORS AVX512
#include "row_steps.h"
#undef VECTORS
}  // namespace slimpajama::avx512
#define FASTEST(step) (has_avx512() ? avx512::step : lanes::step)
#else
#define FASTEST(step) lanes::step
#endif

namespace slimpajama::lanes {
#define VECTORS LANES
#include "row_steps.h"
#undef VECTORS
}  // namespace slimpajama::lanes
