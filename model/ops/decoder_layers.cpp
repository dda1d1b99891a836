// All layers of a decoder in one call: what the operators do is the same as when they are called one by one, but nobody
// interprets what is between them, which for one token a step takes a quarter of the time.
//
// Pre-norm layers as Llama has them: norm, attention with rotary positions, norm, gated SiLU; sums are left to who norms
// them.

#include <torch/custom_class.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "operators.h"

namespace slimpajama {

namespace {

struct Projection {
  Tensor packed, scales, sums;  // the last two of weights in 8 bits alone
  std::optional<Tensor> bias;
  int64_t outputs;

  Tensor operator()(const Tensor& x) const {
    if (scales.numel() == 0) return linear_bf16(x, packed, bias, outputs, false);
    return linear_int8(x, packed, scales, sums, bias, outputs, false);
  }
};

struct Layer {
  Projection query_key_value, output, gate_up, down;
  Tensor attention_norm, mlp_norm;
  int64_t window;  // 0: none
};

class DecoderLayers : public torch::CustomClassHolder {
 public:
  DecoderLayers(int64_t heads, int64_t groups, double scale, double epsilon)
      : heads_(heads), groups_(groups), scale_(scale), epsilon_(epsilon) {}

  // Of query_key_value, output, gate_up and down each the packed weights, scales, sums and bias (empty if there are
  // none), then both norms' weights; `outputs` of the four.
  void add(const std::vector<Tensor>& tensors, const std::vector<int64_t>& outputs, int64_t window) {
    TORCH_CHECK(tensors.size() == 18 && outputs.size() == 4, "a layer has 18 tensors and four projections");
    const auto projection = [&](int64_t index) {
      const Tensor& bias = tensors[4 * index + 3];
      return Projection{tensors[4 * index], tensors[4 * index + 1], tensors[4 * index + 2],
                        bias.numel() ? std::optional(bias) : std::nullopt, outputs[index]};
    };
    layers_.push_back({projection(0), projection(1), projection(2), projection(3), tensors[16], tensors[17], window});
  }

  // hidden [T, E], which is written to; cos and sin [T, 1, R]; pool [layers, 2, blocks, block_size, G, D], keys first.
  // Returns the stream and what is still to be added to it.
  std::tuple<Tensor, Tensor> run(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& pool,
                                 const Tensor& slots, const Tensor& block_tables, const Tensor& query_starts,
                                 const Tensor& context_lens) const {
    std::optional<Tensor> delta;
    for (int64_t index = 0; index < static_cast<int64_t>(layers_.size()); ++index) {
      const Layer& layer = layers_[index];
      const Tensor cached = pool.select(0, index), keys = cached.select(0, 0), values = cached.select(0, 1);
      const Tensor normed = add_rms_norm(hidden, delta, layer.attention_norm, epsilon_);
      const Tensor fused = layer.query_key_value(normed).view({hidden.size(0), heads_ + 2 * groups_, pool.size(5)});
      rotate(fused.narrow(1, 0, heads_ + groups_), cos, sin);
      store(fused.narrow(1, heads_, groups_), fused.narrow(1, heads_ + groups_, groups_), keys, values, slots);
      const Tensor attended = paged_attention(fused.narrow(1, 0, heads_), keys, values, block_tables, query_starts,
                                              context_lens, scale_, layer.window, true);
      const Tensor out = layer.output(attended.flatten(1));
      delta = layer.down(silu_mul(layer.gate_up(add_rms_norm(hidden, out, layer.mlp_norm, epsilon_))));
    }
    return {hidden, *delta};
  }

 private:
  int64_t heads_, groups_;
  double scale_, epsilon_;
  std::vector<Layer> layers_;
};

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  using slimpajama::DecoderLayers;
  library.class_<DecoderLayers>("DecoderLayers")
      .def(torch::init<int64_t, int64_t, double, double>())
      .def("add", [](const c10::intrusive_ptr<DecoderLayers>& self, std::vector<at::Tensor> tensors,
                     std::vector<int64_t> outputs, int64_t window) { self->add(tensors, outputs, window); })
      .def("run", [](const c10::intrusive_ptr<DecoderLayers>& self, const at::Tensor& hidden, const at::Tensor& cos,
                     const at::Tensor& sin, const at::Tensor& pool, const at::Tensor& slots,
                     const at::Tensor& block_tables, const at::Tensor& query_starts, const at::Tensor& context_lens) {
        return self->run(hidden, cos, sin, pool, slots, block_tables, query_starts, context_lens);
      });
}
