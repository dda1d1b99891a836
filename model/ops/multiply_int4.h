// Weights in 4 bits, symmetric in groups of 32 inputs: w ~ scale[n][group] * q, q from -8 to 7; and their products.
//
// Memory is read from end to end: pairs of panels, each a stream of chunks for 64 inputs, the left panel's and the
// right's by turns. A chunk has the scales of two groups (16 float16 each, a line), then each group's values in four
// lines, of which a byte's upper bits are what a line of int8 has for 4 inputs and its lower bits what it has for the
// next 4.
//
// The products of a group with a row are whole numbers and exact; times its scales they are added up in float32, one
// group after the other. So every path gives the same, to a bit.
#pragma once

#include "multiply.h"

namespace slimpajama {

constexpr int64_t GROUP = 32, CHUNK_GROUPS = 2;  // inputs with one scale; of them in a chunk
constexpr int64_t VALUE_LINES = GROUP / 8;       // of a group
constexpr int64_t CHUNK_BYTES = (1 + CHUNK_GROUPS * VALUE_LINES) * LINE;
static_assert(CHUNK_BYTES == TILE_GROUPS * GROUP_BYTES_4);

// The first chunk of a panel; those that follow are two chunks apart.
inline const uint8_t* first_chunk(const Weights& w, int64_t panel) {
  return w.panel(panel / 2 * 2) + panel % 2 * CHUNK_BYTES;
}

// Where a chunk has a group.
struct GroupPlace {
  const uint8_t *scales, *values;
};

INLINE GroupPlace place_of(const uint8_t* chunk, int64_t group) {
  return {chunk + group * PANEL * 2, chunk + (1 + group * VALUE_LINES) * LINE};
}

namespace lanes {

using BytesPart [[gnu::vector_size(REGISTER)]] = int8_t;
using WordsPart [[gnu::vector_size(REGISTER)]] = uint16_t;

// Of every byte the upper (0) or the lower (1) four bits as a signed byte.
LANES INLINE IntPart signed_fours(IntPart line, int number) {
#if HAS_X86
  const auto bits = reinterpret_cast<__m256i>(line), lower = _mm256_set1_epi8(15);
  const auto values = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                       0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const auto which = _mm256_and_si256(number == 0 ? _mm256_srli_epi16(bits, 4) : bits, lower);
  return reinterpret_cast<IntPart>(_mm256_shuffle_epi8(values, which));
#else
  const auto bytes = bits_as<BytesPart>(line);
  return bits_as<IntPart>(number == 0 ? bytes >> 4 : bytes << 4 >> 4);
#endif
}

// Adds products of unsigned bytes and of what `signed_fours` gives, of every two bytes both: of a group at most
// 16 * 255 * 8 = 32,640, which 16 bits hold.
LANES INLINE void add_products(ShortPart& sum, IntPart x, IntPart weights) {
#if HAS_X86
  ShortPart product;
  asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(weights));
#else
  const auto bytes = bits_as<WordsPart>(x);
  const auto values = bits_as<ShortPart>(weights);
  sum += bits_as<ShortPart>(bytes & 255) * (values << 8 >> 8) + bits_as<ShortPart>(bytes >> 8) * (values >> 8);
#endif
}

// Sixteen float16, none of them infinite, times `factor`: a half's exponent is 112 less than a float's.
LANES INLINE Floats widen_halves(const uint8_t* source, float factor) {
  Floats x;
  EACH_PART {
    const auto half = __builtin_convertvector(part_at<HalfPart>(source + p * REGISTER / 2), IntPart);
    x.part[p] = bits_as<Part>((half & 0x8000) << 16 | (half & 0x7fff) << 13) * (0x1p112f * factor);
  }
  return x;
}

}  // namespace lanes

struct Int4 {
  using Lane = int32_t;
  using Lanes = lanes::Floats;
  static constexpr int OPENED = 1;  // x is multiplied as it is
  static constexpr bool IN_GROUPS = true;

  // Sums, and the weights' totals, are 16 times what they are worth: on AVX-512 values stay in the upper four bits.
  static constexpr float FACTOR = 16.0f;

