// The two products of attention over a block of up to 256 keys: scores of up to 16 rows of queries, and values by the
// weights that the scores have become. On AMX tiles, on AVX-512 and on lanes; each adds up every row in one order,
// whatever the rows beside it are.
#pragma once

#include "attention_block.h"
#include "multiply.h"
#include "tiles.h"

namespace slimpajama {

#if HAS_X86

struct OnTiles {
  using Number = bf16;
  static constexpr auto weigh = avx512::weigh<bf16>;
  static constexpr auto multiply_each = [](const float* factors, int64_t count, auto* values) {
    avx512::multiply_each(factors, count, values);
  };
  static constexpr auto merge = avx512::merge;
  static constexpr auto write_shares = avx512::write_shares;
  static constexpr bool WHOLE_SETS = true;  // all 16 rows are computed, whether they are asked for or not

  AMX static void begin() { configure_tiles(16, 16); }
  AMX static void end() { release_tiles(); }

  // Scores of a set's rows and `count` keys (to the next 32). Tiles 4 and 5 hold queries, 6 and 7 keys, 0 and 1 scores.
  AMX static void score(const bf16* queries, int64_t size, int64_t, int64_t count, Scratch<bf16>& s) {
    for (int64_t k = 0; k < count; k += 32) {
      const bf16 *left = s.keys[k / STRIP], *right = s.keys[k / STRIP + 1];
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t i = 0; i < size; i += 32) {
        _tile_loadd(4, queries + i, size * 2);
        _tile_loadd(6, left + i * STRIP, LINE);
        _tile_loadd(7, right + i * STRIP, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, &s.scores[0][k], KEYS * 4);
      _tile_stored(1, &s.scores[0][k + 16], KEYS * 4);
    }
  }

  // The block's values by their weights (to the next 32). Tiles 0 to 3 are sums of 16 dimensions each, 4 weights, 6 and
  // 7 values.
  AMX static void weighted_values(int64_t size, int64_t, int64_t count, Scratch<bf16>& s) {
    for (int64_t i = 0; i < size; i += 64) {
      const bf16* values = s.values + i * KEYS;
      const bool whole = size - i >= 64;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < count; k += 32) {
        const bf16* step = values + k * 16;
        _tile_loadd(4, &s.weights[0][k], KEYS * 2);
        _tile_loadd(6, step, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, step + 16 * KEYS, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (whole) {
          _tile_loadd(6, step + 32 * KEYS, LINE);
          _tile_dpbf16ps(2, 4, 6);
          _tile_loadd(7, step + 48 * KEYS, LINE);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
      _tile_stored(0, &s.found[0][i], MAX_SIZE * 4);
      _tile_stored(1, &s.found[0][i + 16], MAX_SIZE * 4);
      if (whole) {
        _tile_stored(2, &s.found[0][i + 32], MAX_SIZE * 4);
        _tile_stored(3, &s.found[0][i + 48], MAX_SIZE * 4);
      }
    }
  }
};

// --- on vectors: H rows by P panels of 16 results at a time, 24 of the 32 registers being their sums

constexpr int HEIGHT = 6, WIDTH = 4;

using avx512::add_pairs;

template <int H, int P>
AVX512 inline void clear(__m512 (&sums)[H][P]) {
#pragma GCC unroll 6
  for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_ps();
}

// Adds `pairs` pairs of numbers of each row times their line in each panel.
template <int H, int P>
AVX512 inline void add_up(__m512 (&sums)[H][P], const bf16* rows, int64_t row_stride, const bf16* const (&panels)[P],
                          int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i lines[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) lines[p] = _mm512_loadu_si512(panels[p] + 32 * pair);
#pragma GCC unroll 6
    for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[r][p] = add_pairs(sums[r][p], rows + r * row_stride + 2 * pair, lines[p]);
  }
}

template <int H, int P>
AVX512 inline void store(const __m512 (&sums)[H][P], float* target, int64_t stride) {
#pragma GCC unroll 6
  for (int r = 0; r < H; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) _mm512_store_ps(target + r * stride + 16 * p, sums[r][p]);
}

template <int P, int H, typename Product>
AVX512 void last_rows(const Product& product, int64_t row, int64_t rows, int64_t panel) {
  if (rows - row == H) product.template compute<H, P>(row, panel);
  else if constexpr (H > 1) last_rows<P, H - 1>(product, row, rows, panel);
}

template <int P, typename Product>
AVX512 void all_rows(const Product& product, int64_t rows, int64_t panel) {
  int64_t row = 0;
  for (; row + HEIGHT <= rows; row += HEIGHT) product.template compute<HEIGHT, P>(row, panel);
  last_rows<P, HEIGHT - 1>(product, row, rows, panel);
}

template <typename Product>
AVX512 void cover(const Product& product, int64_t rows, int64_t panels) {
  int64_t panel = 0;
  for (; panel + WIDTH <= panels; panel += WIDTH) all_rows<WIDTH>(product, rows, panel);
  for (; panel + 2 <= panels; panel += 2) all_rows<2>(product, rows, panel);
  if (panel < panels) all_rows<1>(product, rows, panel);
}

struct Scores {
  const bf16* queries;
  int64_t size;
  Scratch<bf16>& s;

