// The way of a chunk of texts through an encoder's layers: what they are made of, and which step follows which.
//
// Positions may be rotary (arXiv 2104.09864), MLPs gated (arXiv 2002.05202), norms on the inputs of sublayers instead
// of their sums, and attention within windows (ModernBERT, arXiv 2412.13663). Who works on which chunk is
// `encoder_layers.cpp`'s.
//
// Legend: T tokens, E hidden size, F inner size, H heads, D head size, R rotated numbers of a head.
#pragma once

#include "crew.h"
#include "embedding.h"
#include "text_attention.h"

namespace slimpajama {

enum class Numbers { float32, halves, bf16, int8 };

struct Projection {
  Weights weights;
  Numbers numbers;
  const float *bias, *factors;  // [N], [K], or none; factors: of each input before it is quantized
  int64_t n, k;

  bool converts() const { return numbers == Numbers::halves || numbers == Numbers::int8; }
};

struct Layer {
  Projection query_key_value, output, up, down;  // up with the gate above it, where there is one
  Norm attention_norm, mlp_norm;                 // the first may have no weights, where norms come first
  int64_t window = 0;                            // a token sees those less than so many away; 0: all
};

struct Sizes {
  int64_t hidden, inner, heads;
  float scale;  // of the attention's scores
  Activation activation;
  bool gated, norms_first;
  int64_t converted = 0;  // bytes of the widest row that is converted on its way into a projection
};

// Consecutive texts, and their tokens.
struct Chunk {
  int64_t first_text, last_text, num_tokens;
};

// By what a token's queries and keys are turned: R / 2 cosines, then as many sines.
struct Rotations {
  const float* rows = nullptr;  // [T, R], or none
  int64_t width = 0;
};

// What is between the steps of a chunk; kept from call to call.
template <typename Value>
struct Space {
  Kept<Value> fused, attended, normed, gate_up, inner;  // [T, 3 E], [T, E], [T, E], [T, 2 F], [T, F]
  Kept<float> sums, scales;  // [T, E], [T]
  Kept<uint8_t> converted;   // [T, bytes]
  Kept<int32_t> zeros;       // [T]

  void grow(int64_t rows, const Sizes& sizes) {
    grown(fused, (rows + TILE_WIDTH) * 3 * sizes.hidden);
    grown(attended, rows * sizes.hidden);
    grown(inner, rows * sizes.inner);
    if (sizes.norms_first) grown(normed, rows * sizes.hidden);
    if (sizes.gated) grown(gate_up, rows * 2 * sizes.inner);
    grown(sums, rows * sizes.hidden);
    grown(scales, rows);
    grown(zeros, rows);
    grown(converted, rows * sizes.converted);
  }
};

// A chunk's way through the layers, in the hands of one member of those who work on it.
template <typename Value>
class Pass {
 public:
  // Of a layer: four projections and what they convert, rotation, attention, gate, two norms.
  static constexpr int64_t MOST_STEPS = 13;

  Pass(const Sizes& sizes, Member member, Space<Value>& space, TextAttention<Value>& attention, const int32_t* starts,
       Chunk chunk, Value* hidden)
      : sizes_(sizes), member_(member), space_(space), attention_(attention), starts_(starts), chunk_(chunk),
        hidden_(hidden + starts[chunk.first_text] * sizes.hidden) {}

  // `rotations` of layers without a window, and of those with one.
  void run(const Embedding<Value>& embedding, const Rotations (&rotations)[2], const std::vector<Layer>& layers,
           const Norm& last_norm) {
    embed(embedding);
    for (const Layer& layer : layers) {
      const Rotations& own = rotations[layer.window > 0];
      if (sizes_.norms_first) {
        attend(layer, own, layer.attention_norm.weight ? normed(layer.attention_norm) : hidden_, residual());
        widen(layer, normed(layer.mlp_norm), residual());
      } else {
        attend(layer, own, hidden_, sum());
        normalize(layer.attention_norm);
        widen(layer, hidden_, sum());
        normalize(layer.mlp_norm);
      }
    }
    if (sizes_.norms_first) norm_rows(last_norm, hidden_);
  }

 private:
  static Output output(float* values, int64_t n) { return {values, nullptr, nullptr, n}; }
  static Output output(bf16* values, int64_t n) { return {nullptr, values, nullptr, n}; }
  static void add(Output& out, const float* values) { out.added_wide = values; }
  static void add(Output& out, const bf16* values) { out.added_narrow = values; }

