// What attention is asked for, and how it finds keys and values in the paged cache: strips of 16 positions, as they lie
// or gathered from several blocks.
#pragma once

#include "vectors.h"

namespace slimpajama {

struct Cache {
  const bf16 *keys, *values;
  int64_t block_size, groups, head_size;
};

struct Item {
  const bf16* query;      // of its first token, first head of the group
  bf16* out;              // the same place in the result
  const int32_t* blocks;  // the sequence's
  int64_t group, groups;  // key heads: the first, and how many
  int64_t tokens;
  int64_t position;  // of the first token
  int64_t context;   // keys of the sequence
};

struct Shape {
  int64_t shared;  // query heads of a key head
  int64_t query_stride, out_stride;
  float scale;
  int64_t window;  // 0: none
  bool causal;
};

// Keys that the token at `position` sees, from `first` to before `end`.
struct Sight {
  int64_t first, end;
};

inline Sight sight(const Item& item, const Shape& shape, int64_t position) {
  const int64_t end = shape.causal ? position + 1 : item.context;
  if (shape.window == 0) return {0, end};
  return {std::max<int64_t>(0, position - shape.window + 1), std::min(end, position + shape.window)};
}

// Where a position's key (or value) under a key head is, from the beginning of the cache.
inline int64_t offset_of(const Cache& c, const Item& item, int64_t group, int64_t position) {
  const int64_t slot = item.blocks[position / c.block_size] * c.block_size + position % c.block_size;
  return (slot * c.groups + group) * c.head_size;
}

constexpr int64_t STRIP = 16;  // positions

// Where the keys (or values) of a strip lie, row by row.
struct Strip {
  const bf16* first;
  int64_t stride;
};

// The strip at `start`, of which `count` positions are asked for; `gathered` is room for it.
inline Strip strip_at(const bf16* cache, const Cache& c, const Item& item, int64_t group, int64_t start, int64_t count,
                      bf16* gathered) {
  if (c.block_size % STRIP == 0) return {cache + offset_of(c, item, group, start), c.groups * c.head_size};
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(gathered + t * c.head_size, cache + offset_of(c, item, group, start + t), c.head_size * sizeof(bf16));
  return {gathered, c.head_size};
}

#ifdef __clang__
#define SHUFFLED(Vector, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(Vector, a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif

using EightOf16 [[gnu::vector_size(16)]] = uint16_t;
using FourOf32 [[gnu::vector_size(16)]] = int32_t;

// Eight numbers of two rows, side by side.
inline void interleave_eight(const bf16* a, const bf16* b, bf16* target) {
  EightOf16 in[2];
  std::memcpy(&in[0], a, sizeof in[0]);
  std::memcpy(&in[1], b, sizeof in[1]);
  const EightOf16 out[2] = {SHUFFLED(EightOf16, in[0], in[1], 0, 8, 1, 9, 2, 10, 3, 11),
                            SHUFFLED(EightOf16, in[0], in[1], 4, 12, 5, 13, 6, 14, 7, 15)};
  std::memcpy(target, out, sizeof out);
}

// 4 x 4 numbers of 32 bits.
inline void transpose_four(const bf16* const (&rows)[4], int32_t* target, int64_t stride) {
  FourOf32 in[4];
  for (int t = 0; t < 4; ++t) std::memcpy(&in[t], rows[t], sizeof in[t]);
  const auto low = [](FourOf32 a, FourOf32 b) { return SHUFFLED(FourOf32, a, b, 0, 4, 1, 5); };
  const auto high = [](FourOf32 a, FourOf32 b) { return SHUFFLED(FourOf32, a, b, 2, 6, 3, 7); };
  const FourOf32 even[2] = {low(in[0], in[2]), high(in[0], in[2])}, odd[2] = {low(in[1], in[3]), high(in[1], in[3])};
  const FourOf32 out[4] = {low(even[0], odd[0]), high(even[0], odd[0]), low(even[1], odd[1]), high(even[1], odd[1])};
  for (int t = 0; t < 4; ++t) std::memcpy(target + t * stride, &out[t], sizeof out[t]);
}

#undef SHUFFLED

#if HAS_X86
// 16 x 16 numbers of 32 bits, in place.
AVX512 inline void transpose(__m512i rows[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // quarters of rows i, 4 + i, 8 + i and 12 + i
    const __m512i even = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    const __m512i more_even = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    const __m512i more_odd = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    a[i] = _mm512_shuffle_i32x4(even, more_even, 0x88);
    a[8 + i] = _mm512_shuffle_i32x4(even, more_even, 0xdd);
    a[4 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(odd, more_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = a[i];
}

// The numbers of two rows side by side: of their first 16 dimensions, and of the next 16.
struct Pairs {
  __m512i low, high;
};

AVX512 inline Pairs interleave(__m512i a, __m512i b) {
  const __m512i low = _mm512_setr_epi64(0x0021000100200000, 0x0023000300220002, 0x0025000500240004, 0x0027000700260006,
                                        0x0029000900280008, 0x002b000b002a000a, 0x002d000d002c000c, 0x002f000f002e000e);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)};
}

// A strip that is wanted soon, under all the item's key heads: its lines are fetched a few at a time between other work,
// as a core that has asked for many waits for them.
class Ahead {
 public:
  // Nothing, if the strip at `start` is not before `end`.
  Ahead(const bf16* cache, const Cache& c, const Item& item, int64_t start, int64_t end) {
    if (start >= end || c.block_size % STRIP) return;
    row_ = cache + offset_of(c, item, item.group, start);
    stride_ = c.groups * c.head_size;
    width_ = item.groups * c.head_size;
    rows_left_ = STRIP;
  }

  // Has the next 16 lines fetched.
  void fetch() {
    for (int64_t i = 0; i < 16 && rows_left_ > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(row_ + column_), _MM_HINT_T0);
      column_ += 32;
      if (column_ < width_) continue;
      column_ = 0;
      row_ += stride_;
      --rows_left_;
    }
  }

 private:
  const bf16* row_ = nullptr;
  int64_t stride_ = 0, width_ = 0, column_ = 0, rows_left_ = 0;
};
#endif

}  // namespace slimpajama