  template <int ROWS, int PANELS>
  LANES INLINE static void add_up_lanes(int64_t groups, OpenedRows rows, Fetching ahead, const Weights& w, int64_t panel,
                                        lanes::Floats (&sums)[ROWS][PANELS]) {
    const uint8_t *x = rows.values, *chunks[PANELS];
    for (int j = 0; j < PANELS; ++j) chunks[j] = first_chunk(w, panel + j);
    const uint8_t* next = w.panel(panel + 2) + ahead.begin;  // of the next pair, in the order of memory
    for (int64_t g = 0; g < groups; g += TILE_GROUPS)
      for (int64_t group = 0; group < CHUNK_GROUPS; ++group, x += GROUP, next += 2 * VALUE_LINES * ahead.step) {
        GroupPlace places[PANELS];
        for (int j = 0; j < PANELS; ++j)
          places[j] = place_of(chunks[j] + g / TILE_GROUPS * 2 * CHUNK_BYTES, group);
        for (int64_t line = 0; line < VALUE_LINES; ++line)
          for (int j = 0; j < PANELS; ++j)
            __builtin_prefetch(next + 2 * line * ahead.step + j * w.panel_bytes(), 0, 2);
        add_group(x, rows.stride, places, sums);
      }
  }

  template <int ROWS, int PANELS>
  LANES INLINE static void add_group(const uint8_t* x, int64_t x_stride, const GroupPlace (&places)[PANELS],
                                     lanes::Floats (&sums)[ROWS][PANELS]) {
    using lanes::PARTS;
    lanes::ShortPart own[ROWS][PANELS][PARTS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j) EACH_PART own[i][j][p] = lanes::ShortPart{};
#pragma GCC unroll 8
    for (int fours = 0; fours < GROUP / 4; ++fours) {
      lanes::IntPart weights[PANELS][PARTS];
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j)
        EACH_PART {
          const uint8_t* line = places[j].values + fours / 2 * LINE + p * lanes::REGISTER;
          weights[j][p] = lanes::signed_fours(lanes::part_at<lanes::IntPart>(line), fours % 2);
        }
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        Lane value;
        std::memcpy(&value, x + i * x_stride + fours * 4, 4);
        const auto broadcast = lanes::part_of(value);
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; ++j) EACH_PART lanes::add_products(own[i][j][p], broadcast, weights[j][p]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < PANELS; ++j) {
      const auto scales = lanes::widen_halves(places[j].scales, FACTOR);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i)
        EACH_PART {
          const auto pairs = lanes::bits_as<lanes::IntPart>(own[i][j][p]);
          const auto whole = __builtin_convertvector((pairs << 16 >> 16) + (pairs >> 16), lanes::Part);
          sums[i][j].part[p] = lanes::fma(whole, scales.part[p], sums[i][j].part[p]);
        }
    }
  }

  LANES INLINE static lanes::Floats worth(Lanes sum, const Rows& x, const Weights& w, int64_t row, int64_t first) {
    const auto zero = lanes::all(-static_cast<float>(x.zeros[row]));
    return lanes::fma(zero, lanes::widen(w.totals + first), sum) * lanes::all(x.scales[row] / FACTOR);
  }

#if HAS_X86
  using Panel = __m512;  // totals

  AVX512 INLINE static Panel panel(const Weights& w, int64_t first) { return _mm512_loadu_ps(w.totals + first); }
  AVX512 INLINE static __m512 worth(__m512 sum, const Panel& totals, const Rows& x, int64_t row) {
    const __m512 exact = _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(x.zeros[row])), totals, sum);
    return _mm512_mul_ps(exact, _mm512_set1_ps(x.scales[row] / FACTOR));
  }
  AVX512 INLINE static __m512 load(const uint8_t* sums) { return _mm512_load_ps(sums); }
#endif
};

