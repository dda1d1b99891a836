// Projections with weights in bfloat16, sums in float32.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "multiply.h"

namespace slimpajama {

namespace {

struct Bf16 {
  using Number = float;

  static void add(float& sum, const uint8_t* x, const uint8_t* weight) {
    bf16 values[2], weights[2];
    std::memcpy(values, x, 4);
    std::memcpy(weights, weight, 4);
    for (int i = 0; i < 2; ++i) sum += to_float(values[i]) * to_float(weights[i]);
  }
  static float worth(float sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }

#if HAS_X86
  using Vector = __m512;

  AVX512 static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights));
  }
  AVX512 static __m512 worth(__m512 sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }
  AVX512 static __m512 load(const uint8_t* sums) { return _mm512_load_ps(sums); }
  template <int SUMS, int X, int WEIGHTS>
  AMX static void tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(WEIGHTS));
  }
#endif
};

// weight [N, K]; returns the packed weights, [N / 16, K / 2, 16, 2] with N and K padded.
Tensor pack_bf16(const Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2, "weight is a bfloat16 matrix [N, K]");
  const auto w = weight.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, pairs = padded(k, 2 * TILE_GROUPS) / 2;
  auto packed = at::zeros({panels, pairs, PANEL, 2}, w.options());
  const bf16* source = data(w);
  bf16* target = mutable_data(packed);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t lane = 0; lane < std::min(PANEL, n - p * PANEL); ++lane)
        for (int64_t i = 0; i < k; ++i)
          target[((p * pairs + i / 2) * PANEL + lane) * 2 + i % 2] = source[(p * PANEL + lane) * k + i];
  });
  return packed;
}

// x [M, K] bfloat16, packed weights, bias float32 [N] or none; returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_bf16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), k = x.size(1), panels = packed.size(0), groups = packed.size(1);
  TORCH_CHECK(padded(k, 2 * TILE_GROUPS) == groups * 2 && padded(n, 2 * PANEL) == panels * PANEL,
              "x and the packed weights do not fit");
  Tensor values = x;
  if (k != groups * 2) {
    values = at::zeros({m, groups * 2}, x.options());
    values.narrow(1, 0, k).copy_(x);
  }
  auto result = at::empty({m, n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const Rows rows{static_cast<const uint8_t*>(values.const_data_ptr()), m, groups};
  const Weights weights{static_cast<const uint8_t*>(packed.const_data_ptr()), groups};
  at::parallel_for(0, panels / 2, 1, [&](int64_t begin, int64_t end) { project_bf16(rows, weights, out, begin, end); });
  return result;
}

}  // namespace

void project_bf16(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
  multiply<Bf16>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_bf16(Tensor weight) -> Tensor");
  library.def("linear_bf16(Tensor x, Tensor packed, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_bf16", slimpajama::pack_bf16);
  library.impl("linear_bf16", slimpajama::linear_bf16);
}