  void embed(const Embedding<Value>& embedding) {
    const int64_t first = starts_[chunk_.first_text];
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      embedding.run(first + begin, first + end, space_.sums.data() + begin * sizes_.hidden,
                    hidden_ + begin * sizes_.hidden);
    });
  }

  void attend(const Layer& layer, const Rotations& rotations, const Value* x, const Output& out) {
    Value *fused = space_.fused.data(), *attended = space_.attended.data();
    project(layer.query_key_value, x, output(fused, 3 * sizes_.hidden));
    if (rotations.rows) rotate(rotations, fused);
    attend(fused, layer.window, attended);
    project(layer.output, attended, out);
  }

  // The MLP.
  void widen(const Layer& layer, const Value* x, const Output& out) {
    Value* inner = space_.inner.data();
    if (sizes_.gated) {
      project(layer.up, x, output(space_.gate_up.data(), 2 * sizes_.inner));
      gate(space_.gate_up.data(), inner);
    } else {
      Output activated = output(inner, sizes_.inner);
      activated.activation = sizes_.activation;
      project(layer.up, x, activated);
    }
    project(layer.down, inner, out);
  }

  // A projection's result added to the states where they are.
  Output residual() {
    Output out = output(hidden_, sizes_.hidden);
    add(out, hidden_);
    return out;
  }

  const Value* normed(const Norm& norm) {
    norm_rows(norm, space_.normed.data());
    return space_.normed.data();
  }

  // Where a projection's result meets what it is a residual to.
  Output sum() {
    Output out{space_.sums.data(), nullptr, nullptr, sizes_.hidden};
    add(out, hidden_);
    return out;
  }

  void project(const Projection& projection, const Value* x, Output out) {
    const int64_t rows = chunk_.num_tokens;
    const Weights& weights = projection.weights;
    out.bias = projection.bias;
    convert(projection, x);
    const Rows given{reinterpret_cast<const uint8_t*>(x), rows, weights.groups};
    const Rows converted{space_.converted.data(), rows, weights.groups, space_.scales.data(), space_.zeros.data()};
    // The products of several rows are quickest over two pairs of panels at a time.
    const int64_t pairs = padded(projection.n, 2 * PANEL) / (2 * PANEL);
    member_.share((pairs + 1) / 2, [&](int64_t first, int64_t last) {
      const int64_t begin = 2 * first, end = std::min(2 * last, pairs);
      switch (projection.numbers) {
        case Numbers::float32: return project_float32(given, weights, out, begin, end);
        case Numbers::halves: return project_halves(converted, weights, out, begin, end);
        case Numbers::bf16: return project_bf16(given, weights, out, begin, end);
        case Numbers::int8: return project_int8(converted, weights, out, begin, end);
      }
    });
  }

  // x in the numbers of the projection's weights, where those are not its own.
  void convert(const Projection& projection, const Value* x) {
    if (!projection.converts()) return;
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      const int64_t k = projection.k, width = projection.weights.groups * 4;
      for (int64_t row = begin; row < end; ++row) {
        uint8_t* out = space_.converted.data() + row * width;
        if constexpr (std::is_same_v<Value, float>) {
          split_row(x + row * k, k, reinterpret_cast<bf16*>(out));
        } else {
          const Steps8 steps = quantize_row(x + row * k, k, projection.factors, out);
          space_.scales[row] = steps.scale;
          space_.zeros[row] = steps.zero;
        }
      }
    });
  }

  // Queries and keys, which lie side by side: [2 H, D] of a token's [3 H, D].
  void rotate(const Rotations& rotations, Value* fused) {
    const auto step = FASTEST(turn<Value>);
    const int64_t size = sizes_.hidden / sizes_.heads, half = rotations.width / 2, origin = starts_[chunk_.first_text];
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* cosines = rotations.rows + (origin + row) * rotations.width;
        for (int64_t head = 0; head < 2 * sizes_.heads; ++head)
          step(fused + row * 3 * sizes_.hidden + head * size, cosines, cosines + half, half);
      }
    });
  }

  void gate(const Value* gate_up, Value* inner) {
    const auto step = FASTEST(gate_mul<Value>);
    const int64_t f = sizes_.inner;
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Value* both = gate_up + row * 2 * f;
        step(sizes_.activation, both, both + f, f, inner + row * f);
      }
    });
  }

  void attend(const Value* fused, int64_t window, Value* attended) {
    const int64_t texts = chunk_.last_text - chunk_.first_text, origin = starts_[chunk_.first_text];
    member_.share(texts * sizes_.heads, [&](int64_t begin, int64_t end) {
      attention_.begin();
      for (int64_t item = begin; item < end; ++item) {
        const int32_t* text = starts_ + chunk_.first_text + item / sizes_.heads;
        const int64_t first = text[0] - origin;
        const int64_t len = text[1] - text[0];
        attention_.run(fused + first * 3 * sizes_.hidden, len, item % sizes_.heads, window > 0 ? window : len,
                       attended + first * sizes_.hidden);
      }
      attention_.end();
    });
  }

  void normalize(const Norm& norm) {
    const auto step = FASTEST(layer_norm<Value>);
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        step(space_.sums.data() + row * sizes_.hidden, sizes_.hidden, norm, hidden_ + row * sizes_.hidden);
    });
  }

  void norm_rows(const Norm& norm, Value* out) {
    const auto step = FASTEST(layer_norm_of<Value>);
    member_.share(chunk_.num_tokens, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        step(hidden_ + row * sizes_.hidden, sizes_.hidden, norm, out + row * sizes_.hidden);
    });
  }

  const Sizes& sizes_;
  Member member_;
  Space<Value>& space_;
  TextAttention<Value>& attention_;
  const int32_t* starts_;
  Chunk chunk_;
  Value* hidden_;
};

}  // namespace slimpajama
