// One query of a sequence under all key heads of the item, on AVX-512: strips of keys and values are used as they are
// read, each once and from end to end, which is what counts where a step's time is that of its reading.
//
// Adds up in the order that blocks of many queries do (`attention_products.h`), and so finds the same, to a bit.
#pragma once

#include "attention_block.h"
#include "narrow_strips.h"

#if HAS_X86
namespace slimpajama {

using avx512::add_pairs;

constexpr int64_t MAX_SHARED = 8;  // query heads of a key head

// A line of values of which `count` positions are the sequence's: what others left in the second is zero, for a weight
// of zero does not silence it if it is not finite.
AVX512 inline __m512i known_pairs(__m512i line, int64_t count) {
  return count > 1 ? line : _mm512_and_si512(line, _mm512_set1_epi32(0xffff));
}

// Scores of SHARED query heads with a strip of keys, to scores [SHARED][KEYS].
template <int SHARED, typename Lines>
AVX512 inline void score_strip(const bf16* queries, const Lines& keys, int64_t size, float* scores, Ahead& ahead) {
  __m512 sums[SHARED];
#pragma GCC unroll 8
  for (int h = 0; h < SHARED; ++h) sums[h] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += 32) {
    ahead.fetch(16);
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i line = keys[i / 2 + pair];
#pragma GCC unroll 8
      for (int h = 0; h < SHARED; ++h) sums[h] = add_pairs(sums[h], queries + h * size + i + 2 * pair, line);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < SHARED; ++h) _mm512_storeu_ps(scores + h * KEYS, sums[h]);
}

// Adds a strip's values, `count` of them, by their weights [SHARED][KEYS] to sums [SHARED][MAX_SIZE].
template <int SHARED, typename Lines>
AVX512 inline void add_strip(const bf16* weights, const Lines& values, int64_t count, int64_t size, float* sums,
                             Ahead& ahead) {
  for (int64_t i = 0; i < size; i += 16) {
    ahead.fetch(8);
    __m512 own[SHARED];
#pragma GCC unroll 8
    for (int h = 0; h < SHARED; ++h) own[h] = _mm512_load_ps(sums + h * MAX_SIZE + i);
    for (int64_t t = 0; t < count; t += 2) {
      const __m512i line = known_pairs(values[i / 2 + t / 2], count - t);
#pragma GCC unroll 8
      for (int h = 0; h < SHARED; ++h) own[h] = add_pairs(own[h], weights + h * KEYS + t, line);
    }
#pragma GCC unroll 8
    for (int h = 0; h < SHARED; ++h) _mm512_store_ps(sums + h * MAX_SIZE + i, own[h]);
  }
}

// Multiplies SHARED rows of scores or weights by the scales of a strip's first `count` positions.
template <int SHARED, typename Value>
AVX512 inline void multiply_strip(const bf16* strip, int64_t size, int64_t count, Value (*rows)[KEYS], int64_t k) {
  float scales[STRIP];
  copy_scales(strip, size, count, scales);
  for (int h = 0; h < SHARED; ++h) avx512::multiply_each(scales, STRIP, rows[h] + k);
}

template <int SHARED, typename Lines>
AVX512 void attend_single(const Cache& c, const Item& item, const Shape& shape) {
  Scratch<bf16>& s = scratch<bf16>();
  const int64_t size = c.head_size, rows = item.groups * SHARED;
  clear_sums(rows, size, s);
  const Sight own = sight(item, shape, item.position);
  for (int64_t start = own.first / KEYS * KEYS; start < own.end; start += KEYS) {
    const int64_t begin = std::max<int64_t>(own.first - start, 0), count = std::min(KEYS, own.end - start);
    const int64_t first = begin / STRIP * STRIP, last = (count - 1) / STRIP * STRIP;
    for (int64_t k = first; k < count; k += STRIP) {
      const int64_t next = k + 2 * STRIP, past = next - last - STRIP;
      Ahead ahead = past < 0 ? Ahead(c.keys, c, item, start + next, own.end)
                             : Ahead(c.values, c, item, start + first + past, own.end);
      const bf16* strip = c.keys + c.strip_at(item.slot_of(c, start + k), item.group);
      for (int64_t g = 0; g < item.groups; ++g, strip += c.strip_size()) {
        score_strip<SHARED>(item.query + g * SHARED * size, Lines{strip}, size, &s.scores[g * SHARED][k], ahead);
        if (c.narrow) multiply_strip<SHARED>(strip, size, count - k, s.scores + g * SHARED, k);
      }
    }
    SoftmaxSum sums[MAX_SINGLES];
    for (int64_t row = 0; row < rows; ++row) {
      sums[row] = avx512::weigh(s.scores[row], begin, count, count, shape.scale * LOG2_E, s.weights[row]);
      std::memset(s.found[row], 0, size * sizeof(float));
    }
    for (int64_t k = first; k < count; k += STRIP) {
      Ahead ahead(c.values, c, item, start + k + 2 * STRIP, own.end);
      const bf16* strip = c.values + c.strip_at(item.slot_of(c, start + k), item.group);
      for (int64_t g = 0; g < item.groups; ++g, strip += c.strip_size()) {
        if (c.narrow) multiply_strip<SHARED>(strip, size, count - k, s.weights + g * SHARED, k);
        add_strip<SHARED>(&s.weights[g * SHARED][k], Lines{strip}, std::min(STRIP, count - k), size,
                          s.found[g * SHARED], ahead);
      }
    }
    for (int64_t row = 0; row < rows; ++row) avx512::merge(s.found[row], sums[row], size, s.so_far[row], s.sums[row]);
  }
  for (int64_t row = 0; row < rows; ++row)
    avx512::write_shares(s.sums[row], s.so_far[row].total, size, item.out + row * size);
}

}  // namespace slimpajama
#endif
