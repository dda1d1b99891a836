// What every file of the CPU operators shares: bfloat16, what the processor can do, and checks of arguments.
//
// The operators are bound as torch operators `slimpajama::*`, each file its own; `model.ops.library` builds and loads
// them, and the tests hold every one against float64. Threads are torch's own (at::parallel_for) or `crew.h`'s. What is done to a row
// is written once, for sixteen numbers at a time (`lanes.h`, `vectors.h`); the products have a form for each kind of
// instructions.
//
// Legend: M rows (tokens), N outputs, K inputs, H query heads, G key/value heads, D head size.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kept.h"

#define INLINED __attribute__((always_inline))  // where a call would cost more than what is done; for lambdas
#define INLINE INLINED inline

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))
#define LANES __attribute__((target("avx2,fma")))
#define HAS_X86 1
#else
#define LANES
#define HAS_X86 0
#endif

namespace slimpajama {

using at::Tensor;
using bf16 = uint16_t;

// `lanes` is what every processor has that the operators run on: AVX2, or elsewhere what its compiler makes of vectors
// (NEON). A processor without them is left to torch.
enum class Instructions { none, lanes, avx512, amx };

// The best that the processor and the operating system let this process use, or less where it was limited.
Instructions instructions();

inline bool has_avx512() { return instructions() >= Instructions::avx512; }

inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline float to_float(float value) { return value; }

inline bf16 to_bf16(float value) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline const bf16* data(const Tensor& tensor) { return static_cast<const bf16*>(tensor.const_data_ptr()); }
inline bf16* mutable_data(const Tensor& tensor) { return static_cast<bf16*>(tensor.data_ptr()); }

// Whether the heads of x [M, H, D] lie side by side.
inline bool has_whole_rows(const Tensor& x) {
  return x.dim() == 3 && x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2));
}

inline void check_rows(const Tensor& x, at::ScalarType type) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == type && x.dim() == 2 && x.is_contiguous(),
              "expected a contiguous CPU matrix of ", type);
}

}  // namespace slimpajama
