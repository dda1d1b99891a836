// The products behind the projections, on AMX, on AVX-512 and on lanes; included by the file of each kind of
// number (`kinds.h`).
//
// Every path adds up along K in one order, alike for any number of rows, so that a row's result depends on
// nothing but the row and the weights.
#pragma once

#include "kinds.h"

namespace slimpajama {

// --- on lanes

struct OpenedRows {
  const uint8_t* values;
  int64_t stride;  // bytes from row to row
};

// What a block has fetched of the panels after its own, a line's part with every group, while it multiplies.
struct Fetching {
  int64_t begin, step;  // bytes
};

// `count` rows of x with every 32 bits opened (`kinds.h`): what every block of panels would do again.
template <typename Kind>
OpenedRows open_rows(const Rows& x, int64_t first, int64_t count) {
  if constexpr (Kind::OPENED == 1) {
    return {x.row(first), x.stride};
  } else {
    static thread_local Kept<uint32_t> kept;
    const int64_t width = x.groups * Kind::OPENED;
    uint32_t* numbers = grown(kept, count * width);
    for (int64_t row = 0; row < count; ++row) Kind::open_x(x.row(first + row), x.groups, numbers + row * width);
    return {reinterpret_cast<const uint8_t*>(numbers), width * 4};
  }
}

// ROWS rows by PANELS panels.
template <typename Kind, int ROWS, int PANELS>
LANES void block_lanes(const Rows& x, OpenedRows rows, Fetching ahead, const Weights& w, const Output& out, int64_t row,
                       int64_t panel) {
  using lanes::PARTS;
  typename Kind::Lanes sums[ROWS][PANELS] = {};
  const uint8_t* lines = w.panel(panel);
  const int64_t panel_stride = w.groups * LINE;
  const uint8_t* next = w.panel(panel + PANELS) + ahead.begin;
  for (int64_t g = 0; g < x.groups; ++g) {
    if constexpr (ROWS > 1)  // with one row there is nothing to do meanwhile
      for (int j = 0; j < PANELS; ++j) __builtin_prefetch(next + j * panel_stride + g * ahead.step);
#pragma GCC unroll 2
    for (int number = 0; number < Kind::OPENED; ++number) {
      asm volatile("" : : : "memory");  // lines are read anew: kept for the next number they would cost registers
      typename Kind::Lanes weights[PANELS];
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j)
        EACH_PART {
          const uint8_t* line = lines + j * panel_stride + g * LINE + p * lanes::REGISTER;
          weights[j].part[p] = Kind::open_weights(lanes::part_at<lanes::IntPart>(line), number);
        }
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        typename Kind::Lane value;
        std::memcpy(&value, rows.values + i * rows.stride + (g * Kind::OPENED + number) * 4, 4);
        const auto broadcast = lanes::part_of(value);
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; ++j)
          EACH_PART lanes::add_product(sums[i][j].part[p], broadcast, weights[j].part[p]);
      }
    }
  }
  typename Kind::Lanes finished[ROWS][PANELS];
  std::memcpy(finished, sums, sizeof sums);
  asm volatile("" : : "r"(finished) : "memory");  // calls would take registers from the sums, in the loop too
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS; ++j) {
      const int64_t first = (panel + j) * PANEL;
      lanes::put_panel(out, row + i, first, Kind::worth(finished[i][j], x, w, row + i, first));
    }
}

template <typename Kind, int ROWS, int PANELS>
LANES void panels_lanes(const Rows& x, OpenedRows rows, Fetching ahead, const Weights& w, const Output& out, int64_t row,
                        int64_t panel, int64_t end) {
  for (; panel + PANELS <= end; panel += PANELS) block_lanes<Kind, ROWS, PANELS>(x, rows, ahead, w, out, row, panel);
  if constexpr (PANELS > 1) panels_lanes<Kind, ROWS, PANELS / 2>(x, rows, ahead, w, out, row, panel, end);
}

// `count` rows from `first` on, by the panels from `begin` to `end`.
template <typename Kind>
LANES void multiply_opened(const Rows& x, OpenedRows rows, const Weights& w, const Output& out, int64_t first,
                           int64_t count, int64_t begin, int64_t end) {
  // As many panels at a time as leave the sums enough registers, and enough sums that none is waited for.
  constexpr decltype(&panels_lanes<Kind, 1, 1>) OF_HEIGHT[] = {
      panels_lanes<Kind, 1, 4>, panels_lanes<Kind, 2, 2>, panels_lanes<Kind, 3, 2>,
      panels_lanes<Kind, 4, 1>, panels_lanes<Kind, 5, 1>, panels_lanes<Kind, 6, 1>};
  constexpr int64_t HIGH = std::size(OF_HEIGHT);
  const int64_t blocks = (count + HIGH - 1) / HIGH;
  const int64_t together = blocks == 1 ? end - begin : 1;  // a panel stays in the cache until all rows have met it
  const int64_t sharing = std::min<int64_t>(blocks, 4);
  for (int64_t panel = begin; panel < end; panel += together)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = count * block / blocks, height = count * (block + 1) / blocks - row;
      const Fetching ahead = block < sharing ? Fetching{block * x.groups * LINE / sharing, LINE / sharing} : Fetching{};
      OF_HEIGHT[height - 1](x, {rows.values + row * rows.stride, rows.stride}, ahead, w, out, first + row, panel,
                            panel + together);
    }
}

