// Attention of one head over one text on AMX, sixteen queries at a time: each is a lane of every register, so that its
// softmax is no sum across lanes.
//
// scores [keys, 16] = keys [keys, D] by queries [D, 16], and found [D, 16] = values^T [D, keys] by weights [keys, 16].
// What stands on the left is read as rows, the keys where they lie; what stands on the right lies as weights of a
// projection do (`projection.h`), pairs side by side.
//
// Legend: L tokens of the text, D head size, a multiple of 32.
#pragma once

#include "projection.h"
#include "tiles.h"

namespace slimpajama {

constexpr int64_t TILE_WIDTH = 32;  // bfloat16 in a tile's row: what numbers of keys are padded to

// A head of a text: rows `stride` numbers apart. Behind the keys rows are read that need not be keys, up to a multiple
// of TILE_WIDTH.
struct Head {
  const bf16 *query, *key, *value;
  int64_t stride, len;
};

#if HAS_X86
struct alignas(64) Line {
  uint8_t bytes[LINE];
};

AMX inline __m512 floats_of(const Line& line) { return _mm512_load_ps(line.bytes); }

// Sixteen rows of 16 numbers of 32 bits, `stride` bytes apart, become columns; rows from `count` on are zeros.
//
// A register has four parts of four numbers. After pairs and fours of rows, a[4 k + c] holds in its part p rows 4 k to
// 4 k + 3 of column 4 p + c; of two registers 0x88 takes parts 0 and 2, 0xdd parts 1 and 3.
AMX inline void transpose(const uint8_t* rows, int64_t stride, int64_t count, Line* columns) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) a[i] = i < count ? _mm512_loadu_si512(rows + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xdd);
    _mm512_store_si512(columns[c].bytes, _mm512_shuffle_i32x4(even, even2, 0x88));
    _mm512_store_si512(columns[c + 4].bytes, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    _mm512_store_si512(columns[c + 8].bytes, _mm512_shuffle_i32x4(even, even2, 0xdd));
    _mm512_store_si512(columns[c + 12].bytes, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

// Sixteen pairs of bfloat16: one from either row, or a zero where there is no row.
AMX inline __m512i interleaved(const bf16* even, const bf16* odd) {
  const auto wide = [](const bf16* row) AMX {
    return row ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)))
               : _mm512_setzero_si512();
  };
  return _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16));
}

class TextTiles {
 public:
  TextTiles(int64_t size, float scale) : size_(size), scale_(scale) {}

  // Makes room for texts of `len` tokens.
  void grow(int64_t len) {
    const int64_t keys = padded(len, TILE_WIDTH);
    grown(queries_, size_ / 2);
    grown(values_, size_ * keys / TILE_WIDTH);
    grown(scores_, keys);
    grown(weights_, keys / 2);
    grown(found_, size_);
  }

  AMX static void begin() { configure_tiles(16, 16); }
  AMX static void end() { release_tiles(); }

  // Between `begin` and `end`; writes rows of out, `out_stride` numbers apart.
  AMX void run(const Head& head, bf16* out, int64_t out_stride) {
    const int64_t keys = padded(head.len, TILE_WIDTH), steps = keys / TILE_WIDTH;
    turn_values(head, steps);
    for (int64_t first = 0; first < head.len; first += 16) {
      const int64_t count = std::min<int64_t>(16, head.len - first);
      const bf16* query = head.query + first * head.stride;
      for (int64_t i = 0; i < size_; i += TILE_WIDTH)
        transpose(bytes(query + i), head.stride * 2, count, &queries_[i / 2]);
      for (int64_t j = 0; j < keys; j += 32) {
        const bf16* key = head.key + j * head.stride;
        multiply({bytes(key), bytes(key + 16 * head.stride), head.stride * 2, LINE}, queries_.data(),
                 size_ / TILE_WIDTH, &scores_[j]);
      }
      const __m512 inverse = weigh(head.len, keys);
      for (int64_t i = 0; i < size_; i += 32) {
        const uint8_t* value = values_[i * steps].bytes;
        multiply({value, value + steps * TILE_BYTES, LINE, TILE_BYTES}, weights_.data(), steps, &found_[i]);
      }
      for (int64_t i = 0; i < size_; i += 16)
        write(&found_[i], inverse, count, out + first * out_stride + i, out_stride);
    }
  }

