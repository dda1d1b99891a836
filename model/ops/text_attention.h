// Attention of one head over one text, every token to every token (arXiv 1706.03762) or to those near it.
//
// On lanes keys and values are rearranged as packed weights are (`projection.h`), so that the projections' products
// make the scores, QUERIES rows at a time, and the results. AVX-512 and AMX have a way of their own (`text_vectors.h`).
//
// Legend: L tokens of the text, D head size, a multiple of 32.
#pragma once

#include <limits>
#include <vector>

#include "text_vectors.h"

namespace slimpajama {

inline void project(const Rows& x, const Weights& weights, const Output& out, int64_t pairs, float) {
  project_float32(x, weights, out, 0, pairs);
}
inline void project(const Rows& x, const Weights& weights, const Output& out, int64_t pairs, bf16) {
  project_bf16(x, weights, out, 0, pairs);
}

// What one thread needs for any head of any text.
template <typename Value>
class TextAttention {
 public:
  // `scale` (positive) multiplies the scores; queries, keys and values of a token lie side by side, [3, H, D].
  TextAttention(int64_t heads, int64_t size, float scale)
      : size_(size), width_(heads * size), scale_(scale), vectors_(size, scale) {}

  // Makes room for texts of `len` tokens, and decides for the calls that follow on what they run.
  void grow(int64_t len) {
    on_vectors_ = has_avx512();
    if (on_vectors_) return vectors_.grow(len);
    const auto padded_len = static_cast<size_t>(padded(len, LEAST));
    if (scores_.size() >= QUERIES * padded_len) return;
    keys_.resize(padded_len * size_);
    values_.resize(padded_len * size_);
    scores_.resize(QUERIES * padded_len);
    shares_.resize(QUERIES * padded_len);
  }

  // Before and after a series of `run`.
  void begin() const {
    if (on_vectors_) vectors_.begin();
  }
  void end() const {
    if (on_vectors_) vectors_.end();
  }

  // fused [L, 3, H, D], and behind it TILE_WIDTH rows of anything; writes this head's part of out [L, H, D]. A token
  // sees those less than `window` away.
  void run(const Value* fused, int64_t len, int64_t head, int64_t window, Value* out) {
    const int64_t padded_len = padded(len, LEAST), stride = 3 * width_;
    const Value* query = fused + head * size_;
    if (on_vectors_)
      return vectors_.run({query, query + width_, query + 2 * width_, stride, len}, window, out + head * size_, width_);
    pack_keys(query + width_, len, padded_len);
    pack_values(query + 2 * width_, len, padded_len);
    const Weights keys{bytes(keys_), size_ / EACH}, values{bytes(values_), padded_len / EACH};
    for (int64_t first = 0; first < len; first += QUERIES) {
      const int64_t count = std::min(QUERIES, len - first);
      const Rows queries{reinterpret_cast<const uint8_t*>(query + first * stride), count, size_ / EACH, nullptr, nullptr,
                         stride * static_cast<int64_t>(sizeof(Value))};
      project(queries, keys, {scores_.data(), nullptr, nullptr, padded_len}, padded_len / LEAST, Value{});
      for (int64_t i = 0; i < count; ++i) {
        float* scores = scores_.data() + i * padded_len;
        hide(scores, std::max<int64_t>(0, first + i - window + 1), std::min(len, first + i + window), len);
        softmax(scores, len, shares_.data() + i * padded_len);
      }
      const Rows shares{bytes(shares_), count, padded_len / EACH};
      Output found = target(out + first * width_ + head * size_);
      found.n = size_;
      found.stride = width_;
      project(shares, values, found, size_ / LEAST, Value{});
    }
  }

 private:
  static constexpr int64_t QUERIES = 48;           // at a time
  static constexpr int64_t LEAST = 2 * PANEL;      // what lengths are padded to
  static constexpr int64_t EACH = 4 / sizeof(Value);  // in 32 bits

  static const uint8_t* bytes(const std::vector<Value>& values) {
    return reinterpret_cast<const uint8_t*>(values.data());
  }
  static Output target(float* out) { return {out, nullptr, nullptr, 0}; }
  static Output target(bf16* out) { return {nullptr, out, nullptr, 0}; }

  // Packed as weights [N = L, K = D].
  void pack_keys(const Value* keys, int64_t len, int64_t padded_len) {
    const int64_t groups = size_ / EACH;
    for (int64_t j = 0; j < padded_len; ++j) {
      Value* lane = keys_.data() + (j / PANEL * groups * PANEL + j % PANEL) * EACH;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t e = 0; e < EACH; ++e)
          lane[g * PANEL * EACH + e] = j < len ? keys[j * 3 * width_ + g * EACH + e] : Value{};
    }
  }

  // Packed as weights [N = D, K = L]. Beyond L there are zeros, for what lies there would be multiplied by zero.
  void pack_values(const Value* values, int64_t len, int64_t padded_len) {
    const int64_t groups = padded_len / EACH;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t e = 0; e < EACH; ++e) {
        const int64_t j = g * EACH + e;
        for (int64_t panel = 0; panel < size_ / PANEL; ++panel) {
          Value* line = values_.data() + (panel * groups + g) * PANEL * EACH + e;
          const Value* source = values + j * 3 * width_ + panel * PANEL;
          for (int64_t lane = 0; lane < PANEL; ++lane) line[lane * EACH] = j < len ? source[lane] : Value{};
        }
      }
  }

  static void hide(float* scores, int64_t begin, int64_t end, int64_t len) {
    std::fill(scores, scores + begin, -std::numeric_limits<float>::infinity());
    std::fill(scores + end, scores + len, -std::numeric_limits<float>::infinity());
  }

  void softmax(float* scores, int64_t len, Value* out) const {
    const int64_t padded_len = padded(len, LEAST);
    std::fill(scores + len, scores + padded_len, -std::numeric_limits<float>::infinity());
    lanes::softmax(scores, padded(len, PANEL), padded_len, scale_, out);
  }

  int64_t size_, width_;
  float scale_;
  TextVectors<Value> vectors_;
  bool on_vectors_ = false;
  std::vector<Value> keys_, values_;
  std::vector<float> scores_;
  std::vector<Value> shares_;
};

}  // namespace slimpajama
