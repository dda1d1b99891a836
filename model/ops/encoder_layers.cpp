// An encoder (BERT, arXiv 1810.04805) in one call: texts end to end without padding, no Python between the steps
// (`encoder_pass.h`).
//
// Texts are cut into chunks that threads take one after the other, each through all layers by itself: nothing is waited
// for, and a chunk's activations stay in the core's cache. Texts that cannot be cut evenly are one chunk, whose steps
// the threads share. What comes out for a text depends on neither.
//
// Legend: B texts, T tokens, E hidden size, N outputs, K inputs, R rotated numbers of a head.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <deque>
#include <memory>

#include "encoder_pass.h"

namespace slimpajama {

namespace {

// Chunks of about equally many tokens, and as many for each thread as for every other where texts allow it: about MOST,
// which stay in a core's cache, and (but for the last) at least LEAST, as for fewer reading the weights takes longer
// than multiplying.
std::vector<Chunk> chunks_of(const int32_t* starts, int64_t texts, int64_t threads) {
  constexpr int64_t LEAST = 64, MOST = 128;
  const int64_t total = starts[texts] - starts[0], most = threads * MOST;
  const int64_t parts = threads * std::max<int64_t>(1, (total + most / 2) / most);
  const int64_t wanted = std::max(LEAST, (total + parts - 1) / parts);
  std::vector<Chunk> chunks;
  for (int64_t text = 0; text < texts; ++text) {
    const int64_t before = starts[text] - starts[0], length = starts[text + 1] - starts[text];
    const int64_t due = wanted * static_cast<int64_t>(chunks.size());  // cut before the text, or after it: what is nearer
    const bool cut = chunks.empty() || (2 * before + length >= 2 * due && chunks.back().num_tokens >= LEAST);
    if (cut) chunks.push_back({text, text, 0});
    chunks.back().last_text = text + 1;
    chunks.back().num_tokens += length;
  }
  return chunks;
}

// A chunk in the hands of whoever took it, and of those who join because no chunk is left for them.
struct Turn {
  explicit Turn(Chunk chunk) : chunk(chunk) {}

  Chunk chunk;
  std::atomic<int64_t> space{-1};  // where it is worked on, once it is taken, and whose steps count it
  std::atomic<bool> over{false};
};

class EncoderLayers : public torch::CustomClassHolder {
 public:
  EncoderLayers(int64_t heads, double scale, double epsilon, std::string activation, bool gated, bool norms_first)
      : sizes_{0, 0, heads, static_cast<float>(scale), named(activation), gated, norms_first},
        epsilon_(static_cast<float>(epsilon)) {}

  // Weight (packed), scales, sums and factors (empty unless int8; factors may be empty then too) and bias (or empty) of
  // the projections to queries, keys and values, of the output, up (behind the gate, if gated) and down; then weight
  // and bias of the attention's norm (both may be empty where norms come first) and of the MLP's.
  void add(std::vector<Tensor> tensors, int64_t hidden, int64_t inner, int64_t window) {
    TORCH_CHECK(tensors.size() == 24, "a layer has 24 tensors, not ", tensors.size());
    TORCH_CHECK(hidden % (32 * sizes_.heads) == 0 && inner % 32 == 0, "heads and the inner size are multiples of 32");
    sizes_.hidden = hidden;
    sizes_.inner = inner;
    const Tensor* next = tensors.data();
    const auto projection = [&](int64_t n, int64_t k) {
      const Weights weights{static_cast<const uint8_t*>(next->const_data_ptr()), next->size(1)};
      Projection found{weights, numbers_of(*next, k), nullptr, nullptr, n, k};
      if (found.numbers == Numbers::int8) {
        found.weights.scales = next[1].const_data_ptr<float>();
        found.weights.sums = next[2].const_data_ptr<int32_t>();
        found.factors = next[3].numel() ? next[3].const_data_ptr<float>() : nullptr;
      }
      TORCH_CHECK(next->size(0) * PANEL == padded(n, 2 * PANEL), "packed weights of other sizes");
      if (found.converts()) sizes_.converted = std::max(sizes_.converted, weights.groups * 4);
      wide_ = found.numbers == Numbers::float32 || found.numbers == Numbers::halves;
      halves_ = found.numbers == Numbers::halves;
      TORCH_CHECK(next[4].numel() == n || next[4].numel() == 0, "a bias of another size");
      found.bias = next[4].numel() ? next[4].const_data_ptr<float>() : nullptr;
      next += 5;
      return found;
    };
    const auto norm = [&] {
      TORCH_CHECK(next[0].numel() == hidden || (sizes_.norms_first && next[0].numel() == 0), "a norm of another size");
      Norm found{nullptr, nullptr, epsilon_};
      if (next[0].numel()) found = {next[0].const_data_ptr<float>(), next[1].const_data_ptr<float>(), epsilon_};
      next += 2;
      return found;
    };
    const auto query_key_value = projection(3 * hidden, hidden), output = projection(hidden, hidden);
    const auto up = projection(sizes_.gated ? 2 * inner : inner, hidden), down = projection(hidden, inner);
    const auto attention_norm = norm(), mlp_norm = norm();
    TORCH_CHECK(mlp_norm.weight && window >= 0, "an MLP has a norm, and a window is positive");
    layers_.push_back({query_key_value, output, up, down, attention_norm, mlp_norm, window});
    kept_.insert(kept_.end(), tensors.begin(), tensors.end());
  }

