// Attention of one head over one text on AVX-512 and AMX, sixteen queries at a time: each is a lane of every register,
// so that its softmax is no sum across lanes.
//
// scores [keys, 16] = keys [keys, D] by queries [D, 16], and found [D, 16] = values^T [D, keys] by weights [keys, 16].
// What stands on the left is read as rows, keys where they lie, and values too where they are float32; what stands on
// the right lies as weights of a projection do (`projection.h`), bfloat16 in pairs side by side.
//
// Legend: L tokens of the text, D head size, a multiple of 32.
#pragma once

#include "kinds.h"
#include "transpose.h"

namespace slimpajama {

constexpr int64_t TILE_WIDTH = 32;  // bfloat16 in a tile's row: what numbers of keys are padded to

// A head of a text: rows `stride` numbers apart. Behind the keys rows are read that need not be keys, up to a multiple
// of TILE_WIDTH.
template <typename Value>
struct Head {
  const Value *query, *key, *value;
  int64_t stride, len;
};

#if HAS_X86
template <typename Value>
class TextVectors {
 public:
  TextVectors(int64_t size, float scale) : size_(size), scale_(scale) {}

  // Makes room for texts of `len` tokens, and decides for the calls that follow on what they run.
  void grow(int64_t len) {
    on_tiles_ = NARROW && instructions() == Instructions::amx;
    const int64_t keys = padded(len, TILE_WIDTH);
    grown(queries_, size_ / EACH);
    if (NARROW) grown(values_, size_ * keys / TILE_WIDTH);
    grown(scores_, keys);
    grown(weights_, keys / EACH);
    grown(found_, size_);
  }

  // Before and after a series of `run`.
  void begin() const {
    if (on_tiles_) configure_tiles(16, 16);
  }
  void end() const {
    if (on_tiles_) release_tiles();
  }

  // Writes rows of out, `out_stride` numbers apart; a token sees those less than `window` away.
  AVX512 void run(const Head<Value>& head, int64_t window, Value* out, int64_t out_stride) {
    const int64_t steps = padded(head.len, TILE_WIDTH) / TILE_WIDTH;  // of all keys
    if constexpr (NARROW) {
      if (on_tiles_) turn_values(head, steps);
      else pair_values(head);
    }
    for (int64_t first = 0; first < head.len; first += 16) {
      const int64_t count = std::min<int64_t>(16, head.len - first);
      const Value* query = head.query + first * head.stride;
      for (int64_t i = 0; i < size_; i += 16 * EACH)
        transpose(bytes(query + i), head.stride * BYTES, count, &queries_[i / EACH]);
      // Keys that one of the queries sees: [begin, end), and as many as tiles take.
      const int64_t begin = std::max<int64_t>(0, first - window + 1) / TILE_WIDTH * TILE_WIDTH;
      const int64_t len = std::min(head.len, first + 15 + window) - begin, keys = padded(len, TILE_WIDTH);
      score(head, begin, len, keys);
      if (window < head.len) hide(first - begin, len, window);
      const __m512 inverse = weigh(len, keys);
      add_up(head, begin, len, steps);
      for (int64_t i = 0; i < size_; i += 16)
        write(&found_[i], inverse, count, out + first * out_stride + i, out_stride);
    }
  }

 private:
  static constexpr bool NARROW = std::is_same_v<Value, bf16>;
  using Kind = std::conditional_t<NARROW, Bf16, Float32>;
  static constexpr int64_t BYTES = sizeof(Value), EACH = 4 / BYTES;  // numbers in 32 bits

  static const uint8_t* bytes(const Value* values) { return reinterpret_cast<const uint8_t*>(values); }

  // The scores of `len` keys from `begin` on.
  AVX512 void score(const Head<Value>& head, int64_t begin, int64_t len, int64_t keys) {
    const Value* key = head.key + begin * head.stride;
    if constexpr (NARROW)
      if (on_tiles_) return score_tiles(key, head.stride * BYTES, keys);
    multiply_rows({bytes(key), head.stride * BYTES, 4}, len, queries_.data(), size_ / EACH, scores_.data());
  }

