// The products of `multiply.h` on AMX: 32 rows by a pair of panels at a time, whose sums are four tiles.
#pragma once

#include "kinds.h"

#if HAS_X86
namespace slimpajama {

// A block's sums as the tiles leave them, and the place of their results.
struct alignas(64) TileSums {
  uint8_t sums[32][2 * LINE];
  int64_t row = 0, count = 0, pair = 0;
};

// Finishes the sums of the rows from `begin` to before `end`.
template <typename Kind>
AMX INLINE void finish(const TileSums& done, const Rows& x, const Weights& w, const Output& out, int64_t begin,
                       int64_t end) {
  const int64_t first = done.pair * 2 * PANEL, second = first + PANEL;
  const auto left = Kind::panel(w, first), right = Kind::panel(w, second);
  const bool plain = out.is_plain() && first + 2 * PANEL <= out.n, biased = out.bias != nullptr;
  const __m512 left_bias = plain && biased ? avx512::widen(out.bias + first) : avx512::zeros();
  const __m512 right_bias = plain && biased ? avx512::widen(out.bias + second) : avx512::zeros();
  for (int64_t i = begin; i < std::min(end, done.count); ++i) {
    const int64_t row = done.row + i;
    __m512 a = Kind::worth(Kind::load(done.sums[i]), left, x, row);
    __m512 b = Kind::worth(Kind::load(done.sums[i] + LINE), right, x, row);
    if (plain) {
      if (biased) a = a + left_bias, b = b + right_bias;
      _mm512_storeu_si512(out.narrow + row * out.stride + first, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    } else {
      __m512 both[] = {a, b};
      avx512::put_panels(out, row, first, both);
    }
  }
}

// A part of K, in steps: a tile each, or two of `Halves`.
struct Stretch {
  int64_t begin, end;
};

// What is fetched of weights that are wanted soon, with every step.
struct FetchingPair {
  const uint8_t *left, *right;
  int64_t each;  // bytes of either

  // Of the pair's own weights, a little ahead of those that are multiplied; `step` of bytes.
  static FetchingPair passing_by(const Weights& w, int64_t pair, int64_t step) {
    const uint8_t* next = w.panel(pair * 2) + 2 * step;
    return {next, next + w.groups * LINE, step};
  }

  // Of a part of a pair's weights from `next` on, the share of one of the blocks that go before.
  static FetchingPair share_of(const uint8_t* next, const Weights& w, int64_t block, int64_t blocks, Stretch part,
                               int64_t step) {
    const int64_t share = padded(step / blocks, LINE);
    const uint8_t* own = next + block * (part.end - part.begin) * share;
    return {own, own + w.groups * LINE, block * share < step ? share : 0};
  }
};

// A tile of weights; where they are `PASSING`, the core's first cache keeps what it has of x instead of them.
template <int TILE, bool PASSING>
AMX INLINE void load_weights(const uint8_t* tile) {
  if constexpr (PASSING) asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(tile), "r"(LINE));
  else asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(tile), "r"(LINE));
}

template <typename Kind>
constexpr int64_t TILES_A_STEP = Kind::HALVES ? 2 : 1;

// Where a block's tiles come from: rows of x (16 of them, then the others) and weights (left and right panel).
struct TileSources {
  const uint8_t *upper, *lower, *left, *right;
  int64_t stride;  // from row to row

  TileSources at(int64_t x_tile, int64_t weights_tile) const {
    return {upper + x_tile * LINE, lower + x_tile * LINE, left + weights_tile * TILE_BYTES,
            right + weights_tile * TILE_BYTES, stride};
  }
};

// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights, which are there already where they are not loaded ANEW.
template <typename Kind, bool TWO, bool PASSING, bool ANEW>
AMX INLINE void meet_tiles(const TileSources& from) {
  if constexpr (ANEW) load_weights<6, PASSING>(from.left);
  _tile_loadd(4, from.upper, from.stride);
  Kind::template tiles<0, 4, 6>();
  if constexpr (ANEW) load_weights<7, PASSING>(from.right);
  Kind::template tiles<1, 4, 7>();
  if constexpr (TWO) {
    _tile_loadd(5, from.lower, from.stride);
    Kind::template tiles<2, 5, 6>();
    Kind::template tiles<3, 5, 7>();
  }
}

template <typename Kind, bool TWO, bool PASSING>
AMX INLINE void step_amx(const TileSources& from, int64_t step) {
  if constexpr (Kind::HALVES) {
    constexpr auto first = MEETINGS[0], second = MEETINGS[1], third = MEETINGS[2];
    static_assert(second.weights == third.weights);
    meet_tiles<Kind, TWO, PASSING, true>(from.at(2 * step + first.x, 2 * step + first.weights));
    meet_tiles<Kind, TWO, PASSING, true>(from.at(2 * step + second.x, 2 * step + second.weights));
    meet_tiles<Kind, TWO, PASSING, false>(from.at(2 * step + third.x, 2 * step + third.weights));
  } else {
    meet_tiles<Kind, TWO, PASSING, true>(from.at(step, step));
  }
}

