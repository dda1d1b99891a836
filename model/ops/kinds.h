// The kinds of number that the products of `multiply.h` are made of: how 32 bits of x and of a weight add to a sum, and
// what a finished sum is worth. `Value` is how activations lie in memory.
#pragma once

#include "projection.h"
#include "tiles.h"

namespace slimpajama {

struct Float32 {
  using Value = float;
  using Number = float;
  static constexpr bool TILES = false;  // AMX has no products of float32

  static void add(float& sum, const uint8_t* x, const uint8_t* weight) {
    float value, factor;
    std::memcpy(&value, x, 4);
    std::memcpy(&factor, weight, 4);
    sum += value * factor;
  }
  static float worth(float sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }

#if HAS_X86
  using Vector = __m512;

  AVX512 static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weights), sum);
  }
  AVX512 static __m512 worth(__m512 sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }
#endif
};

struct Bf16 {
  using Value = bf16;
  using Number = float;
  static constexpr bool TILES = true;

  static void add(float& sum, const uint8_t* x, const uint8_t* weight) {
    bf16 values[2], weights[2];
    std::memcpy(values, x, 4);
    std::memcpy(weights, weight, 4);
    for (int i = 0; i < 2; ++i) sum += to_float(values[i]) * to_float(weights[i]);
  }
  static float worth(float sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }

#if HAS_X86
  using Vector = __m512;

  AVX512 static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights));
  }
  AVX512 static __m512 worth(__m512 sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }
  AVX512 static __m512 load(const uint8_t* sums) { return _mm512_load_ps(sums); }
  template <int SUMS, int X, int WEIGHTS>
  AMX static void tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(WEIGHTS));
  }
#endif
};

struct Int8 {
  using Value = bf16;  // what is quantized
  using Number = int32_t;
  static constexpr bool TILES = true;

  static void add(int32_t& sum, const uint8_t* x, const uint8_t* weight) {
    for (int i = 0; i < 4; ++i) sum += x[i] * static_cast<int8_t>(weight[i]);
  }
  static float worth(int32_t sum, const Rows& x, const Weights& w, int64_t row, int64_t output) {
    return static_cast<float>(sum - x.zeros[row] * w.sums[output]) * w.scales[output] * x.scales[row];
  }

#if HAS_X86
  using Vector = __m512i;

  // The compiler's own form of this instruction copies every sum before and after it.
  AVX512 static __m512i add(__m512i sum, __m512i x, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
    return sum;
  }
  AVX512 static __m512 worth(__m512i sum, const Rows& x, const Weights& w, int64_t row, int64_t first) {
    const __m512i zeros = _mm512_mullo_epi32(_mm512_loadu_si512(w.sums + first), _mm512_set1_epi32(x.zeros[row]));
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zeros));
    return _mm512_mul_ps(_mm512_mul_ps(exact, _mm512_loadu_ps(w.scales + first)), _mm512_set1_ps(x.scales[row]));
  }
  AVX512 static __m512i load(const uint8_t* sums) { return _mm512_load_si512(sums); }
  template <int SUMS, int X, int WEIGHTS>
  AMX static void tiles() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(WEIGHTS));
  }
#endif
};

}  // namespace slimpajama