  // What the layers begin with: see `Tables`; then weight and bias of their norm, float32 [E].
  void embed_with(Tensor tokens, std::optional<Tensor> types, std::optional<Tensor> positions, const Tensor& weight,
                  const Tensor& bias) {
    tables_ = {{std::move(tokens), std::move(types), std::move(positions)},
               {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), epsilon_}};
    TORCH_CHECK(weight.is_contiguous() && bias.is_contiguous() && bias.numel() == weight.numel(),
                "weight and bias are float32 [E]");
    kept_.insert(kept_.end(), {weight, bias});
    const auto type = tables_.rows[0]->scalar_type();
    for (const auto& table : tables_.rows)
      TORCH_CHECK(!table || (table->is_contiguous() && table->size(1) == weight.numel() && table->scalar_type() == type),
                  "tables are [rows, E], of one type");
  }

  // What the layers end with, where norms come first: float32 [E].
  void end_with(const Tensor& weight, const Tensor& bias) {
    last_norm_ = {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), epsilon_};
    kept_.insert(kept_.end(), {weight, bias});
  }

  // ids, type_ids and positions [T] int64; starts [B + 1] int32, of texts that are not empty; `rotations`, if queries
  // and keys are turned, float32 [T, R] (see `Rotations`), and `local` those of layers with a window. Returns the states
  // [T, E], float32 or bfloat16 as the tables are.
  Tensor run(const Tensor& ids, const Tensor& type_ids, const Tensor& positions, const Tensor& starts,
             const std::optional<Tensor>& rotations, const std::optional<Tensor>& local) {
    TORCH_CHECK(tables_.rows[0] && tables_.rows[0]->size(1) == sizes_.hidden && starts.scalar_type() == at::kInt &&
                starts.is_contiguous(), "there are tables [rows, E], and starts are int32");
    const auto* first = starts.const_data_ptr<int32_t>();
    TORCH_CHECK(starts.numel() > 0 && first[0] == 0 && first[starts.numel() - 1] == ids.numel(),
                "starts begin with 0 and end with the number of tokens");
    const Tensor numbers[] = {ids, type_ids, positions};
    tables_.check(numbers);
    const Rotations usual = rotations ? checked(*rotations, ids.numel()) : Rotations{};
    const Rotations turns[] = {usual, local ? checked(*local, ids.numel()) : usual};
    TORCH_CHECK(!sizes_.norms_first || last_norm_.weight, "norms that come first end with one");
    const Tensor hidden = at::empty({ids.numel(), sizes_.hidden}, tables_.rows[0]->options());
    TORCH_CHECK((hidden.scalar_type() == at::kFloat) == wide_, "tables and weights are of different types");
    TORCH_CHECK(!halves_ || has_avx512(), "halves are multiplied on AVX-512 and AMX alone");
    const std::lock_guard lock(mutex_);
    if (wide_)
      run(floats_, Embedding<float>(tables_, numbers, sizes_.hidden), turns, hidden.data_ptr<float>(), starts);
    else
      run(narrow_, Embedding<bf16>(tables_, numbers, sizes_.hidden), turns, mutable_data(hidden), starts);
    return hidden;
  }

 private:
  Rotations checked(const Tensor& rows, int64_t tokens) const {
    TORCH_CHECK(rows.is_contiguous() && rows.dim() == 2 && rows.scalar_type() == at::kFloat && rows.size(0) == tokens &&
                rows.size(1) % 2 == 0 && rows.size(1) <= sizes_.hidden / sizes_.heads,
                "rotations are float32 [T, R], and R is even and no more than a head has");
    return {rows.const_data_ptr<float>(), rows.size(1)};
  }

  // Of packed weights [N / 16, groups, 16, inputs in a group] that K inputs meet; halves have two numbers for each.
  static Numbers numbers_of(const Tensor& packed, int64_t k) {
    const int64_t groups = packed.size(1), each = packed.size(3);
    const bool halves = packed.scalar_type() == at::kBFloat16 && groups == k;
    TORCH_CHECK(halves || groups == padded(k / each, TILE_GROUPS), "packed weights of other sizes");
    if (halves) return Numbers::halves;
    if (packed.scalar_type() == at::kFloat) return Numbers::float32;
    return packed.scalar_type() == at::kBFloat16 ? Numbers::bf16 : Numbers::int8;
  }

  template <typename Value>
  struct Spaces {
    std::vector<Space<Value>> spaces;
    std::vector<std::unique_ptr<Steps>> steps;  // of the chunk that is worked on in each space
    std::vector<TextAttention<Value>> attentions;
  };