// Adds a part's products to a block's sums. Between its steps the block before it is finished.
template <typename Kind, bool TWO, bool PASSING>
AMX INLINE void block_amx(const Rows& x, const Weights& w, const Output& out, const TileSums& before, TileSums& own,
                          FetchingPair ahead, Stretch part) {
  const TileSources from{x.row(own.row), x.row(own.row + 16), w.panel(own.pair * 2), w.panel(own.pair * 2 + 1),
                         x.stride};
  const int64_t steps = part.end - part.begin, rows = (31 + steps) / steps;
  if (part.begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    if (TWO) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, own.sums[0], 2 * LINE);
    _tile_loadd(1, own.sums[0] + LINE, 2 * LINE);
    if (TWO) {
      _tile_loadd(2, own.sums[16], 2 * LINE);
      _tile_loadd(3, own.sums[16] + LINE, 2 * LINE);
    }
  }
  for (int64_t done = 0; done < steps; ++done) {
    step_amx<Kind, TWO, PASSING>(from, part.begin + done);
    for (int64_t i = done * ahead.each; i < (done + 1) * ahead.each; i += LINE) {
      __builtin_prefetch(ahead.left + i, 0, 2);
      __builtin_prefetch(ahead.right + i, 0, 2);
    }
    finish<Kind>(before, x, w, out, done * rows, (done + 1) * rows);
  }
  _tile_stored(0, own.sums[0], 2 * LINE);
  _tile_stored(1, own.sums[0] + LINE, 2 * LINE);
  if (TWO) {
    _tile_stored(2, own.sums[16], 2 * LINE);
    _tile_stored(3, own.sums[16] + LINE, 2 * LINE);
  }
}

// How the products go through a core's caches: by `group` pairs, whose weights stay in the second cache until `blocks`
// of rows (or all there are) have met them, through K in `parts`.
struct Passage {
  int64_t group, parts, blocks;
  bool passing;  // whether 32 rows, as far as a part goes, stay in the first cache while weights pass it by
};

inline Passage passage_for(const Rows& x, const Weights& w) {
  constexpr int64_t FIRST_CACHE_BYTES = 40 << 10;  // of 48 KiB, what is left beside sums and results
  constexpr int64_t CACHED_BYTES = 1 << 18, FEW_PAIRS = 4;
  constexpr int64_t MOST_BLOCKS = 16;  // whose sums are kept from part to part
  const int64_t pair_bytes = 2 * w.groups * LINE, rows_bytes = std::min<int64_t>(x.m, 32) * x.groups * 4;
  if (x.m > 64 && pair_bytes > CACHED_BYTES)  // no cache would keep even one pair's weights, and the rows
    return {FEW_PAIRS, (rows_bytes + FIRST_CACHE_BYTES - 1) / FIRST_CACHE_BYTES, MOST_BLOCKS, true};
  const int64_t all = (x.m + 31) / 32;
  return {std::max<int64_t>(1, CACHED_BYTES / pair_bytes), 1, all, rows_bytes <= FIRST_CACHE_BYTES};
}

// 32 rows at a time; meanwhile the weights that are next are fetched.
template <typename Kind, bool PASSING>
AMX void blocks_amx(const Rows& x, const Weights& w, const Output& given, int64_t begin, int64_t end, Passage passage) {
  static thread_local Kept<TileSums> kept;
  const Output out = given;
  constexpr int64_t STEP = TILES_A_STEP<Kind> * TILE_BYTES;
  const int64_t steps = x.groups / (TILES_A_STEP<Kind> * TILE_GROUPS), all = (x.m + 31) / 32;
  // One more than are begun before the first is done: the last of them is finished while the next begin.
  const int64_t places = passage.parts == 1 ? 2 : passage.group * std::min(all, passage.blocks) + 1;
  TileSums* const sums = grown(kept, places);
  TileSums none, *before = &none;
  int64_t shape = 0, turn = 0;
  const int64_t rounds = (all + passage.blocks - 1) / passage.blocks;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t base = all * round / rounds, blocks = all * (round + 1) / rounds - base;
    for (int64_t first = begin; first < end; first += passage.group) {
      const int64_t last = std::min(first + passage.group, end), origin = turn;
      for (int64_t index = 0; index < passage.parts; ++index) {
        const Stretch part{steps * index / passage.parts, steps * (index + 1) / passage.parts};
        const bool final = index + 1 == passage.parts;
        turn = origin;
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t row = 32 * (base + block), count = std::min<int64_t>(32, x.m - row);
          if (count != shape) configure_tiles(std::min<int64_t>(count, 16), count > 16 ? count - 16 : 16);
          shape = count;
          for (int64_t pair = first; pair < last; ++pair) {
            TileSums& own = sums[turn];
            turn = turn + 1 == places ? 0 : turn + 1;
            own.row = row, own.count = count, own.pair = pair;
            // With one block the weights pass by; with more, each fetches a share of those that come next.
            const uint8_t* next =
                final ? w.panel((pair + passage.group) * 2) : w.panel(pair * 2) + part.end * STEP;
            const FetchingPair ahead = all == 1 ? FetchingPair::passing_by(w, pair, STEP)
                                                : FetchingPair::share_of(next, w, block, blocks, part, STEP);
            if (count > 16) block_amx<Kind, true, PASSING>(x, w, out, *before, own, ahead, part);
            else block_amx<Kind, false, PASSING>(x, w, out, *before, own, ahead, part);
            before = final ? &own : &none;
          }
        }
      }
    }
  }
  finish<Kind>(*before, x, w, out, 0, 32);
  release_tiles();
}

template <typename Kind>
AMX void multiply_amx(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  if (x.m == 0) return;
  const Passage passage = passage_for(x, w);
  if (passage.passing) blocks_amx<Kind, true>(x, w, out, begin, end, passage);
  else blocks_amx<Kind, false>(x, w, out, begin, end, passage);
}

}  // namespace slimpajama
#endif