#if HAS_X86
// Adds a group of a pair of panels to ROWS rows' sums; fetch() has a little fetched with every line.
template <int ROWS, typename Fetch>
AVX512 INLINE void add_group(const uint8_t* x, int64_t x_stride, GroupPlace place, const Fetch& fetch,
                             __m512 (&sums)[ROWS][2]) {
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i own[ROWS][2];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) own[i][0] = own[i][1] = __m512i{};
#pragma GCC unroll 8
  for (int fours = 0; fours < GROUP / 4; ++fours) {
    if (fours % 2 == 0) fetch();
    __m512i weights[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512i both = _mm512_load_si512(place.values + j * CHUNK_BYTES + fours / 2 * LINE);
      weights[j] = _mm512_and_si512(fours % 2 == 0 ? both : _mm512_slli_epi16(both, 4), upper);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
      int32_t four;
      std::memcpy(&four, x + i * x_stride + fours * 4, 4);
      const __m512i broadcast = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)  // in this order, they need no more registers than there are
        asm volatile("vpdpbusd %2, %1, %0" : "+v"(own[i][j]) : "v"(broadcast), "v"(weights[j]));
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const auto* halves = reinterpret_cast<const __m256i*>(place.scales + j * CHUNK_BYTES);
    const __m512 scales = _mm512_cvtph_ps(_mm256_load_si256(halves));
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(own[i][j]), scales, sums[i][j]);
  }
}

// ROWS rows by a pair of panels: as many as registers hold the sums of, those of a group and those of all.
//
// Meanwhile FETCHED lines from `next` on are fetched with each of the nine of a chunk: all at once they would wait for
// each other, and the products for them.
template <int ROWS, int FETCHED>
AVX512 void block_int4(const Rows& x, const Weights& w, const Output& out, const uint8_t* next, int64_t row,
                       int64_t pair) {
  const auto fetch = [&] INLINED {
#pragma GCC unroll 2
    for (int i = 0; i < FETCHED; ++i, next += LINE) __builtin_prefetch(next, 0, 2);
  };
  __m512 sums[ROWS][2];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = avx512::zeros();
  const uint8_t *values = x.row(row), *chunk = w.panel(2 * pair);
  const int64_t x_stride = x.stride;
  for (int64_t g = 0; g < x.groups; g += TILE_GROUPS, chunk += 2 * CHUNK_BYTES) {
    fetch();
    for (int64_t group = 0; group < CHUNK_GROUPS; ++group, values += GROUP)
      add_group(values, x_stride, place_of(chunk, group), fetch, sums);
  }
  alignas(64) uint8_t kept[ROWS][2 * LINE];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) std::memcpy(kept[i], sums[i], 2 * LINE);
  finish_avx512<Int4, 2>(kept[0], ROWS, x, w, out, row, pair * 2 * PANEL);
}

AVX512 inline void multiply_int4(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  constexpr int64_t AHEAD = 8192;  // bytes: what memory gives in the time that it takes to answer, and more
  constexpr decltype(&block_int4<1, 0>) OF_HEIGHT[][6] = {
      {block_int4<1, 0>, block_int4<2, 0>, block_int4<3, 0>, block_int4<4, 0>, block_int4<5, 0>, block_int4<6, 0>},
      {block_int4<1, 1>, block_int4<2, 1>, block_int4<3, 1>, block_int4<4, 1>, block_int4<5, 1>, block_int4<6, 1>},
      {block_int4<1, 2>, block_int4<2, 2>, block_int4<3, 2>, block_int4<4, 2>, block_int4<5, 2>, block_int4<6, 2>}};
  constexpr int64_t HIGH = std::size(OF_HEIGHT[0]);
  const int64_t blocks = (x.m + HIGH - 1) / HIGH, half = w.panel_bytes();
  for (int64_t pair = begin; pair < end; ++pair)  // it stays in the cache until all rows have met it
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = x.m * block / blocks, height = x.m * (block + 1) / blocks - row;
      // To one block the weights pass by; of more the first two fetch the next pair, a half each.
      const int64_t fetched = blocks == 1 ? 2 : block < 2 ? 1 : 0;
      const uint8_t* next = w.panel(2 * pair) + (blocks == 1 ? AHEAD : 2 * half + block * half);
      OF_HEIGHT[fetched][height - 1](x, w, out, next, row, pair);
    }
}
#endif

}  // namespace slimpajama
