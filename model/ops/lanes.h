// Sixteen numbers at a time in registers that hold fewer: AVX2's two to a line, elsewhere four (NEON). The names are
// those that `vectors.h` has for a register that holds all sixteen; what is written once for both is in `rows.h`.
//
// Operators on vectors are the compiler's own. `LANES` functions run on every processor that the operators serve.
#pragma once

#include "common.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace slimpajama::lanes {

#if HAS_X86
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif
constexpr int PARTS = 64 / REGISTER;

using Part [[gnu::vector_size(REGISTER)]] = float;
using IntPart [[gnu::vector_size(REGISTER)]] = int32_t;
using ShortPart [[gnu::vector_size(REGISTER)]] = int16_t;
using BytePart [[gnu::vector_size(REGISTER / 4)]] = uint8_t;
using HalfPart [[gnu::vector_size(REGISTER / 2)]] = uint16_t;

struct Floats {
  Part part[PARTS];
};
struct Ints {
  IntPart part[PARTS];
};

#define EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; ++p)

LANES INLINE Part part_of(float value) { return value - Part{}; }  // in every lane
LANES INLINE IntPart part_of(int32_t value) { return value - IntPart{}; }

template <typename To, typename From>
LANES INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector>
LANES INLINE Vector part_at(const void* source) {
  Vector part;
  std::memcpy(&part, source, sizeof part);
  return part;
}

LANES INLINE Part fma(Part a, Part b, Part c) {  // a b + c
#if HAS_X86
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return vfmaq_f32(c, a, b);
#else
  Part sum;
  for (int i = 0; i < REGISTER / 4; ++i) sum[i] = std::fma(a[i], b[i], c[i]);
  return sum;
#endif
}

// Of the two bfloat16 in every 32 bits the first (0) or the second (1), as float32.
LANES INLINE Part bf16_of(IntPart pairs, int number) {
#if HAS_X86
  // Two shifts, where a mask would keep a register from the sums.
  const auto bits = reinterpret_cast<__m256i>(pairs);
  return reinterpret_cast<Part>(_mm256_slli_epi32(number == 0 ? bits : _mm256_srli_epi32(bits, 16), 16));
#else
  return bits_as<Part>(number == 0 ? pairs << 16 : pairs & ~0xffff);
#endif
}

// Of every two bytes the first (0) or the second (1), as int16.
LANES INLINE IntPart signed_bytes(IntPart bytes, int number) {
  const auto pairs = bits_as<ShortPart>(bytes);
  return bits_as<IntPart>(number == 0 ? pairs << 8 >> 8 : pairs >> 8);
}

// The products where loops have as many sums as there are registers: in the order that is written here, they need no
// more. The compiler's own order does.
LANES INLINE void add_product(Part& sum, Part a, Part b) {
#if HAS_X86
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fma(a, b, sum);
#endif
}