  template <int H, int P>
  AVX512 void compute(int64_t row, int64_t panel) const {
    __m512 sums[H][P];
    clear(sums);
    const bf16* strips[P];
    std::copy_n(s.keys + panel, P, strips);
    add_up(sums, queries + row * size, size, strips, size / 2);
    store(sums, &s.scores[row][panel * 16], KEYS);
  }
};

struct WeightedValues {
  int64_t size, count;
  Scratch<bf16>& s;

  template <int H, int P>
  AVX512 void compute(int64_t row, int64_t panel) const {
    __m512 sums[H][P];
    clear(sums);
    const bf16* panels[P];
    for (int p = 0; p < P; ++p) panels[p] = s.values + (panel + p) * 16 * KEYS;
    add_up(sums, s.weights[row], KEYS, panels, (count + 31) / 32 * 16);
    store(sums, &s.found[row][panel * 16], MAX_SIZE);
  }
};

struct OnVectors {
  using Number = bf16;
  static constexpr auto weigh = avx512::weigh<bf16>;
  static constexpr auto multiply_each = [](const float* factors, int64_t count, auto* values) {
    avx512::multiply_each(factors, count, values);
  };
  static constexpr auto merge = avx512::merge;
  static constexpr auto write_shares = avx512::write_shares;
  static constexpr bool WHOLE_SETS = false;

  static void begin() {}
  static void end() {}

  // Scores of the first `rows` of a set and `count` keys (to the next 16).
  AVX512 static void score(const bf16* queries, int64_t size, int64_t rows, int64_t count, Scratch<bf16>& s) {
    cover(Scores{queries, size, s}, rows, (count + 15) / 16);
  }

  // The block's values by their weights (to the next 32), for the first `rows`.
  AVX512 static void weighted_values(int64_t size, int64_t rows, int64_t count, Scratch<bf16>& s) {
    cover(WeightedValues{size, count, s}, rows, size / 16);
  }
};

#endif

// Keys and values are lines as packed weights have them, so that the projections' products make both.
struct OnLanes {
  using Number = float;
  static constexpr auto weigh = lanes::weigh<float>;
  static constexpr auto multiply_each = lanes::multiply_each<float>;
  static constexpr auto merge = lanes::merge;
  static constexpr auto write_shares = lanes::write_shares;
  static constexpr bool WHOLE_SETS = false;

  static void begin() {}
  static void end() {}

  static void score(const float* queries, int64_t size, int64_t rows, int64_t count, Scratch<float>& s) {
    for (int64_t k = 0; k < count; k += STRIP)
      multiply_opened<Bf16>({nullptr, rows, size / 2}, {bytes(queries), size * 4}, {bytes(s.keys[k / STRIP]), size / 2},
                            to(s.scores[0] + k, KEYS), 0, rows, 0, 1);
  }

  static void weighted_values(int64_t size, int64_t rows, int64_t count, Scratch<float>& s) {
    const Weights values{bytes(s.values), KEYS / 2};
    multiply_opened<Bf16>({nullptr, rows, (count + 1) / 2}, {bytes(s.weights[0]), KEYS * 4}, values,
                          to(s.found[0], MAX_SIZE), 0, rows, 0, size / 16);
  }

 private:
  template <typename Value>
  static const uint8_t* bytes(const Value* values) { return reinterpret_cast<const uint8_t*>(values); }
  static Output to(float* target, int64_t width) { return {target, nullptr, nullptr, width}; }
};

}  // namespace slimpajama
