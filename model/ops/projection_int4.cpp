// Projections with weights in 4 bits (`multiply_int4.h`); inputs are quantized on the way in as for those in 8.
//
// Where a row of x has its zero, all inputs add zero * w to a sum: zero times the total of an output's weights is
// subtracted again at the end.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "crew.h"
#include "multiply_int4.h"

namespace slimpajama {

namespace {

using lanes::Floats;
using lanes::PARTS;

// Of the same group of inputs, of the outputs of a panel.
struct GroupWeights {
  Floats inputs[GROUP];
};

struct Fit {
  Floats scales, errors;
};

// What the value of largest magnitude may become. All whole numbers from 4 to 8 are among it, of which each below is a
// part: so weights that lie in steps of a float16 already stay there, whichever of the steps occur.
constexpr float TOPS[] = {-8.0f, -8.5f, -7.5f, -7.0f, -6.5f, 7.5f, 8.0f, 8.5f, -9.0f, -6.0f, -5.0f, -4.0f};

LANES INLINE Floats where_less(const Floats& a, const Floats& b, const Floats& less, Floats other) {  // a < b
  EACH_PART other.part[p] = a.part[p] < b.part[p] ? less.part[p] : other.part[p];
  return other;
}

LANES INLINE Floats magnitude(const Floats& x) { return lanes::greater(x, lanes::zeros() - x); }

// a / b; 0 where b is.
LANES INLINE Floats ratio(const Floats& a, const Floats& b) {
  return where_less(lanes::zeros(), magnitude(b), a / b, lanes::zeros());
}

LANES INLINE Floats steps_of(const Floats& x, const Floats& inverse) {
  return lanes::greater(lanes::all(-8.0f), lanes::smaller(lanes::all(7.0f), lanes::rounded(x * inverse)));
}

// Rounded to float16, ties to even, and never infinite.
LANES INLINE Floats as_half(Floats x) {
  constexpr float LEAST_NORMAL = 0x1p-14f, LARGEST = 65504.0f;
  constexpr float STEPS = 0.75f;  // beside it float32 has the steps of float16 below the normal numbers
  EACH_PART {
    const auto bits = lanes::bits_as<lanes::IntPart>(x.part[p]);
    const auto normal = lanes::bits_as<lanes::Part>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff);
    const auto small = (x.part[p] + STEPS) - STEPS;
    const auto size = x.part[p] < 0 ? -x.part[p] : x.part[p];
    x.part[p] = size < LEAST_NORMAL ? small : normal;
  }
  return lanes::smaller(lanes::all(LARGEST), lanes::greater(lanes::all(-LARGEST), x));
}

// The scales that suit the weights best once the largest becomes `top`, and the squared errors with them.
LANES Fit fit_for(const GroupWeights& weights, const Floats& largest, float top) {
  const Floats inverse = ratio(lanes::all(top), largest);
  Floats products = lanes::zeros(), squares = lanes::zeros();
  for (const Floats& x : weights.inputs) {
    const Floats q = steps_of(x, inverse);
    products = lanes::fma(x, q, products);
    squares = lanes::fma(q, q, squares);
  }
  const Floats scales = as_half(ratio(products, squares)), anew = ratio(lanes::all(1.0f), scales);
  Floats errors = lanes::zeros();
  for (const Floats& x : weights.inputs) {
    const Floats error = x - steps_of(x, anew) * scales;
    errors = lanes::fma(error, error, errors);
  }
  return {scales, errors};
}

LANES Fit best_fit(const GroupWeights& weights) {
  Floats largest = lanes::zeros();
  for (const Floats& x : weights.inputs) largest = where_less(magnitude(largest), magnitude(x), x, largest);
  Fit best = fit_for(weights, largest, TOPS[0]);
  for (size_t i = 1; i < std::size(TOPS); ++i) {
    const Fit found = fit_for(weights, largest, TOPS[i]);
    best.scales = where_less(found.errors, best.errors, found.scales, best.scales);
    best.errors = lanes::smaller(found.errors, best.errors);
  }
  return best;
}

// Packs a group into its place of a chunk, and adds its weights to the totals.
LANES void pack_group(const GroupWeights& weights, uint8_t* chunk, int64_t group, double* totals) {
  const Floats scales = best_fit(weights).scales, inverse = ratio(lanes::all(1.0f), scales);
  float own[PANEL], steps[PANEL];
  lanes::narrow(own, scales);
  for (int64_t output = 0; output < PANEL; ++output) {
    const c10::Half half(own[output]);
    std::memcpy(chunk + (group * PANEL + output) * 2, &half.x, 2);
  }
  uint8_t* values = chunk + (1 + group * VALUE_LINES) * LINE;
  for (int64_t i = 0; i < GROUP; ++i) {
    lanes::narrow(steps, steps_of(weights.inputs[i], inverse));
    const int64_t line = i / 8, shift = i % 8 < 4 ? 4 : 0;
    for (int64_t output = 0; output < PANEL; ++output) {
      const auto q = static_cast<int32_t>(steps[output]);
      values[line * LINE + output * 4 + i % 4] |= static_cast<uint8_t>((q & 15) << shift);
      totals[output] += static_cast<double>(q) * own[output];
    }
  }
}

// Weights [K] of as many outputs as there are, from an input on; zeros where there are none.
GroupWeights group_at(const float* source, int64_t outputs, int64_t k, int64_t first) {
  float values[GROUP][PANEL] = {};
  for (int64_t output = 0; output < outputs; ++output)
    for (int64_t i = first; i < std::min(first + GROUP, k); ++i) values[i - first][output] = source[output * k + i];
  GroupWeights group;
  std::memcpy(&group, values, sizeof values);
  return group;
}

// weight [N, K] of any float type; returns [N / 32, K / 64, 2, bytes of a chunk] and, of each output's weights, 16
// times the total [N], N and K padded.
std::tuple<Tensor, Tensor> pack_int4(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "weight is a matrix [N, K]");
  const auto w = weight.to(at::kFloat).contiguous();
  const int64_t n = w.size(0), k = w.size(1), inputs = CHUNK_GROUPS * GROUP;
  const int64_t panels = padded(n, 2 * PANEL) / PANEL, chunks = padded(k, inputs) / inputs;
  auto packed = at::zeros({panels / 2, chunks, 2, CHUNK_BYTES}, w.options().dtype(at::kByte));
  auto totals = at::zeros({panels * PANEL}, w.options());
  const float* source = w.const_data_ptr<float>();
  auto* target = packed.data_ptr<uint8_t>();
  const auto chunk_of = [&](int64_t panel, int64_t index) {
    return target + ((panel / 2 * chunks + index) * 2 + panel % 2) * CHUNK_BYTES;
  };
  at::parallel_for(0, (n + PANEL - 1) / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * PANEL, outputs = std::min(PANEL, n - first);
      double sums[PANEL] = {};
      for (int64_t i = 0; i < k; i += GROUP)
        pack_group(group_at(source + first * k, outputs, k, i), chunk_of(panel, i / inputs),
                   i % inputs / GROUP, sums);
      for (int64_t output = 0; output < outputs; ++output)
        totals.data_ptr<float>()[first + output] = static_cast<float>(Int4::FACTOR * sums[output]);
    }
  });
  return {packed, totals};
}

