// An adapter's products of low rank: those of all layers, as `decoder_layers.cpp` takes them, and those of one
// projection by themselves.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "low_rank.h"

namespace slimpajama {

void LowRankLayers::add(std::vector<Tensor> tensors, std::vector<int64_t> inputs, std::vector<int64_t> outputs) {
  TORCH_CHECK(tensors.size() == 8 && inputs.size() == 4 && outputs.size() == 4, "a layer has four projections");
  for (size_t i = 0; i < 4; ++i) {
    products.push_back(low_rank_of(tensors[2 * i], tensors[2 * i + 1], inputs[i], outputs[i]));
    rank = std::max(rank, products.back().rank);
  }
  kept_.insert(kept_.end(), tensors.begin(), tensors.end());
}

namespace {

// x [M, K], packed A and B, out [M, N], which is added to.
void add_low_rank_alone(const Tensor& x, const Tensor& a, const Tensor& b, Tensor& out) {
  check_rows(x, at::kBFloat16);
  check_rows(out, at::kBFloat16);
  TORCH_CHECK(x.size(0) == out.size(0), "as many results as there are rows");
  const int64_t m = x.size(0), k = x.size(1);
  const std::vector<LowRank> products{low_rank_of(a, b, k, out.size(1))};
  const std::vector<AdaptedRows> runs{{0, m, &products}};
  Tensor values = x;
  if (k != products[0].a.groups * 2) {
    values = at::zeros({m, products[0].a.groups * 2}, x.options());
    values.narrow(1, 0, k).copy_(x);
  }
  auto small = at::empty({m, products[0].rank}, x.options());
  go_through(2, [&](Member member) {
    add_low_rank(member, runs, 0, data(values), values.size(1), mutable_data(small), small.size(1), mutable_data(out));
  });
}

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def("add_low_rank(Tensor x, Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) { library.impl("add_low_rank", slimpajama::add_low_rank_alone); }
