// The products behind the projections: on AVX-512 here, on AMX in `multiply_tiles.h`, on lanes in `multiply_lanes.h`;
// included by the file of each kind of number (`kinds.h`).
//
// Every path adds up along K in one order, alike for any number of rows, so that a row's result depends on
// nothing but the row and the weights.
#pragma once

#include "multiply_lanes.h"
#include "multiply_tiles.h"

namespace slimpajama {

#if HAS_X86
// Has meet(x, weights) called for the groups that are multiplied.
template <typename Kind, typename Meet>
AVX512 INLINE void each_meeting(int64_t groups, const Meet& meet) {
  if constexpr (Kind::HALVES) {
    for (int64_t begin = 0; begin < groups; begin += 2 * TILE_GROUPS)
      for (const auto [x, weights] : MEETINGS)
        for (int64_t g = begin; g < begin + TILE_GROUPS; ++g) meet(g + x * TILE_GROUPS, g + weights * TILE_GROUPS);
  } else {
    for (int64_t g = 0; g < groups; ++g) meet(g, g);
  }
}

// Finishes `count` rows' sums of panels side by side, from memory: there are too many to go on with each in a register.
template <typename Kind, int PANELS>
AVX512 __attribute__((noinline)) void finish_avx512(const uint8_t* sums, int64_t count, const Rows& x, const Weights& w,
                                                    const Output& given, int64_t row, int64_t first) {
  const Output out = given;
  typename Kind::Panel panels[PANELS];
  for (int j = 0; j < PANELS; ++j) panels[j] = Kind::panel(w, first + j * PANEL);
  for (const int64_t end = row + count; row < end; ++row, sums += PANELS * LINE) {
    __m512 results[PANELS];
    for (int j = 0; j < PANELS; ++j) results[j] = Kind::worth(Kind::load(sums + j * LINE), panels[j], x, row);
    avx512::put_panels(out, row, first, results);
  }
}

template <typename Kind, int ROWS, int PAIRS>
AVX512 inline void block_avx512(const Rows& x, const Weights& w, const Output& out, Fetching ahead, int64_t row,
                                int64_t pair) {
  typename Kind::Vector sums[ROWS][2 * PAIRS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] = typename Kind::Vector{};
  const uint8_t *values = x.row(row), *panels = w.panel(pair * 2);
  const uint8_t* next = w.panel((pair + PAIRS) * 2) + ahead.begin;
  const int64_t x_stride = x.stride, panel_stride = w.groups * LINE;
  each_meeting<Kind>(x.groups, [&](int64_t from, int64_t g) AVX512 INLINED {
    __m512i weights[2 * PAIRS];
    for (int j = 0; j < 2 * PAIRS; ++j) weights[j] = _mm512_loadu_si512(panels + j * panel_stride + g * LINE);
    if constexpr (ROWS > 1)
      for (int j = 0; j < 2 * PAIRS; ++j) __builtin_prefetch(next + j * panel_stride + g * ahead.step, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      int32_t group;
      std::memcpy(&group, values + i * x_stride + 4 * from, 4);
      const __m512i broadcast = _mm512_set1_epi32(group);
#pragma GCC unroll 8
      for (int j = 0; j < 2 * PAIRS; ++j) sums[i][j] = Kind::add(sums[i][j], broadcast, weights[j]);
    }
  });
  alignas(64) uint8_t kept[ROWS][2 * PAIRS * LINE];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * PAIRS; ++j) std::memcpy(kept[i] + j * LINE, &sums[i][j], LINE);
  finish_avx512<Kind, 2 * PAIRS>(kept[0], ROWS, x, w, out, row, pair * 2 * PANEL);
}

// A block of `count` rows, of ROWS at most.
template <typename Kind, int ROWS, int PAIRS>
AVX512 void block_of_avx512(int64_t count, const Rows& x, const Weights& w, const Output& out, Fetching ahead,
                            int64_t row, int64_t pair) {
  if (count == ROWS) block_avx512<Kind, ROWS, PAIRS>(x, w, out, ahead, row, pair);
  else if constexpr (ROWS > 1) block_of_avx512<Kind, ROWS - 1, PAIRS>(count, x, w, out, ahead, row, pair);
}

constexpr int MOST_SUMS = 24;  // of the 32 registers

template <typename Kind, int PAIRS>
AVX512 void rows_avx512(const Rows& x, const Weights& w, const Output& out, int64_t pair) {
  constexpr int TALL = MOST_SUMS / (2 * PAIRS), HALF = TALL - 2;
  int64_t row = 0;
  // A low block waits for its own sums: two of medium height are better than a high one and a low one.
  const int64_t high = x.m % TALL == 0 || x.m % TALL > 2 || x.m < 2 * HALF ? x.m : x.m - 2 * HALF;
  int64_t block = 0;
  const int64_t blocks = (x.m + TALL - 1) / TALL;
  const auto ahead = [&] { return Fetching::share_of(block++, blocks, x.groups); };
  for (; row + TALL <= high; row += TALL) block_avx512<Kind, TALL, PAIRS>(x, w, out, ahead(), row, pair);
  for (; row + HALF <= x.m; row += HALF) block_avx512<Kind, HALF, PAIRS>(x, w, out, ahead(), row, pair);
  block_of_avx512<Kind, HALF - 1, PAIRS>(x.m - row, x, w, out, ahead(), row, pair);
}

// As few blocks as there can be, and alike: while few rows meet the weights, it is memory that sets the pace, and it is
// never left waiting where each block takes as long to multiply as its share takes to be fetched.
template <typename Kind>
AVX512 void few_rows_avx512(const Rows& x, const Weights& w, const Output& out, int64_t pair) {
  constexpr int TALL = MOST_SUMS / 2;
  const int64_t blocks = (x.m + TALL - 1) / TALL;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = x.m * block / blocks, next = x.m * (block + 1) / blocks;
    block_of_avx512<Kind, TALL, 1>(next - row, x, w, out, Fetching::share_of(block, blocks, x.groups), row, pair);
  }
}

template <typename Kind>
AVX512 void multiply_avx512(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  int64_t pair = begin;
  if (x.m == 1) {  // as many panels side by side as leave the reading of memory little to wait for
    for (; pair + 4 <= end; pair += 4) block_avx512<Kind, 1, 4>(x, w, out, {}, 0, pair);
    for (; pair + 2 <= end; pair += 2) block_avx512<Kind, 1, 2>(x, w, out, {}, 0, pair);
  }
  if (x.m <= MOST_SUMS)
    for (; pair < end; ++pair) few_rows_avx512<Kind>(x, w, out, pair);
  for (; pair + 2 <= end; pair += 2) rows_avx512<Kind, 2>(x, w, out, pair);
  for (; pair < end; ++pair) rows_avx512<Kind, 1>(x, w, out, pair);
}

#endif

template <typename Kind>
void multiply(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
#if HAS_X86
  if constexpr (Kind::TILES)
    if (instructions() == Instructions::amx) return multiply_amx<Kind>(x, w, out, begin, end);
  if (has_avx512()) return multiply_avx512<Kind>(x, w, out, begin, end);
#endif
  if constexpr (!Kind::HALVES) multiply_lanes<Kind>(x, w, out, begin, end);  // halves: see EncoderLayers::run
}

}  // namespace slimpajama