template <typename Kind>
LANES void multiply_lanes(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  constexpr int64_t MOST = 120;  // rows whose opened x stays in the cache
  const int64_t parts = (x.m + MOST - 1) / MOST;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = x.m * part / parts, count = x.m * (part + 1) / parts - first;
    multiply_opened<Kind>(x, open_rows<Kind>(x, first, count), w, out, first, count, 2 * begin, 2 * end);
  }
}

#if HAS_X86
// Which halves of x and of weights (`Halves`) meet, 0 the nearest and 1 the rests; those of the same weights in turn.
struct Meeting {
  int x, weights;
};
constexpr Meeting MEETINGS[] = {{0, 1}, {0, 0}, {1, 0}};

// --- on AVX-512

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
#pragma GCC unroll 8
  for (int j = 0; j < 2 * PAIRS; ++j) {
    const int64_t first = (pair * 2 + j) * PANEL;
    const auto panel = Kind::panel(w, first);
    const bool plain = out.is_plain() && first + PANEL <= out.n;
    const __m512 bias = plain && out.bias ? avx512::widen(out.bias + first) : avx512::zeros();
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i) {
      const __m512 result = Kind::worth(sums[i][j], panel, x, row + i);
      if (plain) avx512::narrow(out.narrow + (row + i) * out.stride + first, result + bias);
      else avx512::put_panel(out, row + i, first, result);
    }
  }
}

template <typename Kind, int ROWS, int PAIRS>
AVX512 void last_rows_avx512(const Rows& x, const Weights& w, const Output& out, Fetching ahead, int64_t row,
                             int64_t pair) {
  if (x.m - row == ROWS) block_avx512<Kind, ROWS, PAIRS>(x, w, out, ahead, row, pair);
  else if constexpr (ROWS > 1) last_rows_avx512<Kind, ROWS - 1, PAIRS>(x, w, out, ahead, row, pair);
}

template <typename Kind, int PAIRS>
AVX512 void rows_avx512(const Rows& x, const Weights& w, const Output& out, int64_t pair) {
  constexpr int TALL = 12 / PAIRS, HALF = TALL - 2;  // 24 of the 32 registers hold sums
  int64_t row = 0;
  // A low block waits for its own sums: two of medium height are better than a high one and a low one.
  const int64_t high = x.m % TALL == 0 || x.m % TALL > 2 || x.m < 2 * HALF ? x.m : x.m - 2 * HALF;
  // The first blocks share the fetching of the next panels; to one block alone the processor's own comes early enough.
  int64_t block = 0;
  const int64_t sharing = std::clamp<int64_t>((x.m + TALL - 1) / TALL, 1, 4);
  const auto ahead = [&] {
    const Fetching own{block * x.groups * LINE / sharing, LINE / sharing};
    return sharing > 1 && block++ < sharing ? own : Fetching{};
  };
  for (; row + TALL <= high; row += TALL) block_avx512<Kind, TALL, PAIRS>(x, w, out, ahead(), row, pair);
  for (; row + HALF <= x.m; row += HALF) block_avx512<Kind, HALF, PAIRS>(x, w, out, ahead(), row, pair);
  last_rows_avx512<Kind, HALF - 1, PAIRS>(x, w, out, ahead(), row, pair);
}

template <typename Kind>
AVX512 void multiply_avx512(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  int64_t pair = begin;
  if (x.m == 1)  // as many panels side by side as leave the reading of memory little to wait for
    for (; pair + 4 <= end; pair += 4) block_avx512<Kind, 1, 4>(x, w, out, {}, 0, pair);
  for (; pair + 2 <= end; pair += 2) rows_avx512<Kind, 2>(x, w, out, pair);
  for (; pair < end; ++pair) rows_avx512<Kind, 1>(x, w, out, pair);
}

// --- on AMX

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
      avx512::put_panel(out, row, first, a);
      avx512::put_panel(out, row, second, b);
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
#endif

template <typename Kind>
void multiply(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
#if HAS_X86
  if constexpr (Kind::TILES)
    if (instructions() == Instructions::amx) return multiply_amx<Kind>(x, w, out, begin, end);
  if (has_avx512()) return multiply_avx512<Kind>(x, w, out, begin, end);
#endif
  TORCH_CHECK(!Kind::HALVES, "halves are multiplied on AVX-512 and AMX alone");
  if constexpr (!Kind::HALVES) multiply_lanes<Kind>(x, w, out, begin, end);
}

}  // namespace slimpajama
