// What adapters add to a projection's results: out += (x A^T) B^T, for runs of rows each with an A and a B of its own
// (arXiv 2106.09685). Sums are float32, the small results between the products bfloat16.
//
// Legend: T rows, K inputs, N outputs, R rank, padded to 32.
#pragma once

#include <torch/custom_class.h>

#include <algorithm>
#include <vector>

#include "crew.h"
#include "projection.h"

namespace slimpajama {

struct LowRank {
  Weights a, b;         // [R, K], [N, R]
  int64_t rank = 0, n;  // R, N; without a rank nothing is added
};

// Rows from `begin` to `end`, and the products beside each projection that there is.
struct AdaptedRows {
  int64_t begin, end;
  const std::vector<LowRank>* products;
};

// Has work(product, first, count, begin, end) called for all pairs of panels of all runs' rows, which are cut into
// blocks so that there is something to do for everybody; `pairs` tells how many a product has.
template <typename Pairs, typename Work>
void share_runs(Member& member, const std::vector<AdaptedRows>& runs, size_t place, const Pairs& pairs,
                const Work& work) {
  constexpr int64_t BLOCK = 64;
  const auto blocks = [](const AdaptedRows& run) { return (run.end - run.begin + BLOCK - 1) / BLOCK; };
  int64_t total = 0;
  for (const AdaptedRows& run : runs) total += blocks(run) * pairs((*run.products)[place]);
  if (total == 0) return;
  member.share(total, [&](int64_t begin, int64_t end) {
    int64_t start = 0;  // of the run's among all
    for (const AdaptedRows& run : runs) {
      const LowRank& product = (*run.products)[place];
      const int64_t width = pairs(product), size = blocks(run) * width;
      for (int64_t item = std::max(begin - start, int64_t{0}); item < std::min(end - start, size);) {
        const int64_t first = run.begin + item / width * BLOCK, pair = item % width;
        const int64_t count = std::min(width - pair, std::min(end - start, size) - item);
        work(product, first, std::min(BLOCK, run.end - first), pair, pair + count);
        item += count;
      }
      start += size;
    }
  });
}

// Of the projection at `place`: x [T, K], out [T, N], small [T, width] to keep what is between the products in. Two
// steps of the member's, or none.
inline void add_low_rank(Member& member, const std::vector<AdaptedRows>& runs, size_t place, const bf16* x, int64_t k,
                         bf16* small, int64_t width, bf16* out) {
  const auto bytes = [](const bf16* values) { return reinterpret_cast<const uint8_t*>(values); };
  share_runs(
      member, runs, place, [](const LowRank& product) { return product.rank / (2 * PANEL); },
      [&](const LowRank& product, int64_t first, int64_t count, int64_t begin, int64_t end) {
        const Rows rows{bytes(x + first * k), count, product.a.groups};
        project_bf16(rows, product.a, {nullptr, small + first * width, nullptr, product.rank, width}, begin, end);
      });
  share_runs(
      member, runs, place,
      [](const LowRank& product) { return product.rank ? padded(product.n, 2 * PANEL) / (2 * PANEL) : 0; },
      [&](const LowRank& product, int64_t first, int64_t count, int64_t begin, int64_t end) {
        const Rows rows{bytes(small + first * width), count, product.b.groups, nullptr, nullptr,
                        width * static_cast<int64_t>(sizeof(bf16))};
        Output target{nullptr, out + first * product.n, nullptr, product.n};
        target.added_narrow = target.narrow;
        project_bf16(rows, product.b, target, begin, end);
      });
}

// Of packed A and B (`pack_bf16`), empty where nothing is added, for a projection of these sizes.
inline LowRank low_rank_of(const Tensor& a, const Tensor& b, int64_t k, int64_t n) {
  if (a.numel() == 0) return {};
  const auto weights = [](const Tensor& packed) {
    TORCH_CHECK(packed.scalar_type() == at::kBFloat16 && packed.dim() == 4, "packed bfloat16 weights");
    return Weights{static_cast<const uint8_t*>(packed.const_data_ptr()), packed.size(1)};
  };
  const LowRank found{weights(a), weights(b), a.size(0) * PANEL, n};
  TORCH_CHECK(found.a.groups * 2 == padded(k, 2 * TILE_GROUPS) && found.b.groups * 2 == found.rank &&
                  b.size(0) * PANEL == padded(n, 2 * PANEL),
              "an adapter's weights are of other sizes than the projection");
  return found;
}

// One adapter's products beside the four projections of every layer.
class LowRankLayers : public torch::CustomClassHolder {
 public:
  // Of query_key_value, output, gate_up and down each A and B, as `low_rank_of` takes them; inputs and outputs.
  void add(std::vector<Tensor> tensors, std::vector<int64_t> inputs, std::vector<int64_t> outputs);

  std::vector<LowRank> products;  // four for each layer
  int64_t rank = 0;               // the highest

 private:
  std::vector<Tensor> kept_;  // that the products point into
};

}  // namespace slimpajama