// x [M, K] bfloat16 over weights in 4 bits (see pack_int4); returns [M, N], bfloat16 or (`wide`) float32.
Tensor linear_int4(const Tensor& x, const Tensor& packed, const Tensor& totals, const std::optional<Tensor>& bias,
                   int64_t n, bool wide) {
  check_rows(x, at::kBFloat16);
  const int64_t k = x.size(1), panels = packed.size(0) * 2, groups = packed.size(1) * TILE_GROUPS;
  TORCH_CHECK(padded(k, 4 * TILE_GROUPS) == groups * 4 && padded(n, 2 * PANEL) == panels * PANEL &&
                  packed.size(3) == CHUNK_BYTES,
              "x and the packed weights do not fit");
  const QuantizedRows quantized = quantize_rows(x, groups);
  auto result = at::empty({x.size(0), n}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const Output out = output_for(result, bias);
  const Weights weights = weights_in_4_bits(packed, totals);
  go_through(1, [&](Member member) {
    member.share(panels / 2,
                 [&](int64_t begin, int64_t end) { project_int4(quantized.rows, weights, out, begin, end); });
  });
  return result;
}

}  // namespace

void project_int4(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end) {
#if HAS_X86
  if (has_avx512()) return multiply_int4(x, weights, out, begin, end);
#endif
  multiply_lanes<Int4>(x, weights, out, begin, end);
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("pack_int4(Tensor weight) -> (Tensor, Tensor)");
  library.def("linear_int4(Tensor x, Tensor packed, Tensor totals, Tensor? bias, int n, bool wide) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("pack_int4", slimpajama::pack_int4);
  library.impl("linear_int4", slimpajama::linear_int4);
}
