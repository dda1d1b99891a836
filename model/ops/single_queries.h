// One query of a sequence under all key heads of the item, on AVX-512: strips of keys and values are used as they are
// read, each once and from end to end, which is what counts where a step's time is that of its reading.
//
// Adds up in the order that blocks of many queries do (`attention_products.h`), and so finds the same, to a bit.
#pragma once

#include "attention_block.h"
#include "paged_strips.h"

#if HAS_X86
namespace slimpajama {

using avx512::add_pairs;

constexpr int64_t MAX_SHARED = 8;  // query heads of a key head

// Scores of SHARED query heads with a strip of keys, to scores [SHARED][KEYS].
template <int SHARED>
AVX512 inline void score_strip(const bf16* queries, Strip keys, int64_t size, float* scores, Ahead& ahead) {
  __m512 sums[SHARED];
#pragma GCC unroll 8
  for (int h = 0; h < SHARED; ++h) sums[h] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += 32) {
    ahead.fetch();
    __m512i rows[STRIP];
#pragma GCC unroll 16
    for (int t = 0; t < STRIP; ++t) rows[t] = _mm512_loadu_si512(keys.first + t * keys.stride + i);
    transpose(rows);
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; ++pair)
#pragma GCC unroll 8
      for (int h = 0; h < SHARED; ++h)
        sums[h] = add_pairs(sums[h], queries + h * size + i + 2 * pair, rows[pair]);
  }
#pragma GCC unroll 8
  for (int h = 0; h < SHARED; ++h) _mm512_storeu_ps(scores + h * KEYS, sums[h]);
}

// Adds a strip's values, `count` of them, by their weights [SHARED][KEYS] to sums [SHARED][MAX_SIZE].
template <int SHARED>
AVX512 inline void add_strip(const bf16* weights, Strip values, int64_t count, int64_t size, float* sums,
                             Ahead& ahead) {
  for (int64_t i = 0; i < size; i += 32) {
    ahead.fetch();
    __m512 low[SHARED], high[SHARED];
#pragma GCC unroll 8
    for (int h = 0; h < SHARED; ++h) {
      low[h] = _mm512_load_ps(sums + h * MAX_SIZE + i);
      high[h] = _mm512_load_ps(sums + h * MAX_SIZE + i + 16);
    }
    for (int64_t t = 0; t < count; t += 2) {
      const bf16* place = values.first + t * values.stride + i;
      const __m512i after = t + 1 < count ? _mm512_loadu_si512(place + values.stride) : _mm512_setzero_si512();
      const Pairs pairs = interleave(_mm512_loadu_si512(place), after);
#pragma GCC unroll 8
      for (int h = 0; h < SHARED; ++h) {
        low[h] = add_pairs(low[h], weights + h * KEYS + t, pairs.low);
        high[h] = add_pairs(high[h], weights + h * KEYS + t, pairs.high);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < SHARED; ++h) {
      _mm512_store_ps(sums + h * MAX_SIZE + i, low[h]);
      _mm512_store_ps(sums + h * MAX_SIZE + i + 16, high[h]);
    }
  }
}

template <int SHARED>
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
      for (int64_t g = 0; g < item.groups; ++g)
        score_strip<SHARED>(item.query + g * SHARED * size,
                            strip_at(c.keys, c, item, item.group + g, start + k, std::min(STRIP, count - k), s.gathered),
                            size, &s.scores[g * SHARED][k], ahead);
    }
    SoftmaxSum sums[MAX_SINGLES];
    for (int64_t row = 0; row < rows; ++row) {
      sums[row] = avx512::weigh(s.scores[row], begin, count, count, shape.scale * LOG2_E, s.weights[row]);
      std::memset(s.found[row], 0, size * sizeof(float));
    }
    for (int64_t k = first; k < count; k += STRIP) {
      const int64_t many = std::min(STRIP, count - k);
      Ahead ahead(c.values, c, item, start + k + 2 * STRIP, own.end);
      for (int64_t g = 0; g < item.groups; ++g)
        add_strip<SHARED>(&s.weights[g * SHARED][k],
                          strip_at(c.values, c, item, item.group + g, start + k, many, s.gathered), many, size,
                          s.found[g * SHARED], ahead);
    }
    for (int64_t row = 0; row < rows; ++row) avx512::merge(s.found[row], sums[row], size, s.so_far[row], s.sums[row]);
  }
  for (int64_t row = 0; row < rows; ++row)
    avx512::write_shares(s.sums[row], s.so_far[row].total, size, item.out + row * size);
}

}  // namespace slimpajama
#endif
