// Attention over the paged cache on AMX tiles, for any number of queries a sequence: prompts, chunks, single tokens.
//
// A work item is a stretch of a sequence's queries under one key head; all query heads that share it are rows. Keys come
// in blocks of 256: transposed (keys) or interleaved (values) once for all rows of the item, scored and weighed for
// 16 rows at a time, softmax over the block, and blocks are merged as they come (arXiv 1805.02867). Blocks start at
// multiples of 256 whoever asks, and a row adds up its own keys only: its result depends, to a bit, neither on the
// other rows nor on how a prompt was cut into chunks.
//
// Legend: H query heads, G key heads, D head size, T tokens of the step, B sequences.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <vector>

#include "tiles.h"
#include "vectors.h"

namespace slimpajama {

namespace {

#if HAS_X86

constexpr int64_t KEYS = 256;      // of a block
constexpr int64_t ROWS = 16;       // of a set: what a tile holds
constexpr int64_t MAX_SETS = 12;   // of an item
constexpr int64_t MAX_SIZE = 256;  // of a head
constexpr float LOG2_E = 1.44269504f;

struct Cache {
  const bf16 *keys, *values;
  int64_t block_size, groups, head_size;
};

struct Item {
  const bf16* query;      // of its first token, first head of the group
  bf16* out;              // the same place in the result
  const int32_t* blocks;  // the sequence's
  int64_t group, tokens;
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

struct Scratch {
  alignas(64) bf16 queries[MAX_SETS][ROWS * MAX_SIZE];
  alignas(64) bf16 keys[KEYS * MAX_SIZE];    // [KEYS / 16][D / 32][16 pairs of dimensions][16 keys][2]
  alignas(64) bf16 values[KEYS * MAX_SIZE];  // [KEYS / 32][D / 16][16 pairs of keys][16 dimensions][2]
  alignas(64) float scores[ROWS][KEYS];
  alignas(64) bf16 weights[ROWS][KEYS];
  alignas(64) float found[ROWS][MAX_SIZE];            // the block's weighted values
  alignas(64) float sums[MAX_SETS * ROWS][MAX_SIZE];  // of all blocks so far
  float largest[MAX_SETS * ROWS], totals[MAX_SETS * ROWS];
  alignas(64) bf16 gathered[ROWS * MAX_SIZE];
};

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

// Where the keys (or values) of 16 positions from `start` lie: in a block of the cache, or gathered from several.
struct Strip {
  const bf16* first;
  int64_t stride;
};

Strip strip_at(const bf16* cache, const Cache& c, const Item& item, int64_t start, int64_t count, bf16* gathered) {
  const int64_t token = c.groups * c.head_size;
  const auto place = [&](int64_t position) {
    const int64_t slot = item.blocks[position / c.block_size] * c.block_size + position % c.block_size;
    return cache + slot * token + item.group * c.head_size;
  };
  if (c.block_size % ROWS == 0) return {place(start), token};
  for (int64_t t = 0; t < count; ++t)
    std::memcpy(gathered + t * c.head_size, place(start + t), c.head_size * sizeof(bf16));
  return {gathered, c.head_size};
}

AVX512 inline void prefetch(const bf16* cache, const Cache& c, const Item& item, int64_t start, int64_t end) {
  if (start >= end || c.block_size % ROWS) return;
  const Strip strip = strip_at(cache, c, item, start, ROWS, nullptr);
  for (int64_t t = 0; t < ROWS; ++t)
    for (int64_t i = 0; i < c.head_size; i += 32)
      _mm_prefetch(reinterpret_cast<const char*>(strip.first + t * strip.stride + i), _MM_HINT_T0);
}

// Keys from `start`, `count` of them: transposed so that a tile multiplies them. What is past them is left as it is.
AVX512 void transpose_keys(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch& s) {
  const int64_t size = c.head_size;
  for (int64_t k = 0; k < count; k += ROWS) {
    const Strip strip = strip_at(c.keys, c, item, start + k, std::min(ROWS, count - k), s.gathered);
    prefetch(c.keys, c, item, start + k + 2 * ROWS, start + count);
    for (int64_t i = 0; i < size; i += 32) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) rows[t] = _mm512_loadu_si512(strip.first + t * strip.stride + i);
      transpose(rows);
      bf16* target = s.keys + k * size + i * ROWS;
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) _mm512_store_si512(target + 32 * t, rows[t]);
    }
  }
}

