// The block of keys that attention works on: 256 positions from a multiple of 256 on, whoever asks.
#pragma once

#include <memory>

#include "paged_layout.h"
#include "rows.h"

namespace slimpajama {

constexpr int64_t KEYS = 256;       // of a block
constexpr int64_t ROWS = 16;        // of a set: what a tile holds
constexpr int64_t MAX_SETS = 12;    // of an item with several tokens
constexpr int64_t MAX_ROWS = MAX_SETS * ROWS;
constexpr int64_t MAX_SINGLES = 64;  // rows of an item with one token

// `Number` is what keys and values are multiplied by: bfloat16, or on lanes float32.
template <typename Number>
struct Scratch {
  alignas(64) Number queries[MAX_SETS][ROWS * MAX_SIZE];
  const bf16* keys[KEYS / STRIP];            // where the block's strips are; the last one twice, if they are odd
  alignas(64) bf16 values[KEYS * MAX_SIZE];  // [D / 16][KEYS / 2 pairs of keys][16 dimensions][2]
  // Of a cache in 8 bits: the block's keys, a strip's values, and the scales of both.
  alignas(64) bf16 opened_keys[KEYS * MAX_SIZE], opened_values[STRIP * MAX_SIZE];
  alignas(64) float key_scales[KEYS], value_scales[KEYS];
  alignas(64) float scores[MAX_SINGLES][KEYS];
  alignas(64) Number weights[MAX_SINGLES][KEYS];
  alignas(64) float found[MAX_SINGLES][MAX_SIZE];  // the block's weighted values
  alignas(64) float sums[MAX_ROWS][MAX_SIZE];      // of all blocks so far
  SoftmaxSum so_far[MAX_ROWS];
};

template <typename Number>
Scratch<Number>& scratch() {
  static thread_local const auto mine = std::make_unique<Scratch<Number>>();
  return *mine;
}

template <typename Number>
void clear_sums(int64_t rows, int64_t size, Scratch<Number>& s) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memset(s.sums[row], 0, size * sizeof(float));
    s.so_far[row] = {};
  }
}

}  // namespace slimpajama
