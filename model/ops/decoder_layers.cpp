// All layers of a decoder in one call: what the operators do is the same as when they are called one by one, but nobody
// interprets what is between them, and threads meet after a step without being sent to sleep and woken: with one token
// a step that is a third of the time.
//
// Pre-norm layers as Llama has them: norm, attention with rotary positions (and, as in Qwen3, norms of the heads), norm,
// gated SiLU or experts of that kind; sums are left to who norms them. What is added may be scaled (Granite), and layers
// may know nothing of positions (SmolLM3).
//
// Legend: T tokens, E hidden size, H query heads, G key heads, D head size, F inner size.

#include <ATen/ops/empty_like.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <mutex>
#include <tuple>
#include <vector>

#include "experts.h"
#include "low_rank.h"
#include "paged_attention.h"

namespace slimpajama {

namespace {

struct Layer {
  Projection query_key_value, output;
  Projection gate_up, down;               // or
  const Experts* experts;                 // in their place
  const bf16 *attention_norm, *mlp_norm;  // weights, [E]
  const bf16 *query_norm, *key_norm;      // [D] or none
  int64_t window;                         // 0: none
  bool turned;                            // whether queries and keys are turned to their positions
};

struct Sizes {
  int64_t heads, groups;
  float scale, epsilon, residual_scale;
  int64_t head_size = 0, hidden = 0, inner = 0;

  int64_t fused() const { return (heads + 2 * groups) * head_size; }
  Shape shape(int64_t window) const {
    return {heads / groups, fused(), heads * head_size, scale, window, true};
  }
};

// A step's tokens: the stream of states, which is written to, and what the last layer adds to it.
struct Tokens {
  int64_t count;
  bf16 *hidden, *delta;         // [T, E]
  const bf16 *cosines, *sines;  // [T, R]
  int64_t rotated;              // R
  const int64_t* slots;         // [T]
};

// Which of them have adapters, and the width of what is between the products of these.
struct Adapted {
  std::vector<AdaptedRows> runs;
  int64_t width = 0;
};

// What is between the steps; kept from call to call.
struct Space {
  Kept<bf16> normed, fused, attended, gate_up, gated;  // [T, E], [T, (H + 2 G) D], [T, H D], [T, 2 F], [T, F]
  Kept<uint8_t> quantized;                             // [T, the widest of them]
  Kept<float> scales;                                  // [T]
  Kept<int32_t> zeros;                                 // [T]
  Kept<bf16> small;                                    // [T, an adapter's highest rank]

  void grow(int64_t rows, const Sizes& sizes, const Adapted& adapted) {
    const int64_t attended_size = sizes.heads * sizes.head_size;
    grown(normed, rows * sizes.hidden);
    grown(fused, rows * sizes.fused());
    grown(attended, rows * attended_size);
    grown(gate_up, rows * 2 * sizes.inner);
    grown(gated, rows * sizes.inner);
    grown(quantized, rows * padded(std::max({sizes.hidden, attended_size, sizes.inner}), LINE));
    grown(scales, rows);
    grown(zeros, rows);
    grown(small, rows * adapted.width);
  }
};

// The step's way through the layers, in the hands of one of the threads that work on it.
class Pass {
 public:
  static constexpr int64_t MOST_STEPS = 7 + std::max<int64_t>(3, Mixing::STEPS);  // of a layer
  static constexpr int64_t MOST_ADAPTED_STEPS = 8, LAST_STEPS = 1;                // of a layer; behind the last one

  Pass(const Sizes& sizes, Member member, Space& space, MixingSpace& mixing_space, const Tokens& tokens,
       const std::vector<AttentionWork>& works, const Adapted& adapted)
      : sizes_(sizes), member_(member), space_(space), mixing_space_(mixing_space), tokens_(tokens), works_(works),
        adapted_(adapted) {}

