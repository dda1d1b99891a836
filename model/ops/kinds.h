// The kinds of number that the products of `multiply.h` are made of: how 32 bits of x and of a weight add to a sum, and
// what a finished sum is worth. Of 4 bits, which add up in groups: `multiply_int4.h`.
//
// On lanes there are no instructions for what 32 bits hold: of x and of weights they are opened, into OPENED numbers
// (float32, or two int16) whose products add up one after the other.
#pragma once

#include "projection.h"
#include "tiles.h"

namespace slimpajama {

// Sums that are what they are worth.
struct PlainSums {
  static constexpr bool IN_GROUPS = false;  // whether the kind has its own way of adding up, in groups with a scale each
  using Lane = float;
  using Lanes = lanes::Floats;

  LANES INLINE static lanes::Floats worth(Lanes sum, const Rows&, const Weights&, int64_t, int64_t) { return sum; }

#if HAS_X86
  using Vector = __m512;

  struct Panel {};  // what a panel's sums are made results with, whatever their row

  AVX512 INLINE static Panel panel(const Weights&, int64_t) { return {}; }
  AVX512 INLINE static __m512 worth(__m512 sum, const Panel&, const Rows&, int64_t) { return sum; }
  AVX512 static __m512 load(const uint8_t* sums) { return _mm512_load_ps(sums); }
#endif
};

// Every group of x meets the group of weights at its place.
struct Whole {
  static constexpr bool HALVES = false;
};

struct Float32 : PlainSums, Whole {
  static constexpr int OPENED = 1;
  static constexpr bool TILES = false;  // AMX has no products of float32

  LANES static lanes::Part open_weights(lanes::IntPart line, int) { return lanes::bits_as<lanes::Part>(line); }

#if HAS_X86
  AVX512 static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(weights), sum);
  }
#endif
};

struct Bf16Sums : PlainSums {
  static constexpr int OPENED = 2;
  static constexpr bool TILES = true;

  LANES static void open_x(const uint8_t* x, int64_t groups, uint32_t* numbers) {
    const auto* values = reinterpret_cast<const bf16*>(x);
    for (int64_t i = 0; i < 2 * groups; ++i) numbers[i] = static_cast<uint32_t>(values[i]) << 16;
  }
  LANES static lanes::Part open_weights(lanes::IntPart line, int number) { return lanes::bf16_of(line, number); }

#if HAS_X86
  AVX512 static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(weights));
  }
  template <int SUMS, int X, int WEIGHTS>
  AMX static void tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(WEIGHTS));
  }
#endif
};

struct Bf16 : Bf16Sums, Whole {};

// float32 as the sum of two bfloat16, the nearest and what that leaves: 16 bits of the 24. In memory the nearest of 32
// inputs lie before their rests, of x as of weights. Rest by rest is left out of the products, being smaller than what
// is lost anyway (float32_matmul_precision "high" in torch's terms).
struct Halves : Bf16Sums {
  static constexpr bool HALVES = true;
};

// Which of them meet, 0 the nearest and 1 the rests; those of the same weights in turn.
struct Meeting {
  int x, weights;
};
constexpr Meeting MEETINGS[] = {{0, 1}, {0, 0}, {1, 0}};

struct Int8 : Whole {
  using Lane = int32_t;
  using Lanes = lanes::Ints;
  static constexpr bool IN_GROUPS = false;
  static constexpr int OPENED = 2;  // pairs: the first and third of four, the second and fourth
  static constexpr bool TILES = true;

  LANES static void open_x(const uint8_t* x, int64_t groups, uint32_t* numbers) {
    for (int64_t i = 0; i < groups; ++i) {
      uint32_t four;
      std::memcpy(&four, x + 4 * i, 4);
      numbers[2 * i] = four & 0x00ff00ff;
      numbers[2 * i + 1] = four >> 8 & 0x00ff00ff;
    }
  }
  LANES static lanes::IntPart open_weights(lanes::IntPart line, int number) { return lanes::signed_bytes(line, number); }
  LANES INLINE static lanes::Floats worth(Lanes sum, const Rows& x, const Weights& w, int64_t row, int64_t first) {
    lanes::Floats exact;
    for (int p = 0; p < lanes::PARTS; ++p) {
      const auto sums = lanes::part_at<lanes::IntPart>(w.sums + first + p * lanes::REGISTER / 4);
      exact.part[p] = __builtin_convertvector(sum.part[p] - sums * x.zeros[row], lanes::Part);
    }
    return exact * lanes::widen(w.scales + first) * lanes::all(x.scales[row]);
  }

#if HAS_X86
  using Vector = __m512i;

  // The compiler's own form of this instruction copies every sum before and after it.
  AVX512 static __m512i add(__m512i sum, __m512i x, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
    return sum;
  }

  struct Panel {
    __m512i sums;
    __m512 scales;
  };

  AVX512 INLINE static Panel panel(const Weights& w, int64_t first) {
    return {_mm512_loadu_si512(w.sums + first), _mm512_loadu_ps(w.scales + first)};
  }
  AVX512 INLINE static __m512 worth(__m512i sum, const Panel& panel, const Rows& x, int64_t row) {
    const __m512i zeros = _mm512_mullo_epi32(panel.sums, _mm512_set1_epi32(x.zeros[row]));
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zeros));
    return _mm512_mul_ps(_mm512_mul_ps(exact, panel.scales), _mm512_set1_ps(x.scales[row]));
  }
  AVX512 static __m512i load(const uint8_t* sums) { return _mm512_load_si512(sums); }
  template <int SUMS, int X, int WEIGHTS>
  AMX static void tiles() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(X), "i"(WEIGHTS));
  }
#endif
};

}  // namespace slimpajama