  // From the sixteen queries those of the keys that are out of their windows; `first` is where the queries are among
  // the keys.
  AVX512 void hide(int64_t first, int64_t len, int64_t window) {
    for (int64_t j = 0; j < len; ++j) {
      const int64_t begin = std::clamp<int64_t>(j - window + 1 - first, 0, 16);
      const int64_t end = std::clamp<int64_t>(j + window - first, 0, 16);
      if (begin > 0 || end < 16)
        _mm512_store_ps(scores_[j].bytes, avx512::chosen(begin, end, floats_of(scores_[j]), -INFINITY));
    }
  }

  // The values of `len` keys from `begin` on, a multiple of TILE_WIDTH, by the keys' weights.
  AVX512 void add_up(const Head<Value>& head, int64_t begin, int64_t len, int64_t steps) {
    if constexpr (NARROW)
      if (on_tiles_) return add_up_tiles(begin / TILE_WIDTH, padded(len, TILE_WIDTH) / TILE_WIDTH, steps);
    multiply_rows(values_of(head, begin), size_, weights_.data(), (len + EACH - 1) / EACH, found_.data());
  }

  // --- on vectors

  // Rows `stride` bytes apart, of 32 bits every `step` bytes.
  struct Grid {
    const uint8_t* values;
    int64_t stride, step;
  };

  template <int ROWS>
  AVX512 INLINE static void multiply_some(Grid rows, const Line* columns, int64_t groups, Line* sums) {
    __m512 own[ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) own[i] = avx512::zeros();
    const uint8_t* fours[ROWS / 4];  // where four rows begin: one pointer for each row were more than registers hold
    for (int i = 0; i < ROWS; i += 4) fours[i / 4] = rows.values + i * rows.stride;
    for (int64_t g = 0; g < groups; ++g) {
      const __m512i column = _mm512_load_si512(columns[g].bytes);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        int32_t value;
        std::memcpy(&value, fours[i / 4] + i % 4 * rows.stride, 4);
        own[i] = Kind::add(own[i], _mm512_set1_epi32(value), column);
      }
#pragma GCC unroll 4
      for (const uint8_t*& four : fours) {
        four += rows.step;
        asm("" : "+r"(four));  // or the compiler makes them one pointer and sixteen distances
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) _mm512_store_ps(sums[i].bytes, own[i]);
  }

  // `count` rows (to the next 8) by columns of `groups` lines.
  AVX512 static void multiply_rows(Grid rows, int64_t count, const Line* columns, int64_t groups, Line* sums) {
    int64_t row = 0;
    const auto from = [&] { return Grid{rows.values + row * rows.stride, rows.stride, rows.step}; };
    for (; row + 8 < count; row += 16) multiply_some<16>(from(), columns, groups, sums + row);
    if (row < count) multiply_some<8>(from(), columns, groups, sums + row);
  }

  Grid values_of(const Head<Value>& head, int64_t begin) const {
    if constexpr (NARROW) return {values_[begin / EACH * (size_ / 16)].bytes, 4, size_ * 4};
    else return {bytes(head.value + begin * head.stride), 4, head.stride * 4};
  }

  // Values of two keys side by side, a zero beside the last of an odd number.
  AVX512 void pair_values(const Head<bf16>& head) {
    Line* line = values_.data();
    for (int64_t j = 0; j < head.len; j += 2)
      for (int64_t i = 0; i < size_; i += 16, ++line) {
        const bf16* row = head.value + j * head.stride + i;
        _mm512_store_si512(line->bytes, interleaved(row, j + 1 < head.len ? row + head.stride : nullptr));
      }
  }

  // --- on tiles

  // Two tiles of rows that lie `stride` bytes apart, and after `step` bytes the next two.
  struct Pair {
    const uint8_t *upper, *lower;
    int64_t stride, step;
  };