  void run(const Layer& layer, Cache cache, bool first) {
    normalize(first ? nullptr : tokens_.delta, layer.attention_norm, layer.query_key_value.narrow);
    project(layer.query_key_value, space_.normed.data(), space_.fused.data());
    adapt(layer.query_key_value, space_.normed.data(), space_.fused.data());
    place(layer, cache);
    attend(works_, cache, sizes_.shape(layer.window), member_);
    if (layer.output.narrow) rows([&](int64_t row) { quantize(space_.attended.data(), layer.output.k, row); });
    project(layer.output, space_.attended.data(), tokens_.delta);
    adapt(layer.output, space_.attended.data(), tokens_.delta);
    if (layer.experts) {
      normalize(tokens_.delta, layer.mlp_norm, false);
      Mixing(*layer.experts, member_, mixing_space_, tokens_.count).run(space_.normed.data(), tokens_.delta);
      place_ += 2;  // nothing is added to experts
      return;
    }
    normalize(tokens_.delta, layer.mlp_norm, layer.gate_up.narrow);
    project(layer.gate_up, space_.normed.data(), space_.gate_up.data());
    adapt(layer.gate_up, space_.normed.data(), space_.gate_up.data());
    gate(layer.down.narrow);
    project(layer.down, space_.gated.data(), tokens_.delta);
    adapt(layer.down, space_.gated.data(), tokens_.delta);
  }

  // What the last layer adds is left to who norms it, scaled.
  void finish() {
    if (sizes_.residual_scale != 1.0f) rows([&](int64_t row) { scale(tokens_.delta, row); });
  }

 private:
  template <typename Work>
  void rows(const Work& work) {
    member_.share(tokens_.count, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) work(row);
    });
  }

  void quantize(const bf16* x, int64_t k, int64_t row) {
    const Steps8 steps = quantize_row(x + row * k, k, nullptr, space_.quantized.data() + row * padded(k, LINE));
    space_.scales[row] = steps.scale;
    space_.zeros[row] = steps.zero;
  }

  // What a sublayer adds to the stream, rounded as where that is done by itself.
  void scale(bf16* added, int64_t row) const {
    const float factor = sizes_.residual_scale;
    bf16* values = added + row * sizes_.hidden;
    for (int64_t i = 0; i < sizes_.hidden; ++i) values[i] = to_bf16(to_float(values[i]) * factor);
  }

  void normalize(bf16* added, const bf16* weights, bool narrow) {
    const int64_t e = sizes_.hidden;
    const auto step = FASTEST(add_rms_norm);
    bf16* normed = space_.normed.data();
    rows([&](int64_t row) {
      if (added && sizes_.residual_scale != 1.0f) scale(added, row);
      step(tokens_.hidden + row * e, added ? added + row * e : nullptr, weights, e, sizes_.epsilon, normed + row * e);
      if (narrow) quantize(normed, e, row);
    });
  }

  // Of x [T, K], which has been quantized where the weights want it so, to out [T, N].
  void project(const Projection& projection, const bf16* x, bf16* out) {
    const Weights& weights = projection.weights;
    const Output target{nullptr, out, projection.bias, projection.n};
    const Rows wide{reinterpret_cast<const uint8_t*>(x), tokens_.count, weights.groups};
    const Rows narrow{space_.quantized.data(), tokens_.count, weights.groups, space_.scales.data(), space_.zeros.data()};
    slimpajama::project(member_, projection, projection.narrow ? narrow : wide, target);
  }

  // What the rows' adapters add to that: projections are asked for in their order, layer by layer.
  void adapt(const Projection& projection, const bf16* x, bf16* out) {
    if (adapted_.runs.empty()) return;
    add_low_rank(member_, adapted_.runs, place_++, x, projection.k, space_.small.data(), adapted_.width, out);
  }

