// Lines of sixteen numbers of 32 bits: rows become columns, and two bfloat16 pairs (AVX-512).
#pragma once

#include "projection.h"

#if HAS_X86
namespace slimpajama {

struct alignas(64) Line {
  uint8_t bytes[LINE];
};

AVX512 inline __m512 floats_of(const Line& line) { return _mm512_load_ps(line.bytes); }

// Sixteen rows of 16 numbers of 32 bits, `stride` bytes apart, become columns; rows from `count` on are zeros.
//
// A register has four parts of four numbers. After pairs and fours of rows, a[4 k + c] holds in its part p rows 4 k to
// 4 k + 3 of column 4 p + c; of two registers 0x88 takes parts 0 and 2, 0xdd parts 1 and 3.
AVX512 inline void transpose(const uint8_t* rows, int64_t stride, int64_t count, Line* columns) {
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
AVX512 inline __m512i interleaved(const bf16* even, const bf16* odd) {
  const auto wide = [&](const bf16* row) AVX512 INLINED {
    return row ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)))
               : _mm512_setzero_si512();
  };
  return _mm512_or_si512(wide(even), _mm512_slli_epi32(wide(odd), 16));
}

// Pairs of the nearest bfloat16.
AVX512 inline __m512i rounded_pairs(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t IN_TURN[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  return _mm512_permutexvar_epi16(_mm512_load_si512(IN_TURN), both);
}

}  // namespace slimpajama
#endif
