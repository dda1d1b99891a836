// Attention over the paged cache where keys and values lie, for any number of queries a sequence: prompts, chunks,
// single tokens.
//
// A work item is a stretch of a sequence's queries under one key head; all query heads that share it are rows. Keys come
// in blocks of 256: transposed (keys) or interleaved (values) once for all rows of the item, scored and weighed for
// 16 rows at a time, softmax over the block, and blocks are merged as they come (arXiv 1805.02867). Blocks start at
// multiples of 256 whoever asks, and a row adds up its own keys only: its result depends, to a bit, neither on the
// other rows nor on how a prompt was cut into chunks. On AVX-512 single queries take a shorter way to the same sums.
//
// Legend: H query heads, G key heads, D head size, T tokens of the step, B sequences.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "attention_products.h"
#include "operators.h"
#include "single_queries.h"

namespace slimpajama {

namespace {

void attend_plain(const Cache& c, const Item& item, const Shape& shape) {
  std::vector<float> sum(c.head_size);
  for (int64_t row = 0; row < item.tokens * shape.shared; ++row) {
    const int64_t token = row / shape.shared, head = row % shape.shared * c.head_size;
    const bf16* query = item.query + token * shape.query_stride + head;
    bf16* out = item.out + token * shape.out_stride + head;
    const Sight own = sight(item, shape, item.position + token);
    float largest = -INFINITY, total = 0.0f;
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t position = own.first; position < own.end; ++position) {
      const int64_t offset = offset_of(c, item, item.group, position);
      float score = 0.0f;
      for (int64_t i = 0; i < c.head_size; ++i) score += to_float(query[i]) * to_float(c.keys[offset + i]);
      score *= shape.scale;
      const float now = std::max(largest, score), shrink = std::exp(largest - now), weight = std::exp(score - now);
      for (int64_t i = 0; i < c.head_size; ++i) sum[i] = sum[i] * shrink + weight * to_float(c.values[offset + i]);
      total = total * shrink + weight;
      largest = now;
    }
    for (int64_t i = 0; i < c.head_size; ++i) out[i] = to_bf16(sum[i] / total);
  }
}

#if HAS_X86
// Keys from `start`, `count` of them: transposed so that a tile multiplies them. What is past them is left as it is.
AVX512 void transpose_keys(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch<bf16>& s) {
  const int64_t size = c.head_size;
  for (int64_t k = 0; k < count; k += ROWS) {
    const Strip strip = strip_at(c.keys, c, item, item.group, start + k, std::min(ROWS, count - k), s.gathered);
    Ahead ahead(c.keys, c, item, start + k + 2 * ROWS, start + count);
    for (int64_t i = 0; i < size; i += 32) {
      ahead.fetch();
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
AVX512 void interleave_values(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch<bf16>& s) {
  const int64_t size = c.head_size;
  for (int64_t k = 0; k < count; k += ROWS) {
    const int64_t own = std::min(ROWS, count - k);
    const Strip strip = strip_at(c.values, c, item, item.group, start + k, own, s.gathered);
    Ahead ahead(c.values, c, item, start + k + 2 * ROWS, start + count);
    bf16* target = s.values + k / 32 * 32 * size + k % 32 * 16;
    for (int64_t t = 0; t < ROWS; t += 2) {
      if (t % 8 == 0) ahead.fetch();
      for (int64_t i = 0; i < size; i += 32) {
        const bf16* place = strip.first + t * strip.stride + i;
        const __m512i a = t < own ? _mm512_loadu_si512(place) : _mm512_setzero_si512();
        const __m512i b = t + 1 < own ? _mm512_loadu_si512(place + strip.stride) : _mm512_setzero_si512();
        const Pairs pairs = interleave(a, b);
        _mm512_store_si512(target + i * 32 + t * 16, pairs.low);
        _mm512_store_si512(target + (i + 16) * 32 + t * 16, pairs.high);
      }
    }
  }
  if (count % 32 != 0 && count % 32 <= ROWS)
    for (int64_t i = 0; i < size; i += 16)
      std::memset(s.values + count / 32 * 32 * size + i * 32 + 16 * 16, 0, 16 * 16 * sizeof(bf16));
}

#endif

// The same on lanes.
LANES void transpose_keys(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch<float>& s) {
  const int64_t size = c.head_size;
  for (int64_t k = 0; k < count; k += ROWS) {
    const Strip strip = strip_at(c.keys, c, item, item.group, start + k, std::min(ROWS, count - k), s.gathered);
    auto* target = reinterpret_cast<int32_t*>(s.keys + k * size);
    for (int64_t t = 0; t < ROWS; t += 4)
      for (int64_t i = 0; i < size; i += 8) {
        const bf16* first = strip.first + t * strip.stride + i;
        transpose_four({first, first + strip.stride, first + 2 * strip.stride, first + 3 * strip.stride},
                       target + i / 2 * ROWS + t, ROWS);
      }
  }
}

LANES void interleave_values(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch<float>& s) {
  static constexpr bf16 NOTHING[MAX_SIZE] = {};
  const int64_t size = c.head_size;
  for (int64_t k = 0; k < count; k += ROWS) {
    const int64_t own = std::min(ROWS, count - k);
    const Strip strip = strip_at(c.values, c, item, item.group, start + k, own, s.gathered);
    for (int64_t t = 0; t < own; t += 2) {
      const bf16* first = strip.first + t * strip.stride;
      const bf16* second = t + 1 < own ? first + strip.stride : NOTHING;
      for (int64_t i = 0; i < size; i += 8)
        interleave_eight(first + i, second + i, s.values + (i / 16 * KEYS / 2 + (k + t) / 2) * 32 + i % 16 * 2);
    }
  }
}

void put_row(bf16* target, const bf16* row, int64_t size) { std::memcpy(target, row, size * sizeof(bf16)); }
void put_row(float* target, const bf16* row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) target[i] = to_float(row[i]);
}

template <typename Products>
void attend(const Cache& c, const Item& item, const Shape& shape) {
  using Number = typename Products::Number;
  Scratch<Number>& s = scratch<Number>();
  const int64_t size = c.head_size, rows = item.tokens * shape.shared, sets = (rows + ROWS - 1) / ROWS;
  for (int64_t row = 0; row < (Products::WHOLE_SETS ? sets * ROWS : rows); ++row) {
    Number* target = s.queries[row / ROWS] + row % ROWS * size;
    const bf16* query = item.query + row / shape.shared * shape.query_stride + row % shape.shared * size;
    if (row < rows) put_row(target, query, size);
    else std::memset(target, 0, size * sizeof(Number));
  }
  clear_sums(rows, size, s);
  Products::begin();
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
      Products::score(s.queries[set], size, to - from, seen, s);
      SoftmaxSum sums[ROWS];
      for (int64_t row = from; row < to; ++row) {
        const Sight own = sight(item, shape, item.position + row / shape.shared);
        const int64_t begin = std::max<int64_t>(own.first - start, 0), limit = std::min(own.end - start, seen);
        Number* weights = s.weights[row - from];
        if (begin >= limit) std::memset(weights, 0, seen * sizeof(Number));
        else
          sums[row - from] =
              Products::weigh(s.scores[row - from], begin, limit, seen, shape.scale * LOG2_E, weights);
      }
      Products::weighted_values(size, to - from, seen, s);
      for (int64_t row = from; row < to; ++row)
        if (sums[row - from].total != 0.0f)  // it sees something, if only what is not a number
          Products::merge(s.found[row - from], sums[row - from], size, s.so_far[row], s.sums[row]);
    }
  }
  Products::end();
  for (int64_t row = 0; row < rows; ++row) {
    bf16* out = item.out + row / shape.shared * shape.out_stride + row % shape.shared * size;
    Products::write_shares(s.sums[row], s.so_far[row].total, size, out);
  }
}

using Attend = void (*)(const Cache&, const Item&, const Shape&);

Attend attend_for(int64_t size, int64_t shared) {
  if (size % 32 != 0 || size > MAX_SIZE || shared > MAX_ROWS) return attend_plain;
#if HAS_X86
  if (instructions() == Instructions::amx) return attend<OnTiles>;
  if (has_avx512()) return attend<OnVectors>;
#endif
  return attend<OnLanes>;
}

// How a single query is attended to, if not as any other: tiles add up in an order of their own.
Attend attend_single_for(int64_t size, int64_t shared) {
#if HAS_X86
  constexpr Attend known[] = {attend_single<1>, attend_single<2>, attend_single<3>, attend_single<4>,
                              attend_single<5>, attend_single<6>, attend_single<7>, attend_single<8>};
  const bool fits = size % 32 == 0 && size <= MAX_SIZE && shared <= MAX_SHARED;
  if (fits && instructions() == Instructions::avx512) return known[shared - 1];
#endif
  return nullptr;
}

struct Work {
  Item item;
  Attend attend;
};

}  // namespace