 private:
  // Two tiles of rows that lie `stride` bytes apart, and after `step` bytes the next two.
  struct Pair {
    const uint8_t *upper, *lower;
    int64_t stride, step;
  };

  static const uint8_t* bytes(const bf16* values) { return reinterpret_cast<const uint8_t*>(values); }

  // 32 lines of sums.
  AMX static void multiply(Pair rows, const Line* columns, int64_t steps, Line* sums) {
    asm volatile("" : : : "memory");  // GCC does not know that tiles are read from memory
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(6, columns[step * 16].bytes, LINE);
      _tile_loadd(4, rows.upper + step * rows.step, rows.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, rows.lower + step * rows.step, rows.stride);
      _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, sums[0].bytes, LINE);
    _tile_stored(1, sums[16].bytes, LINE);
  }

  // Tiles of 16 dimensions by 32 keys, zeros beyond the last key.
  AMX void turn_values(const Head& head, int64_t steps) {
    Line pairs[16];
    for (int64_t i = 0; i < size_; i += 16)
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t line = 0; line < 16; ++line) {
          const int64_t j = step * TILE_WIDTH + 2 * line;
          const bf16* row = head.value + j * head.stride + i;
          const bf16 *even = j < head.len ? row : nullptr, *odd = j + 1 < head.len ? row + head.stride : nullptr;
          _mm512_store_si512(pairs[line].bytes, interleaved(even, odd));
        }
        transpose(pairs[0].bytes, LINE, 16, &values_[i * steps + step * 16]);
      }
  }

  // The scores' powers as weights, which are yet to be multiplied by what is returned.
  AMX __m512 weigh(int64_t len, int64_t keys) {
    __m512 top = floats_of(scores_[0]);
    for (int64_t j = 1; j < len; ++j) top = avx512::greater(top, floats_of(scores_[j]));
    const __m512 factor = avx512::all(scale_ * LOG2_E), base = -top * factor;
    const auto power = [&](int64_t j) AMX {
      return j < len ? avx512::exp2_of(avx512::fma(floats_of(scores_[j]), factor, base)) : avx512::zeros();
    };
    __m512 even = avx512::zeros(), odd = avx512::zeros();
    for (int64_t j = 0; j < len; j += 2) {
      const __m512 a = power(j), b = power(j + 1);
      even = even + a;
      odd = odd + b;
      _mm512_store_si512(weights_[j / 2].bytes, rounded_pairs(a, b));
    }
    for (int64_t j = padded(len, 2); j < keys; j += 2)
      _mm512_store_si512(weights_[j / 2].bytes, _mm512_setzero_si512());
    return avx512::all(1.0f) / (even + odd);
  }

  AMX static __m512i rounded_pairs(__m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

  // Sixteen dimensions of `count` queries.
  AMX static void write(Line* found, __m512 inverse, int64_t count, bf16* out, int64_t out_stride) {
    for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(found[i].bytes, floats_of(found[i]) * inverse);
    Line rows[16];
    transpose(found[0].bytes, LINE, 16, rows);
    for (int64_t i = 0; i < count; ++i) avx512::narrow(out + i * out_stride, floats_of(rows[i]));
  }

  int64_t size_;
  float scale_;
  Kept<Line> queries_, values_, scores_, weights_, found_;
};
#else
struct TextTiles {  // for processors that have none: never run
  TextTiles(int64_t, float) {}
  void grow(int64_t) {}
  static void begin() {}
  static void end() {}
  void run(const Head&, bf16*, int64_t) {}
};
#endif

}  // namespace slimpajama