  AMX void score_tiles(const Value* first, int64_t stride, int64_t keys) {
    for (int64_t j = 0; j < keys; j += 32) {
      const uint8_t* key = bytes(first) + j * stride;
      multiply_tiles({key, key + 16 * stride, stride, LINE}, queries_.data(), size_ / TILE_WIDTH, &scores_[j]);
    }
  }

  // `count` of all `steps` from `begin` on.
  AMX void add_up_tiles(int64_t begin, int64_t count, int64_t steps) {
    for (int64_t i = 0; i < size_; i += 32) {
      const uint8_t* value = values_[i * steps + begin * 16].bytes;
      multiply_tiles({value, value + steps * TILE_BYTES, LINE, TILE_BYTES}, weights_.data(), count, &found_[i]);
    }
  }

  // 32 lines of sums.
  AMX static void multiply_tiles(Pair rows, const Line* columns, int64_t steps, Line* sums) {
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
  AVX512 void turn_values(const Head<bf16>& head, int64_t steps) {
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

  // --- on either

  // The scores' powers as weights, which are yet to be multiplied by what is returned; for tiles zeros beyond the keys.
  AVX512 __m512 weigh(int64_t len, int64_t keys) {
    const Line* scores = scores_.data();
    Line* weights = weights_.data();
    __m512 top = floats_of(scores[0]), other = top;
    for (int64_t j = 1; j < len; j += 2) {
      top = avx512::greater(top, floats_of(scores[j]));
      other = avx512::greater(other, floats_of(scores[j - 1]));
    }
    top = avx512::greater(top, avx512::greater(other, floats_of(scores[len - 1])));
    const __m512 factor = avx512::all(NARROW ? scale_ * LOG2_E : scale_), base = -top * factor;
    const auto power = [&](int64_t j) AVX512 {
      if constexpr (NARROW) return avx512::exp2_of(avx512::fma(floats_of(scores[j]), factor, base));
      else return avx512::exp_of((floats_of(scores[j]) - top) * factor);
    };
    const auto write = [&](int64_t j, __m512 even, __m512 odd) AVX512 {
      if constexpr (NARROW) {
        _mm512_store_si512(weights[j / 2].bytes, rounded_pairs(even, odd));
      } else {
        _mm512_store_ps(weights[j].bytes, even);
        _mm512_store_ps(weights[j + 1].bytes, odd);
      }
    };
    __m512 even = avx512::zeros(), odd = avx512::zeros();
    int64_t j = 0;
    for (; j + 2 <= len; j += 2) {
      const __m512 a = power(j), b = power(j + 1);
      even = even + a;
      odd = odd + b;
      write(j, a, b);
    }
    if (j < len) {
      const __m512 last = power(j);
      even = even + last;
      write(j, last, avx512::zeros());
    }
    if (on_tiles_)
      for (int64_t line = padded(len, EACH) / EACH; line < keys / EACH; ++line)
        _mm512_store_si512(weights[line].bytes, _mm512_setzero_si512());
    return avx512::all(1.0f) / (even + odd);
  }

  // Sixteen dimensions of `count` queries.
  AVX512 static void write(Line* found, __m512 inverse, int64_t count, Value* out, int64_t out_stride) {
    for (int64_t i = 0; i < 16; ++i) _mm512_store_ps(found[i].bytes, floats_of(found[i]) * inverse);
    Line rows[16];
    transpose(found[0].bytes, LINE, 16, rows);
    for (int64_t i = 0; i < count; ++i) avx512::narrow(out + i * out_stride, floats_of(rows[i]));
  }

  int64_t size_;
  float scale_;
  bool on_tiles_ = false;
  Kept<Line> queries_, values_, scores_, weights_, found_;
};
#else
template <typename Value>
struct TextVectors {  // for processors that have none: never run
  TextVectors(int64_t, float) {}
  void grow(int64_t) {}
  void begin() const {}
  void end() const {}
  void run(const Head<Value>&, int64_t, Value*, int64_t) {}
};
#endif

}  // namespace slimpajama