// query [T, H, D] with whole rows; caches [blocks, block_size, G, D], all bfloat16. Sequence b has the queries from
// query_starts[b] to query_starts[b + 1], which are the last of its context_lens[b] positions (or, not causal, see all
// of them); block_tables [B, N]. `window` 0: none. Returns [T, H, D].
Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                       double scale, int64_t window, bool causal) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && query.dim() == 3 && query.stride(2) == 1 &&
                  query.stride(1) == query.size(2) && key_cache.is_contiguous() && value_cache.is_contiguous(),
              "query is [T, H, D] bfloat16 with whole rows; caches are contiguous");
  const int64_t heads = query.size(1), size = query.size(2), num_sequences = context_lens.size(0);
  auto result = at::empty({query.size(0), heads, size}, query.options());
  const Cache cache{data(key_cache), data(value_cache), key_cache.size(1), key_cache.size(2), size};
  const Shape shape{heads / cache.groups, query.stride(0), heads * size, static_cast<float>(scale), window, causal};
  const int32_t *starts = query_starts.const_data_ptr<int32_t>(), *contexts = context_lens.const_data_ptr<int32_t>();
  const int32_t* tables = block_tables.const_data_ptr<int32_t>();
  const Attend attend = attend_for(size, shape.shared), attend_single = attend_single_for(size, shape.shared);
  const int64_t stretch = std::max<int64_t>(1, MAX_ROWS / shape.shared);
  // Of many sequences a thread takes a whole one, and reads its cache from end to end; few are split by key head.
  const bool whole = num_sequences >= 2 * at::get_num_threads() && heads <= MAX_SINGLES;
  std::vector<Work> works;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const bool single = attend_single && starts[b + 1] - starts[b] == 1;
    const int64_t groups = single && whole ? cache.groups : 1;
    for (int64_t token = starts[b]; token < starts[b + 1]; token += stretch)
      for (int64_t group = 0; group < cache.groups; group += groups) {
        const int64_t offset = group * shape.shared * size;
        const Item item{data(query) + token * shape.query_stride + offset,
                        mutable_data(result) + token * shape.out_stride + offset,
                        tables + b * block_tables.size(1), group, groups, std::min(stretch, starts[b + 1] - token),
                        contexts[b] - starts[b + 1] + token, contexts[b]};
        works.push_back({item, single ? attend_single : attend});
      }
  }
  // Who is free takes the next: stretches late in a prompt see more than early ones.
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(works.size());)
      works[i].attend(cache, works[i].item, shape);
  });
  return result;
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, "
      "Tensor context_lens, float scale, int window, bool causal) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) { library.impl("paged_attention", slimpajama::paged_attention); }