  // Turns queries and keys to their positions; keys and values go to the cache.
  void place(const Layer& layer, const Cache& cache) {
    const int64_t d = sizes_.head_size, half = tokens_.rotated / 2;
    const auto turn = FASTEST(rotate);
    const auto norm = FASTEST(add_rms_norm);
    rows([&](int64_t row) {
      bf16 *query = space_.fused.data() + row * sizes_.fused(), *key = query + sizes_.heads * d;
      const bf16 *cosines = tokens_.cosines + 2 * half * row, *sines = tokens_.sines + 2 * half * row;
      for (bf16* head = query; head < key + sizes_.groups * d; head += d) {
        const bf16* weights = head < key ? layer.query_norm : layer.key_norm;
        if (weights) norm(head, nullptr, weights, d, sizes_.epsilon, head);
        if (layer.turned) turn(head, cosines, sines, half);
      }
      store(cache, key, key + sizes_.groups * d, tokens_.slots[row]);
    });
  }

  void gate(bool narrow) {
    const int64_t f = sizes_.inner;
    const auto step = FASTEST(silu_mul);
    rows([&](int64_t row) {
      const bf16* both = space_.gate_up.data() + row * 2 * f;
      step(both, both + f, f, space_.gated.data() + row * f);
      if (narrow) quantize(space_.gated.data(), f, row);
    });
  }

  const Sizes& sizes_;
  Member member_;
  Space& space_;
  MixingSpace& mixing_space_;
  const Tokens& tokens_;
  const std::vector<AttentionWork>& works_;
  const Adapted& adapted_;
  size_t place_ = 0;  // of the next projection among all layers'
};

class DecoderLayers : public torch::CustomClassHolder {
 public:
  DecoderLayers(int64_t heads, int64_t groups, double scale, double epsilon, double residual_scale)
      : sizes_{heads, groups, static_cast<float>(scale), static_cast<float>(epsilon),
               static_cast<float>(residual_scale)} {}

  // Of query_key_value, output, gate_up and down each four tensors (`projection_of`), then the weights of both norms and
  // of queries' and keys' heads (empty if there are none); inputs and outputs of the four; whether heads are turned.
  void add(std::vector<Tensor> tensors, std::vector<int64_t> inputs, std::vector<int64_t> outputs, int64_t window,
           bool turned) {
    TORCH_CHECK(tensors.size() == 20 && inputs.size() == 4 && outputs.size() == 4,
                "a layer has 20 tensors and four projections");
    sizes_.inner = inputs[3];
    add_layer(tensors, inputs, outputs, {window, turned}, nullptr);
  }

  // Likewise without gate_up and down, in whose place the experts are.
  void add_sparse(std::vector<Tensor> tensors, std::vector<int64_t> inputs, std::vector<int64_t> outputs,
                  int64_t window, bool turned, const c10::intrusive_ptr<Experts>& experts) {
    TORCH_CHECK(tensors.size() == 12 && inputs.size() == 2 && outputs.size() == 2,
                "a layer with experts has 12 tensors and two projections beside them");
    TORCH_CHECK(experts->hidden() == inputs[0], "experts of another size");
    kept_experts_.push_back(experts);
    add_layer(tensors, inputs, outputs, {window, turned}, experts.get());
  }

