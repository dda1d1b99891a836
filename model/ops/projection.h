// What the projections share: the layout of packed weights and of what they multiply.
//
// Packed weights are [N / 16][K / g][16][g], g = 2 bfloat16 or 4 int8 inputs: 32 bits of each of 16 outputs side by
// side, which one instruction multiplies by the 32 bits of x they all meet. 16 such lines, one below the other, are
// also what AMX takes for a tile. N is padded to 32 (a pair of panels), K to 64 bytes (a tile's width), with zeros.
// Float32 is packed whole (g = 1), or in halves (`kinds.h`); 4 bits lie between their scales (`multiply_int4.h`).
#pragma once

#include <optional>

#include "rows.h"

namespace slimpajama {

constexpr int64_t LINE = 64;         // bytes of a panel for one group of inputs
constexpr int64_t TILE_GROUPS = 16;  // groups of inputs that a tile multiplies
constexpr int64_t GROUP_BYTES_4 = 36;  // as LINE, in 4 bits: 64 of them, and a share of their scales

constexpr int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

struct Weights {
  const uint8_t* values;
  int64_t groups;                    // of inputs, padded to TILE_GROUPS
  const float* scales = nullptr;     // int8: [N padded]
  const int32_t* sums = nullptr;     // int8: [N padded], of an output's weights
  const float* totals = nullptr;     // int4: [N padded], of an output's weights, each times its scale
  int64_t group_bytes = LINE;        // of a panel

  int64_t panel_bytes() const { return groups * group_bytes; }
  const uint8_t* panel(int64_t index) const { return values + index * panel_bytes(); }
};

// What a block of rows has fetched of the panels after its own, a line's part with every group, while it multiplies.
struct Fetching {
  int64_t begin, step;  // bytes

  // The share of one of several blocks that go through `groups`, of so many bytes: the first few do it all.
  static Fetching share_of(int64_t block, int64_t blocks, int64_t groups, int64_t bytes = LINE) {
    const int64_t sharing = std::min<int64_t>(blocks, 4);
    return block < sharing ? Fetching{block * groups * bytes / sharing, bytes / sharing} : Fetching{};
  }
};

struct Rows {
  const uint8_t* values;
  int64_t m, groups;
  const float* scales = nullptr;   // int8: [M], and
  const int32_t* zeros = nullptr;  // what stands for zero
  int64_t stride = groups * 4;     // bytes from row to row, no less than these

  const uint8_t* row(int64_t index) const { return values + index * stride; }
};

// Results for the pairs of panels from `begin` to `end`; called from as many threads as there are ranges. A row's
// results do not depend, to a bit, on the rows beside it.
void project_float32(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_bf16(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_halves(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_int8(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);
void project_int4(const Rows& x, const Weights& weights, const Output& out, int64_t begin, int64_t end);

// x ~ scale * (q - zero).
struct Steps8 {
  float scale;
  int32_t zero;
};

// Quantizes a row of K, each value times its factor where there are factors. The scale is not finite if one of the
// values is not: then nor are the row's results.
Steps8 quantize_row(const bf16* x, int64_t k, const float* factors, uint8_t* out);

// x [M, K] bfloat16, quantized row by row; `rows` points into what is kept beside it.
struct QuantizedRows {
  Tensor values, scales, zeros;
  Rows rows;
};

// What is beyond K, up to `groups`, is not set: it meets weights of zero, whatever it is.
QuantizedRows quantize_rows(const Tensor& x, int64_t groups);

// A row of K, a multiple of 32, as `project_halves` takes it: 2 K numbers.
void split_row(const float* x, int64_t k, bf16* out);

inline Weights weights_in_8_bits(const Tensor& packed, const Tensor& scales, const Tensor& sums) {
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(1), scales.const_data_ptr<float>(),
          sums.const_data_ptr<int32_t>()};
}

inline Weights weights_in_4_bits(const Tensor& packed, const Tensor& totals) {
  return {static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(1) * TILE_GROUPS, nullptr, nullptr,
          totals.const_data_ptr<float>(), GROUP_BYTES_4};
}

inline Output output_for(const Tensor& result, const std::optional<Tensor>& bias) {
  const bool wide = result.scalar_type() == at::kFloat;
  return {wide ? result.data_ptr<float>() : nullptr, wide ? nullptr : mutable_data(result),
          bias ? bias->const_data_ptr<float>() : nullptr, result.size(1)};
}

}  // namespace slimpajama
