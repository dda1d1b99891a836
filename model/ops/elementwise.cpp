// Element-wise steps of a decoder layer, one pass each. All arithmetic is float32.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "rows.h"

namespace slimpajama {

namespace {

// Adds `residual` [M, E] to x in place where it is given, then returns rms_norm(x) * weight (arXiv 1910.07467).
Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double epsilon) {
  check_rows(x, at::kBFloat16);
  const int64_t m = x.size(0), e = x.size(1);
  auto result = at::empty_like(x);
  bf16 *rows = mutable_data(x), *normed = mutable_data(result);
  const bf16 *added = residual ? data(*residual) : nullptr, *weights = data(weight);
  const auto step = FASTEST(add_rms_norm);
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      step(rows + row * e, added ? added + row * e : nullptr, weights, e, static_cast<float>(epsilon), normed + row * e);
  });
  return result;
}

// gate_up [M, 2 F], gate first; returns silu(gate) * up [M, F] (arXiv 2002.05202).
Tensor silu_mul(const Tensor& gate_up) {
  check_rows(gate_up, at::kBFloat16);
  const int64_t m = gate_up.size(0), f = gate_up.size(1) / 2;
  auto result = at::empty({m, f}, gate_up.options());
  const bf16* source = data(gate_up);
  bf16* target = mutable_data(result);
  const auto step = FASTEST(silu_mul);
  at::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      step(source + row * 2 * f, source + row * 2 * f + f, f, target + row * f);
  });
  return result;
}

// x [M, H, D], a view with whole rows of heads: turns each head by its position's cosines and signed sines [M, R]
// (halves paired, R <= D), in place.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && has_whole_rows(x) && cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == at::kBFloat16,
              "x is [M, H, D] bfloat16 with whole rows, cos and sin are contiguous");
  const int64_t m = x.size(0), heads = x.size(1), d = x.size(2), stride = x.stride(0), half = cos.size(-1) / 2;
  bf16* rows = mutable_data(x);
  const bf16 *cosines = data(cos), *sines = data(sin);
  const auto step = FASTEST(rotate);
  at::parallel_for(0, m, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t h = 0; h < heads; ++h)
        step(rows + row * stride + h * d, cosines + row * 2 * half, sines + row * 2 * half, half);
  });
}

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("add_rms_norm(Tensor(a!) x, Tensor? residual, Tensor weight, float epsilon) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
  library.def("rotate(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("add_rms_norm", slimpajama::add_rms_norm);
  library.impl("silu_mul", slimpajama::silu_mul);
  library.impl("rotate", slimpajama::rotate);
}