  // hidden [T, E], which is written to; cos and sin [T, 1, R]; pool [layers, 2, blocks, block_size, G, D], keys first
  // (`paged_layout.h`). Of `adapters` each is that of the tokens from one bound to the next but one: [begin, end, begin,
  // end, ...]. Returns the stream and what is still to be added to it.
  std::tuple<Tensor, Tensor> run(const Tensor& hidden, const Tensor& cos, const Tensor& sin, const Tensor& pool,
                                 const Tensor& slots, const Tensor& block_tables, const Tensor& query_starts,
                                 const Tensor& context_lens,
                                 const std::vector<c10::intrusive_ptr<LowRankLayers>>& adapters,
                                 const std::vector<int64_t>& bounds) {
    check_rows(hidden, at::kBFloat16);
    TORCH_CHECK(hidden.size(1) == sizes_.hidden && pool.dim() == 6 && pool.size(1) == 2 &&
                    pool.size(0) == static_cast<int64_t>(layers_.size()) && pool.size(4) == sizes_.groups,
                "states or cache are of another network");
    const Cache first = cache_of(pool, 0);
    TORCH_CHECK(first.head_size == sizes_.head_size, "heads of another size");
    TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == at::kBFloat16 &&
                    cos.size(0) == hidden.size(0) && slots.size(0) == hidden.size(0),
                "every token has a position and a slot");
    const std::lock_guard lock(mutex_);
    const auto delta = at::empty_like(hidden);
    const Tokens tokens{hidden.size(0), mutable_data(hidden), mutable_data(delta), data(cos), data(sin), cos.size(-1),
                        slots.const_data_ptr<int64_t>()};
    const Adapted adapted = adapted_by(adapters, bounds, tokens.count);
    space_.grow(tokens.count, sizes_, adapted);
    for (const auto& experts : kept_experts_) mixing_space_.grow(tokens.count, *experts);
    const auto works = attention_works(space_.fused.data(), space_.attended.data(), first,
                                       sizes_.shape(0), sequences_of(block_tables, query_starts, context_lens),
                                       at::get_num_threads());
    const int64_t most_steps = Pass::MOST_STEPS + (adapted.runs.empty() ? 0 : Pass::MOST_ADAPTED_STEPS);
    go_through(static_cast<int64_t>(layers_.size()) * most_steps + Pass::LAST_STEPS, [&](Member member) {
      Pass pass(sizes_, member, space_, mixing_space_, tokens, works, adapted);
      for (size_t index = 0; index < layers_.size(); ++index)
        pass.run(layers_[index], cache_of(pool, static_cast<int64_t>(index)), index == 0);
      pass.finish();
    });
    return {hidden, delta};
  }

 private:
  struct Rules {
    int64_t window;
    bool turned;
  };

  void add_layer(const std::vector<Tensor>& tensors, const std::vector<int64_t>& inputs,
                 const std::vector<int64_t>& outputs, Rules rules, const Experts* experts) {
    const size_t norms = 4 * inputs.size();
    const auto projection = [&](size_t index) {
      return index < inputs.size() ? projection_of(&tensors[4 * index], outputs[index], inputs[index]) : Projection{};
    };
    const auto norm = [&](size_t index) {
      return tensors[norms + index].numel() ? data(tensors[norms + index]) : nullptr;
    };
    layers_.push_back({projection(0), projection(1), projection(2), projection(3), experts, norm(0), norm(1), norm(2),
                       norm(3), rules.window, rules.turned});
    sizes_.hidden = inputs[0];
    sizes_.head_size = inputs[1] / sizes_.heads;
    for (const Layer& layer : layers_)
      TORCH_CHECK(layer.query_key_value.n == sizes_.fused() && layer.query_key_value.k == sizes_.hidden &&
                      layer.output.n == sizes_.hidden && layer.output.k == sizes_.heads * sizes_.head_size &&
                      (layer.experts || (layer.gate_up.n == 2 * sizes_.inner && layer.gate_up.k == sizes_.hidden &&
                                         layer.down.n == sizes_.hidden && layer.down.k == sizes_.inner)),
                  "layers of several sizes");
    kept_.insert(kept_.end(), tensors.begin(), tensors.end());
  }

  Adapted adapted_by(const std::vector<c10::intrusive_ptr<LowRankLayers>>& adapters, const std::vector<int64_t>& bounds,
                     int64_t count) const {
    Adapted found;
    TORCH_CHECK(bounds.size() == 2 * adapters.size(), "an adapter has two bounds");
    for (size_t i = 0; i < adapters.size(); ++i) {
      const int64_t begin = bounds[2 * i], end = bounds[2 * i + 1];
      TORCH_CHECK(0 <= begin && begin <= end && end <= count && adapters[i]->products.size() == 4 * layers_.size(),
                  "adapters are of another network, or of tokens that are not there");
      found.runs.push_back({begin, end, &adapters[i]->products});
      found.width = std::max(found.width, adapters[i]->rank);
    }
    return found;
  }

  static Cache cache_of(const Tensor& pool, int64_t layer) {
    auto* keys = static_cast<uint8_t*>(pool.data_ptr()) + layer * pool.stride(0) * pool.element_size();
    return slimpajama::cache_of(pool, keys, keys + pool.stride(1) * pool.element_size());
  }

  Sizes sizes_;
  std::vector<Layer> layers_;
  std::vector<Tensor> kept_;  // that the layers point into
  std::vector<c10::intrusive_ptr<Experts>> kept_experts_;
  std::mutex mutex_;
  Space space_;
  MixingSpace mixing_space_;
};

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  using slimpajama::DecoderLayers;
  using slimpajama::Experts;
  using slimpajama::LowRankLayers;
  // First, for the last one takes them.
  library.class_<Experts>("Experts")
      .def(torch::init([](int64_t chosen, bool sigmoid, bool normalized, double scale, bool shared, bool gated) {
        const slimpajama::Routing routing{chosen, sigmoid, normalized, static_cast<float>(scale), shared, gated};
        return c10::make_intrusive<Experts>(routing);
      }))
      .def("add", [](const c10::intrusive_ptr<Experts>& self, std::vector<at::Tensor> tensors,
                     std::vector<int64_t> inputs, std::vector<int64_t> outputs) {
        self->add(std::move(tensors), inputs, outputs);
      })
      .def("set_router", [](const c10::intrusive_ptr<Experts>& self, const at::Tensor& packed, const at::Tensor& bias) {
        self->set_router(packed, bias);
      })
      .def("run", [](const c10::intrusive_ptr<Experts>& self, const at::Tensor& x) { return self->run(x); });
  library.class_<LowRankLayers>("LowRankLayers")
      .def(torch::init<>())
      .def("add", [](const c10::intrusive_ptr<LowRankLayers>& self, std::vector<at::Tensor> tensors,
                     std::vector<int64_t> inputs, std::vector<int64_t> outputs) {
        self->add(std::move(tensors), std::move(inputs), std::move(outputs));
      });
  library.class_<DecoderLayers>("DecoderLayers")
      .def(torch::init<int64_t, int64_t, double, double, double>())
      .def("add", [](const c10::intrusive_ptr<DecoderLayers>& self, std::vector<at::Tensor> tensors,
                     std::vector<int64_t> inputs, std::vector<int64_t> outputs, int64_t window, bool turned) {
        self->add(std::move(tensors), std::move(inputs), std::move(outputs), window, turned);
      })
      .def("add_sparse", [](const c10::intrusive_ptr<DecoderLayers>& self, std::vector<at::Tensor> tensors,
                            std::vector<int64_t> inputs, std::vector<int64_t> outputs, int64_t window,
                            bool turned, const c10::intrusive_ptr<Experts>& experts) {
        self->add_sparse(std::move(tensors), std::move(inputs), std::move(outputs), window, turned, experts);
      })
      .def("run", [](const c10::intrusive_ptr<DecoderLayers>& self, const at::Tensor& hidden, const at::Tensor& cos,
                     const at::Tensor& sin, const at::Tensor& pool, const at::Tensor& slots,
                     const at::Tensor& block_tables, const at::Tensor& query_starts, const at::Tensor& context_lens,
                     const std::vector<c10::intrusive_ptr<LowRankLayers>>& adapters,
                     const std::vector<int64_t>& bounds) {
        return self->run(hidden, cos, sin, pool, slots, block_tables, query_starts, context_lens, adapters, bounds);
      });
}
