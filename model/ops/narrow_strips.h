// Keys and values in 8 bits, symmetric, with a scale for each position of a head.
//
// A strip's numbers lie as its bfloat16 would (`paged_layout.h`), behind them the scales of its 16 positions. Attention
// multiplies the numbers, which bfloat16 has exactly, and then the scores by their keys' scales; likewise the weights by
// their values' scales, before these are added up.
#pragma once

#include "paged_layout.h"
#include "rows.h"

namespace slimpajama {

inline const int8_t* numbers_of(const bf16* strip) { return reinterpret_cast<const int8_t*>(strip); }
inline const float* scales_of(const bf16* strip, int64_t size) {
  return reinterpret_cast<const float*>(numbers_of(strip) + STRIP * size);
}

// A number of a slot's key or value, of whichever kind the cache is.
inline float key_of(const Cache& c, int64_t slot, int64_t group, int64_t i) {
  if (!c.has_strips()) return to_float(c.keys[(slot * c.groups + group) * c.head_size + i]);
  const bf16* strip = c.keys + c.strip_at(slot, group);
  const int64_t place = c.key_in_strip(slot, i);
  if (!c.narrow) return to_float(strip[place]);
  return numbers_of(strip)[place] * scales_of(strip, c.head_size)[slot % STRIP];
}

inline float value_of(const Cache& c, int64_t slot, int64_t group, int64_t i) {
  if (!c.has_strips()) return to_float(c.values[(slot * c.groups + group) * c.head_size + i]);
  const bf16* strip = c.values + c.strip_at(slot, group);
  const int64_t place = c.value_in_strip(slot, i);
  if (!c.narrow) return to_float(strip[place]);
  return numbers_of(strip)[place] * scales_of(strip, c.head_size)[slot % STRIP];
}

// Quantizes a head's row, steps + 128; returns the size of a step, which is not finite where one of the numbers is not.
inline float narrow_row(const bf16* row, int64_t size, uint8_t* steps) {
  constexpr float MOST = 127.0f, LEAST = 1e-30f;  // below it the row counts as zeros: 1 / scale would be infinite
  const Range range = FASTEST(range_of)(row, size, nullptr);
  const float largest = std::max(-range.least, range.most), fault = (range.least + range.most) * 0.0f;
  if (fault != 0.0f) {  // it is NaN
    std::memset(steps, 129, size);
    return fault;
  }
  FASTEST(quantize)(row, size, nullptr, largest > LEAST ? MOST / largest : 0.0f, 128.0f, steps);
  return largest / MOST;
}

// The scales of a strip's first `count` positions; zeros follow.
inline void copy_scales(const bf16* strip, int64_t size, int64_t count, float* scales) {
  const int64_t known = std::clamp<int64_t>(count, 0, STRIP);
  std::memcpy(scales, scales_of(strip, size), known * sizeof(float));
  std::fill(scales + known, scales + STRIP, 0.0f);
}

// A strip's numbers as bfloat16.
LANES inline void open_numbers(const bf16* strip, int64_t size, bf16* target) {
  const int8_t* numbers = numbers_of(strip);
  for (int64_t i = 0; i < STRIP * size; ++i) target[i] = to_bf16(static_cast<float>(numbers[i]));
}

#if HAS_X86

// Lines of a strip as they are, or opened.
struct PlainLines {
  const bf16* strip;

  AVX512 INLINE __m512i operator[](int64_t n) const { return _mm512_loadu_si512(strip + 32 * n); }
};

struct NarrowLines {
  const bf16* strip;

  AVX512 INLINE __m512i operator[](int64_t n) const {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(strip) + n);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(line)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(line, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
};

AVX512 inline void open_lines(const bf16* strip, int64_t size, bf16* target) {
  const NarrowLines lines{strip};
  for (int64_t n = 0; n < size / 2; ++n) _mm512_storeu_si512(target + 32 * n, lines[n]);
}

#endif

inline void open_strip(const bf16* strip, int64_t size, bf16* target) {
#if HAS_X86
  if (has_avx512()) return open_lines(strip, size, target);
#endif
  open_numbers(strip, size, target);
}

}  // namespace slimpajama