// Values from `start`, `count` of them: two positions side by side. Up to the next 32, positions past them are zero: a
// weight of zero does not silence what others left there, if it is not finite.
AVX512 void interleave_values(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch& s) {
  const int64_t size = c.head_size;
  const __m512i low = _mm512_setr_epi64(0x0021000100200000, 0x0023000300220002, 0x0025000500240004, 0x0027000700260006,
                                        0x0029000900280008, 0x002b000b002a000a, 0x002d000d002c000c, 0x002f000f002e000e);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t k = 0; k < count; k += ROWS) {
    const int64_t own = std::min(ROWS, count - k);
    const Strip strip = strip_at(c.values, c, item, start + k, own, s.gathered);
    prefetch(c.values, c, item, start + k + 2 * ROWS, start + count);
    bf16* target = s.values + k / 32 * 32 * size + k % 32 * 16;
    for (int64_t t = 0; t < ROWS; t += 2)
      for (int64_t i = 0; i < size; i += 32) {
        const bf16* place = strip.first + t * strip.stride + i;
        const __m512i a = t < own ? _mm512_loadu_si512(place) : _mm512_setzero_si512();
        const __m512i b = t + 1 < own ? _mm512_loadu_si512(place + strip.stride) : _mm512_setzero_si512();
        _mm512_store_si512(target + i * 32 + t * 16, _mm512_permutex2var_epi16(a, low, b));
        _mm512_store_si512(target + (i + 16) * 32 + t * 16, _mm512_permutex2var_epi16(a, high, b));
      }
  }
  if (count % 32 != 0 && count % 32 <= ROWS)
    for (int64_t i = 0; i < size; i += 16)
      std::memset(s.values + count / 32 * 32 * size + i * 32 + 16 * 16, 0, 16 * 16 * sizeof(bf16));
}

AVX512 inline __m512 exp2_avx512(__m512 x) {  // relative error below 4e-5; of -inf 0, of NaN NaN
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// The scores of 16 rows and `count` keys (to the next 32). Tiles 4 and 5 hold queries, 6 and 7 keys, 0 and 1 scores.
AMX void score(const bf16* queries, int64_t size, int64_t count, Scratch& s) {
  for (int64_t k = 0; k < count; k += 32) {
    const bf16* keys = s.keys + k * size;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < size; i += 32) {
      _tile_loadd(4, queries + i, size * 2);
      _tile_loadd(6, keys + i * ROWS, 64);
      _tile_loadd(7, keys + (size + i) * ROWS, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, &s.scores[0][k], KEYS * 4);
    _tile_stored(1, &s.scores[0][k + 16], KEYS * 4);
  }
}

// One row's keys from `begin` to `end` (of the block): its scores become weights, bfloat16, up to `count`; the largest
// scaled score and the weights' sum are returned.
AVX512 void weigh(int64_t row, int64_t begin, int64_t end, int64_t count, float scale, Scratch& s, float& largest,
                  float& total) {
  const float* scores = s.scores[row];
  const auto seen = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t first = std::clamp<int64_t>(begin - k, 0, 16), last = std::clamp<int64_t>(end - k, 0, 16);
    return static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
  };
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (int64_t k = begin / 16 * 16; k < end; k += 16)
    top = _mm512_mask_max_ps(top, seen(k), top, _mm512_load_ps(scores + k));
  largest = _mm512_reduce_max_ps(top) * scale;
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 32) {
    __m512 weights[2];
    for (int j = 0; j < 2; ++j) {
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + k + 16 * j), factor, shift);
      weights[j] = _mm512_maskz_mov_ps(seen(k + 16 * j), exp2_avx512(x));
      sum = _mm512_add_ps(sum, weights[j]);
    }
    _mm512_store_si512(&s.weights[row][k], reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(weights[1], weights[0])));
  }
  total = _mm512_reduce_add_ps(sum);
}