LANES INLINE void add_product(IntPart& sum, IntPart a, IntPart b) {  // of pairs of int16, the two of each pair added up
#if HAS_X86
  IntPart product;
  asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
#else
  sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

LANES INLINE Floats all(float value) {
  Floats x;
  EACH_PART x.part[p] = part_of(value);
  return x;
}

LANES INLINE Floats zeros() { return all(0.0f); }

LANES INLINE Floats widen(const float* source) {
  Floats x;
  EACH_PART x.part[p] = part_at<Part>(source + p * REGISTER / 4);
  return x;
}

LANES INLINE Floats widen(const bf16* source) {
  Floats x;
  EACH_PART {
    const auto half = part_at<HalfPart>(source + p * REGISTER / 4);
    x.part[p] = bits_as<Part>(__builtin_convertvector(half, IntPart) << 16);
  }
  return x;
}

LANES INLINE void narrow(float* target, const Floats& x) {
  EACH_PART std::memcpy(target + p * REGISTER / 4, &x.part[p], REGISTER);
}

LANES INLINE IntPart bf16_bits(Part x) {  // in the upper half; what is below is not cleared
  const auto bits = bits_as<IntPart>(x);
  const IntPart nearest = bits + 0x7fff + ((bits >> 16) & 1);  // ties to even
  return (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : nearest;
}

LANES INLINE Floats as_bf16(Floats x) {  // rounded
  EACH_PART x.part[p] = bits_as<Part>(bf16_bits(x.part[p]) & ~0xffff);
  return x;
}

LANES INLINE void narrow(bf16* target, const Floats& x) {
  EACH_PART {
    const auto half = __builtin_convertvector(bf16_bits(x.part[p]) >> 16 & 0xffff, HalfPart);
    std::memcpy(target + p * REGISTER / 4, &half, sizeof half);
  }
}

template <typename Value>
LANES INLINE Floats widen_some(const Value* source, int64_t count) {  // the first `count`, and zeros
  if (count == 16) return widen(source);
  Value some[16] = {};
  std::memcpy(some, source, count * sizeof(Value));
  return widen(some);
}

template <typename Value>
LANES INLINE void narrow_some(Value* target, int64_t count, const Floats& x) {
  if (count == 16) return narrow(target, x);
  Value some[16];
  narrow(some, x);
  std::memcpy(target, some, count * sizeof(Value));
}

LANES INLINE Floats operator+(Floats a, const Floats& b) {
  EACH_PART a.part[p] += b.part[p];
  return a;
}

LANES INLINE Floats operator-(Floats a, const Floats& b) {
  EACH_PART a.part[p] -= b.part[p];
  return a;
}

LANES INLINE Floats operator*(Floats a, const Floats& b) {
  EACH_PART a.part[p] *= b.part[p];
  return a;
}

LANES INLINE Floats operator/(Floats a, const Floats& b) {
  EACH_PART a.part[p] /= b.part[p];
  return a;
}

LANES INLINE Floats fma(const Floats& a, const Floats& b, Floats c) {
  EACH_PART c.part[p] = fma(a.part[p], b.part[p], c.part[p]);
  return c;
}

LANES INLINE Floats smaller(const Floats& a, Floats b) {  // of NaN and b, b; of a and NaN, NaN
  EACH_PART b.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
  return b;
}

LANES INLINE Floats greater(const Floats& a, Floats b) {  // likewise
  EACH_PART b.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
  return b;
}

LANES INLINE Floats rounded(Floats x) {  // to nearest, ties to even; of numbers below 2^22
#if HAS_X86
  EACH_PART x.part[p] = _mm256_round_ps(x.part[p], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float WHOLE = 0x1.8p23f;  // above it there are no fractions
  EACH_PART x.part[p] = (x.part[p] + WHOLE) - WHOLE;
#endif
  return x;
}

// x 2^n, n whole and below 128; 0 where that is no normal number's exponent.
LANES INLINE Floats times_power(Floats x, const Floats& n) {
  EACH_PART {
    const IntPart exponent = __builtin_convertvector(n.part[p], IntPart) + 127;
    x.part[p] *= bits_as<Part>((exponent > 0 ? exponent : IntPart{}) << 23);
  }
  return x;
}

// The lanes from `first` to before `last` of x, elsewhere `other`.
LANES INLINE Floats chosen(int64_t first, int64_t last, Floats x, float other) {
  constexpr int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  EACH_PART {
    const auto lane = part_at<IntPart>(LANE + p * REGISTER / 4);
    const IntPart within = (lane >= static_cast<int32_t>(first)) & (lane < static_cast<int32_t>(last));
    x.part[p] = within ? x.part[p] : part_of(other);
  }
  return x;
}

template <typename Both>
LANES INLINE float folded(const Floats& x, const Both& both) {
  Part part = x.part[0];
  for (int p = 1; p < PARTS; ++p) part = both(part, x.part[p]);
  float lanes[REGISTER / 4];
  std::memcpy(lanes, &part, sizeof part);
  for (int width = REGISTER / 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = both(lanes[i], lanes[i + width]);
  return lanes[0];
}

struct Sum {
  template <typename Number>
  LANES Number operator()(Number a, Number b) const { return a + b; }
};
struct Smaller {
  template <typename Number>
  LANES Number operator()(Number a, Number b) const { return a < b ? a : b; }
};
struct Greater {
  template <typename Number>
  LANES Number operator()(Number a, Number b) const { return a > b ? a : b; }
};

LANES INLINE float sum_of(const Floats& x) { return folded(x, Sum{}); }
LANES INLINE float smallest(const Floats& x) { return folded(x, Smaller{}); }
LANES INLINE float greatest(const Floats& x) { return folded(x, Greater{}); }

LANES INLINE bool any_nan(const Floats& x) {
  IntPart found{};
  EACH_PART found |= x.part[p] != x.part[p];
  int32_t lanes[REGISTER / 4];
  std::memcpy(lanes, &found, sizeof found);
  return std::any_of(std::begin(lanes), std::end(lanes), [](int32_t lane) { return lane != 0; });
}

LANES INLINE void narrow_some(uint8_t* target, int64_t count, Floats x) {  // from 0 on; 255 for what is above
  x = smaller(all(255.0f), x);
  uint8_t some[16];
  EACH_PART {
    const auto bytes = __builtin_convertvector(__builtin_convertvector(x.part[p], IntPart), BytePart);
    std::memcpy(some + p * REGISTER / 4, &bytes, sizeof bytes);
  }
  std::memcpy(target, some, count);
}

// x Phi(x), Phi the normal distribution: Phi(x) - 1/2 is x times a polynomial in t = 2 (x / 5)^2 - 1 that was fitted at
// Chebyshev's points; beyond 5 it is that at 5. Off by less than 3e-6, where |x| is not above 10.
LANES INLINE Floats gelu(const Floats& x) {
  constexpr float LIMIT = 5.0f;
  constexpr float FITTED[] = {
      7.35376389e-04f, -1.67673098e-03f, 1.37459615e-03f, -2.52691673e-03f, 6.76652750e-03f,
      -1.13071249e-02f, 1.62360898e-02f, -2.32131283e-02f, 3.14767586e-02f, -4.04512824e-02f,
      5.15179297e-02f, -7.02959089e-02f, 1.41363818e-01f};
  const Floats near = smaller(all(LIMIT), greater(all(-LIMIT), x));
  const Floats t = fma(near * near, all(2.0f / (LIMIT * LIMIT)), all(-1.0f));
  Floats p = all(FITTED[0]);
  for (size_t i = 1; i < std::size(FITTED); ++i) p = fma(p, t, all(FITTED[i]));
  return x * fma(near, p, all(0.5f));
}

}  // namespace slimpajama::lanes
