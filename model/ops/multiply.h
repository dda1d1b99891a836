// The products behind the projections, on AMX, on AVX-512 and in plain loops; included by the file of each kind of
// number (`kinds.h`).
//
// Every path walks over all of K in one order and alike for any number of rows, so that a row's result depends on
// nothing but the row and the weights.
#pragma once

#include "kinds.h"

namespace slimpajama {

template <typename Kind>
void multiply_plain(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair)
    for (int64_t row = 0; row < x.m; ++row) {
      typename Kind::Number sums[2 * PANEL] = {};
      for (int64_t j = 0; j < 2 * PANEL; ++j) {
        const uint8_t* lane = w.panel(pair * 2 + j / PANEL) + j % PANEL * 4;
        for (int64_t g = 0; g < x.groups; ++g) Kind::add(sums[j], x.row(row) + 4 * g, lane + g * LINE);
      }
      float results[2 * PANEL];
      for (int64_t j = 0; j < 2 * PANEL; ++j) results[j] = Kind::worth(sums[j], x, w, row, pair * 2 * PANEL + j);
      out.store(row, pair, results);
    }
}

#if HAS_X86
template <typename Kind, int ROWS, int PAIRS>
AVX512 inline void block_avx512(const Rows& x, const Weights& w, const Output& out, int64_t row, int64_t pair) {
  typename Kind::Vector sums[ROWS][2 * PAIRS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] = typename Kind::Vector{};
  const uint8_t *values = x.row(row), *panels = w.panel(pair * 2);
  const int64_t x_stride = x.stride, panel_stride = w.groups * LINE;
  for (int64_t g = 0; g < x.groups; ++g) {
    __m512i weights[2 * PAIRS];
    for (int j = 0; j < 2 * PAIRS; ++j) weights[j] = _mm512_loadu_si512(panels + j * panel_stride + g * LINE);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      int32_t group;
      std::memcpy(&group, values + i * x_stride + 4 * g, 4);
      const __m512i broadcast = _mm512_set1_epi32(group);
#pragma GCC unroll 4
      for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] = Kind::add(sums[i][j], broadcast, weights[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < PAIRS; ++j)
      out.store(row + i, pair + j, Kind::worth(sums[i][2 * j], x, w, row + i, (pair + j) * 2 * PANEL),
                Kind::worth(sums[i][2 * j + 1], x, w, row + i, ((pair + j) * 2 + 1) * PANEL));
}

template <typename Kind, int ROWS, int PAIRS>
AVX512 void last_rows_avx512(const Rows& x, const Weights& w, const Output& out, int64_t row, int64_t pair) {
  if (x.m - row == ROWS) block_avx512<Kind, ROWS, PAIRS>(x, w, out, row, pair);
  else if constexpr (ROWS > 1) last_rows_avx512<Kind, ROWS - 1, PAIRS>(x, w, out, row, pair);
}

template <typename Kind, int PAIRS>
AVX512 void rows_avx512(const Rows& x, const Weights& w, const Output& out, int64_t pair) {
  constexpr int TALL = 12 / PAIRS, HALF = TALL - 2;  // 24 of the 32 registers hold sums
  int64_t row = 0;
  // A low block waits for its own sums: two of medium height are better than a high one and a low one.
  const int64_t high = x.m % TALL == 0 || x.m % TALL > 2 || x.m < 2 * HALF ? x.m : x.m - 2 * HALF;
  for (; row + TALL <= high; row += TALL) block_avx512<Kind, TALL, PAIRS>(x, w, out, row, pair);
  for (; row + HALF <= x.m; row += HALF) block_avx512<Kind, HALF, PAIRS>(x, w, out, row, pair);
  last_rows_avx512<Kind, HALF - 1, PAIRS>(x, w, out, row, pair);
}

template <typename Kind>
AVX512 void multiply_avx512(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  int64_t pair = begin;
  for (; pair + 2 <= end; pair += 2) rows_avx512<Kind, 2>(x, w, out, pair);
  for (; pair < end; ++pair) rows_avx512<Kind, 1>(x, w, out, pair);
}

// Tiles 0 to 3 are sums, 4 and 5 rows of x (16 of them, then the others), 6 and 7 weights (left and right panel).
template <typename Kind, bool TWO>
AMX inline void block_amx(const Rows& x, const Weights& w, const Output& out, int64_t row, int64_t count,
                          int64_t pair) {
  const uint8_t *upper = x.row(row), *lower = x.row(row + 16), *left = w.panel(pair * 2), *right = w.panel(pair * 2 + 1);
  const int64_t stride = x.stride;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < x.groups / TILE_GROUPS; ++step) {
    _tile_loadd(6, left + step * TILE_BYTES, LINE);
    _tile_loadd(4, upper + step * LINE, stride);
    Kind::template tiles<0, 4, 6>();
    _tile_loadd(7, right + step * TILE_BYTES, LINE);
    Kind::template tiles<1, 4, 7>();
    if (TWO) {
      _tile_loadd(5, lower + step * LINE, stride);
      Kind::template tiles<2, 5, 6>();
      Kind::template tiles<3, 5, 7>();
    }
  }
  alignas(64) uint8_t sums[32][2 * LINE];
  _tile_stored(0, sums[0], 2 * LINE);
  _tile_stored(1, sums[0] + LINE, 2 * LINE);
  if (TWO) {
    _tile_stored(2, sums[16], 2 * LINE);
    _tile_stored(3, sums[16] + LINE, 2 * LINE);
  }
  for (int64_t i = 0; i < count; ++i)
    out.store(row + i, pair, Kind::worth(Kind::load(sums[i]), x, w, row + i, pair * 2 * PANEL),
              Kind::worth(Kind::load(sums[i] + LINE), x, w, row + i, (pair * 2 + 1) * PANEL));
}

// 32 rows at a time. The weights of a few pairs stay in the core's cache until all rows have met them.
template <typename Kind>
AMX void multiply_amx(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  constexpr int64_t CACHED_BYTES = 1 << 20;
  const int64_t group = std::max<int64_t>(1, CACHED_BYTES / (2 * w.groups * LINE));
  const int64_t whole = x.m / 32 * 32, rest = x.m - whole;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = std::min(first + group, end);
    if (whole) {
      configure_tiles(16, 16);
      for (int64_t row = 0; row < whole; row += 32)
        for (int64_t pair = first; pair < last; ++pair) block_amx<Kind, true>(x, w, out, row, 32, pair);
    }
    if (rest > 16) {
      configure_tiles(16, rest - 16);
      for (int64_t pair = first; pair < last; ++pair) block_amx<Kind, true>(x, w, out, whole, rest, pair);
    } else if (rest) {
      configure_tiles(rest, 16);
      for (int64_t pair = first; pair < last; ++pair) block_amx<Kind, false>(x, w, out, whole, rest, pair);
    }
  }
  release_tiles();
}
#endif

template <typename Kind>
void multiply(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
#if HAS_X86
  if constexpr (Kind::TILES)
    if (instructions() == Instructions::amx) return multiply_amx<Kind>(x, w, out, begin, end);
  if (has_avx512()) return multiply_avx512<Kind>(x, w, out, begin, end);
#endif
  multiply_plain<Kind>(x, w, out, begin, end);
}

}  // namespace slimpajama