  template <typename Value>
  void run(Spaces<Value>& kept, const Embedding<Value>& embedding, const Rotations (&rotations)[2], Value* hidden,
           const Tensor& starts_tensor) {
    const auto* starts = starts_tensor.const_data_ptr<int32_t>();
    const int64_t texts = starts_tensor.size(0) - 1;
    const int64_t threads = at::get_num_threads();
    std::deque<Turn> turns;
    for (const Chunk& chunk : chunks_of(starts, texts, threads)) turns.emplace_back(chunk);
    make_space(kept, turns, starts, threads);
    std::atomic<size_t> next{0};
    Crew::get().run(threads, [&](int64_t rank) {
      const auto work_on = [&](Turn& turn) {
        const int64_t space = turn.space;
        const Member member(*kept.steps[space], rank);
        Pass pass(sizes_, member, kept.spaces[space], kept.attentions[rank], starts, turn.chunk, hidden);
        pass.run(embedding, rotations, layers_, last_norm_);
      };
      for (size_t index = next++; index < turns.size(); index = next++) {
        const int64_t space = static_cast<int64_t>(turns.size()) < threads ? static_cast<int64_t>(index) : rank;
        kept.steps[space]->begin_anew();  // nobody joins a turn before the last one is taken
        turns[index].space = space;
        work_on(turns[index]);
        turns[index].over = true;
      }
      for (Turn& turn : turns) {
        if (turn.over) continue;
        for (Patience patience; turn.space < 0;) patience.wait();
        work_on(turn);
      }
    });
  }

  template <typename Value>
  void make_space(Spaces<Value>& kept, const std::deque<Turn>& turns, const int32_t* starts, int64_t threads) {
    int64_t rows = 0, longest = 0;
    for (const Turn& turn : turns) {
      const Chunk& chunk = turn.chunk;
      rows = std::max(rows, chunk.num_tokens);
      for (int64_t text = chunk.first_text; text < chunk.last_text; ++text)
        longest = std::max<int64_t>(longest, starts[text + 1] - starts[text]);
    }
    const int64_t spaces = std::min(threads, static_cast<int64_t>(turns.size()));
    if (static_cast<int64_t>(kept.spaces.size()) < spaces) kept.spaces.resize(spaces);
    kept.steps.resize(kept.spaces.size());
    for (int64_t i = 0; i < spaces; ++i) {
      kept.spaces[i].grow(rows, sizes_);
      const int64_t steps = 2 + static_cast<int64_t>(layers_.size()) * Pass<Value>::MOST_STEPS;
      if (!kept.steps[i] || kept.steps[i]->threads() != threads) kept.steps[i] = std::make_unique<Steps>(steps, threads);
    }
    const int64_t size = sizes_.hidden / sizes_.heads;
    while (static_cast<int64_t>(kept.attentions.size()) < threads)
      kept.attentions.emplace_back(sizes_.heads, size, sizes_.scale);
    for (auto& attention : kept.attentions) attention.grow(longest);
  }

  static Activation named(const std::string& name) {
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "silu") return Activation::silu;
    TORCH_CHECK(name == "relu", "no activation ", name);
    return Activation::relu;
  }

  Sizes sizes_;
  float epsilon_;
  Tables tables_;
  Norm last_norm_{};
  std::vector<Layer> layers_;
  bool wide_ = false, halves_ = false;  // what the weights are
  std::vector<Tensor> kept_;  // that the layers point into
  std::mutex mutex_;
  Spaces<float> floats_;
  Spaces<bf16> narrow_;
};

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  using slimpajama::EncoderLayers;
  library.class_<EncoderLayers>("EncoderLayers")
      .def(torch::init<int64_t, double, double, std::string, bool, bool>())
      .def("add", [](const c10::intrusive_ptr<EncoderLayers>& self, std::vector<at::Tensor> tensors, int64_t hidden,
                     int64_t inner, int64_t window) { self->add(std::move(tensors), hidden, inner, window); })
      .def("embed_with", [](const c10::intrusive_ptr<EncoderLayers>& self, at::Tensor tokens,
                            std::optional<at::Tensor> types, std::optional<at::Tensor> positions,
                            const at::Tensor& weight, const at::Tensor& bias) {
        self->embed_with(std::move(tokens), std::move(types), std::move(positions), weight, bias);
      })
      .def("end_with", [](const c10::intrusive_ptr<EncoderLayers>& self, const at::Tensor& weight,
                          const at::Tensor& bias) { self->end_with(weight, bias); })
      .def("run", [](const c10::intrusive_ptr<EncoderLayers>& self, const at::Tensor& ids, const at::Tensor& type_ids,
                     const at::Tensor& positions, const at::Tensor& starts,
                     const std::optional<at::Tensor>& rotations, const std::optional<at::Tensor>& local) {
        return self->run(ids, type_ids, positions, starts, rotations, local);
      });
}
