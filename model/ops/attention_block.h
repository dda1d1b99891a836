// The block of keys that attention works on, and its softmax: 256 positions from a multiple of 256 on, whoever asks.
#pragma once

#include <memory>

#include "vectors.h"

namespace slimpajama {

constexpr int64_t KEYS = 256;       // of a block
constexpr int64_t ROWS = 16;        // of a set: what a tile holds
constexpr int64_t MAX_SETS = 12;    // of an item with several tokens
constexpr int64_t MAX_ROWS = MAX_SETS * ROWS;
constexpr int64_t MAX_SINGLES = 64;  // rows of an item with one token
constexpr int64_t MAX_SIZE = 256;   // of a head, a multiple of 32

#if HAS_X86
constexpr float LOG2_E = 1.44269504f;

struct Scratch {
  alignas(64) bf16 queries[MAX_SETS][ROWS * MAX_SIZE];
  alignas(64) bf16 keys[KEYS * MAX_SIZE];    // [KEYS / 16][D / 2 pairs of dimensions][16 keys][2]
  alignas(64) bf16 values[KEYS * MAX_SIZE];  // [KEYS / 32][D / 16][16 pairs of keys][16 dimensions][2]
  alignas(64) float scores[MAX_SINGLES][KEYS];
  alignas(64) bf16 weights[MAX_SINGLES][KEYS];
  alignas(64) float found[MAX_SINGLES][MAX_SIZE];  // the block's weighted values
  alignas(64) float sums[MAX_ROWS][MAX_SIZE];      // of all blocks so far
  float largest[MAX_ROWS], totals[MAX_ROWS];
  alignas(64) bf16 gathered[ROWS * MAX_SIZE];
};

inline Scratch& scratch() {
  static thread_local const auto mine = std::make_unique<Scratch>();
  return *mine;
}

inline void clear_sums(int64_t rows, int64_t size, Scratch& s) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memset(s.sums[row], 0, size * sizeof(float));
    s.largest[row] = -INFINITY, s.totals[row] = 0.0f;
  }
}

// One row's keys from `begin` to `end` (of the block): its scores become weights, bfloat16, up to `count`; the largest
// scaled score and the weights' sum are returned.
AVX512 inline void weigh(int64_t row, int64_t begin, int64_t end, int64_t count, float scale, Scratch& s, float& largest,
                  float& total) {
  const float* scores = s.scores[row];
  const auto seen = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t first = std::clamp<int64_t>(begin - k, 0, 16), last = std::clamp<int64_t>(end - k, 0, 16);
    return static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
  };
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t k = begin / 16 * 16; k < end; k += 16)
    top = _mm512_mask_max_ps(top, seen(k), top, _mm512_load_ps(scores + k));
  largest = _mm512_reduce_max_ps(top) * scale;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 32) {
    __m512 weights[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + k + 16 * j), factor, shift);
      weights[j] = _mm512_maskz_mov_ps(seen(k + 16 * j), exp2_avx512(x));
      sum = _mm512_add_ps(sum, weights[j]);
    }
    _mm512_store_si512(&s.weights[row][k], reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0])));
  }
  total = _mm512_reduce_add_ps(sum);
}

// Adds a block's result (its largest score, total of weights, weighted values) to a row's.
AVX512 inline void merge(int64_t row, const float* found, float largest, float total, int64_t size, Scratch& s) {
  float& before = s.largest[row];
  const float now = std::max(before, largest);
  const float keep = before == -INFINITY ? 0.0f : std::exp2(before - now), add = std::exp2(largest - now);
  s.totals[row] = s.totals[row] * keep + total * add;
  before = now;
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 more = _mm512_mul_ps(_mm512_load_ps(found + i), _mm512_set1_ps(add));
    _mm512_store_ps(s.sums[row] + i, _mm512_fmadd_ps(_mm512_load_ps(s.sums[row] + i), _mm512_set1_ps(keep), more));
  }
}

AVX512 inline void write_row(int64_t row, int64_t size, bf16* out, const Scratch& s) {
  const __m512 share = _mm512_set1_ps(1.0f / s.totals[row]);
  for (int64_t i = 0; i < size; i += 16) narrow(out + i, _mm512_mul_ps(_mm512_load_ps(s.sums[row] + i), share));
}
#endif

}  // namespace slimpajama