// The block's values by their weights. Tiles 0 to 3 are sums of 16 dimensions each, 4 weights, 6 and 7 values.
AMX void weighted_values(int64_t size, int64_t count, Scratch& s) {
  for (int64_t i = 0; i < size; i += 64) {
    const bf16* values = s.values + i * 32;
    const bool whole = size - i >= 64;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < count; k += 32) {
      const bf16* step = values + k * size;
      _tile_loadd(4, &s.weights[0][k], KEYS * 2);
      _tile_loadd(6, step, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, step + 16 * 32, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (whole) {
        _tile_loadd(6, step + 32 * 32, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, step + 48 * 32, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    _tile_stored(0, &s.found[0][i], MAX_SIZE * 4);
    _tile_stored(1, &s.found[0][i + 16], MAX_SIZE * 4);
    if (whole) {
      _tile_stored(2, &s.found[0][i + 32], MAX_SIZE * 4);
      _tile_stored(3, &s.found[0][i + 48], MAX_SIZE * 4);
    }
  }
}

// Adds a block's result (its largest score, total of weights, weighted values) to a row's.
AVX512 void merge(int64_t row, const float* found, float largest, float total, int64_t size, Scratch& s) {
  float& before = s.largest[row];
  const float now = std::max(before, largest);
  const float keep = before == -INFINITY ? 0.0f : std::exp2(before - now), add = std::exp2(largest - now);
  s.totals[row] = s.totals[row] * keep + total * add;
  before = now;
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 more = _mm512_mul_ps(_mm512_load_ps(found + i), _mm512_set1_ps(add));
    _mm512_store_ps(s.sums[row] + i, _mm512_fmadd_ps(_mm512_load_ps(s.sums[row] + i), _mm512_set1_ps(keep), more));
  }
}

// Keys that the token at `position` sees, from `first` to before `end`.
struct Sight {
  int64_t first, end;
};

Sight sight(const Item& item, const Shape& shape, int64_t position) {
  const int64_t end = shape.causal ? position + 1 : item.context;
  if (shape.window == 0) return {0, end};
  return {std::max<int64_t>(0, position - shape.window + 1), std::min(end, position + shape.window)};
}

AMX void attend(const Cache& c, const Item& item, const Shape& shape, Scratch& s) {
  const int64_t size = c.head_size, rows = item.tokens * shape.shared, sets = (rows + ROWS - 1) / ROWS;
  const auto query_of = [&](int64_t row) {
    return item.query + row / shape.shared * shape.query_stride + row % shape.shared * size;
  };
  for (int64_t row = 0; row < sets * ROWS; ++row) {
    bf16* target = s.queries[row / ROWS] + row % ROWS * size;
    if (row < rows) std::memcpy(target, query_of(row), size * sizeof(bf16));
    else std::memset(target, 0, size * sizeof(bf16));
    std::memset(s.sums[row], 0, size * sizeof(float));
    s.largest[row] = -INFINITY, s.totals[row] = 0.0f;
  }
  const int64_t first = sight(item, shape, item.position).first / KEYS * KEYS;
  const int64_t end = sight(item, shape, item.position + item.tokens - 1).end;
  for (int64_t start = first; start < end; start += KEYS) {
    const int64_t count = std::min(KEYS, end - start);
    transpose_keys(c, item, start, count, s);
    interleave_values(c, item, start, count, s);
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t from = set * ROWS, to = std::min(rows, from + ROWS);
      // Later rows see later keys: what the last sees bounds what is to be scored for the set.
      const int64_t needed = sight(item, shape, item.position + (to - 1) / shape.shared).end - start;
      const int64_t seen = std::min(count, needed);
      if (seen <= 0) continue;
      score(s.queries[set], size, seen, s);
      float largest[ROWS], totals[ROWS];
      for (int64_t row = from; row < to; ++row) {
        const Sight own = sight(item, shape, item.position + row / shape.shared);
        const int64_t begin = std::max<int64_t>(own.first - start, 0), limit = std::min(own.end - start, seen);
        if (begin >= limit) {
          std::memset(s.weights[row - from], 0, seen * sizeof(bf16));
          largest[row - from] = -INFINITY;
        } else {
          weigh(row - from, begin, limit, seen, shape.scale * LOG2_E, s, largest[row - from], totals[row - from]);
        }
      }
      weighted_values(size, seen, s);
      for (int64_t row = from; row < to; ++row)
        if (largest[row - from] != -INFINITY)
          merge(row, s.found[row - from], largest[row - from], totals[row - from], size, s);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    bf16* target = item.out + row / shape.shared * shape.out_stride + row % shape.shared * size;
    const __m512 share = _mm512_set1_ps(1.0f / s.totals[row]);
    for (int64_t i = 0; i < size; i += 16) narrow(target + i, _mm512_mul_ps(_mm512_load_ps(s.sums[row] + i), share));
  }
}

#endif

// query [T, H, D] with whole rows; caches [blocks, block_size, G, D], all bfloat16, D a multiple of 32 up to 256.
// Sequence b has the queries from query_starts[b] to query_starts[b + 1], which are the last of its context_lens[b]
// positions (or, not causal, see all of them); block_tables [B, N]. `window` 0: none. Returns [T, H, D].
Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                       double scale, int64_t window, bool causal) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && query.dim() == 3 && query.stride(2) == 1 &&
                  query.stride(1) == query.size(2) && key_cache.is_contiguous() && value_cache.is_contiguous(),
              "query is [T, H, D] bfloat16 with whole rows; caches are contiguous");
  const int64_t heads = query.size(1), size = query.size(2);
  TORCH_CHECK(instructions() == Instructions::amx && size % 32 == 0 && size <= 256,
              "paged_attention needs AMX and a head size that is a multiple of 32, at most 256");
  auto result = at::empty({query.size(0), heads, size}, query.options());
