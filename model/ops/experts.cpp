// A layer's experts as an operator of their own, for layers that are run one by one.

#include "experts.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <mutex>

namespace slimpajama {

void Experts::add(std::vector<Tensor> tensors, const std::vector<int64_t>& inputs,
                  const std::vector<int64_t>& outputs) {
  TORCH_CHECK(tensors.size() == 8 && inputs.size() == 2 && outputs.size() == 2,
              "an expert has eight tensors and two projections");
  const Expert expert{projection_of(&tensors[0], outputs[0], inputs[0]),
                      projection_of(&tensors[4], outputs[1], inputs[1])};
  TORCH_CHECK(expert.gate_up.n == 2 * expert.down.k && expert.gate_up.k == expert.down.n && !expert.gate_up.bias &&
                  !expert.down.bias && expert.gate_up.narrow == expert.down.narrow,
              "an expert's projections do not fit each other, or have a bias");
  TORCH_CHECK(experts.empty() || (expert.gate_up.k == hidden() && expert.gate_up.narrow == experts[0].gate_up.narrow),
              "experts of several kinds");
  experts.push_back(expert);
  kept_.insert(kept_.end(), tensors.begin(), tensors.end());
}

void Experts::set_router(const Tensor& packed, const Tensor& bias) {
  TORCH_CHECK(!experts.empty() && routing.chosen >= 1 && routing.chosen <= std::min(routed(), Mixing::MOST_CHOSEN),
              "as many experts cannot be chosen");
  for (int64_t i = 0; i < routed(); ++i)
    TORCH_CHECK(experts[i].inner() == experts[0].inner(), "experts that are chosen have one size");
  TORCH_CHECK(bias.numel() == 0 || (bias.scalar_type() == at::kFloat && bias.numel() == routed()),
              "a bias has a float32 for each expert that is chosen");
  const Tensor tensors[] = {packed, {}, {}, at::empty({0}, packed.options())};
  router = projection_of(tensors, routed() + routing.gated, hidden());
  TORCH_CHECK(!router.narrow, "a router's weights are bfloat16");
  this->bias = bias.numel() ? bias.const_data_ptr<float>() : nullptr;
  kept_.insert(kept_.end(), {packed, bias});
}

Tensor Experts::run(const Tensor& x) {
  check_rows(x, at::kBFloat16);
  TORCH_CHECK(router.n > 0 && x.size(1) == hidden(), "rows are of another network");
  // One for all layers: what is in it has gone when the next one begins, and with long prompts it is large.
  static std::mutex mutex;
  static MixingSpace space;
  const std::lock_guard lock(mutex);
  auto result = at::empty_like(x);
  space.grow(x.size(0), *this);
  go_through(Mixing::STEPS, [&](Member member) {
    Mixing(*this, member, space, x.size(0)).run(data(x), mutable_data(result));
  });
  return result;
}

}  // namespace slimpajama