#if HAS_X86
  const Cache cache{data(key_cache), data(value_cache), key_cache.size(1), key_cache.size(2), size};
  const Shape shape{heads / cache.groups, query.stride(0), heads * size, static_cast<float>(scale), window, causal};
  const int32_t *starts = query_starts.const_data_ptr<int32_t>(), *contexts = context_lens.const_data_ptr<int32_t>();
  const int32_t* tables = block_tables.const_data_ptr<int32_t>();
  const int64_t stretch = std::max<int64_t>(1, MAX_SETS * ROWS / shape.shared);
  TORCH_CHECK(shape.shared <= MAX_SETS * ROWS, "too many query heads share a key head");
  std::vector<Item> items;
  for (int64_t b = 0; b < context_lens.size(0); ++b)
    for (int64_t token = starts[b]; token < starts[b + 1]; token += stretch)
      for (int64_t group = 0; group < cache.groups; ++group) {
        const int64_t offset = group * shape.shared * size;
        items.push_back({data(query) + token * shape.query_stride + offset,
                         mutable_data(result) + token * shape.out_stride + offset,
                         tables + b * block_tables.size(1), group, std::min(stretch, starts[b + 1] - token),
                         contexts[b] - starts[b + 1] + token, contexts[b]});
      }
  // Who is free takes the next: stretches late in a prompt see more than early ones.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    static thread_local const auto scratch = std::make_unique<Scratch>();
    configure_tiles(16, 16);
    for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(items.size());)
      attend(cache, items[i], shape, *scratch);
    release_tiles();
  });
#endif
  return result;
}

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, "
      "Tensor context_lens, float scale, int window, bool causal) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) { library.impl("paged_attention", slimpajama::paged_attention); }
