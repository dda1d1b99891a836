// Attention over the paged cache where keys and values lie, for any number of queries a sequence: prompts, chunks,
// single tokens.
//
// A work item is a stretch of a sequence's queries under one key head; all query heads that share it are rows. Keys come
// in blocks of 256: scored and weighed for 16 rows at a time, softmax over the block, and blocks are merged as they come
// (arXiv 1805.02867). Blocks start at multiples of 256 whoever asks, and a row adds up its own keys only: its result
// depends, to a bit, neither on the other rows nor on how a prompt was cut into chunks. On AVX-512 single queries take a
// shorter way to the same sums.
//
// Legend: H query heads, G key heads, D head size, T tokens of the step, B sequences.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention_products.h"
#include "narrow_strips.h"
#include "paged_attention.h"
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
      const int64_t slot = item.slot_of(c, position);
      float score = 0.0f;
      for (int64_t i = 0; i < c.head_size; ++i)
        score += to_float(query[i]) * key_of(c, slot, item.group, i);
      score *= shape.scale;
      const float now = std::max(largest, score), shrink = std::exp(largest - now), weight = std::exp(score - now);
      for (int64_t i = 0; i < c.head_size; ++i)
        sum[i] = sum[i] * shrink + weight * value_of(c, slot, item.group, i);
      total = total * shrink + weight;
      largest = now;
    }
    for (int64_t i = 0; i < c.head_size; ++i) out[i] = to_bf16(sum[i] / total);
  }
}

constexpr int64_t FETCHED = 4 * STRIP;  // positions before they are wanted

// Finds the strips of the keys from `start` on, `count` of them, and puts their values side by side. Up to the next 32,
// values past them are zero: a weight of zero does not silence what others left there, if it is not finite.
template <typename Number>
void gather(const Cache& c, const Item& item, int64_t start, int64_t count, Scratch<Number>& s) {
  constexpr int64_t PIECE = STRIP / 2 * 32;  // of a strip for 16 dimensions
  for (int64_t k = 0; k < (count + 31) / 32 * 32; k += STRIP) {
    const int64_t own = std::clamp<int64_t>(count - k, 0, STRIP);
    const int64_t strip = own ? c.strip_at(item.slot_of(c, start + k), item.group) : 0;
    const bf16* stored = c.values + strip;
    s.keys[k / STRIP] = own ? c.keys + strip : s.keys[k / STRIP - 1];
    if (c.narrow) {
      copy_scales(c.keys + strip, c.head_size, own, s.key_scales + k);
      copy_scales(c.values + strip, c.head_size, own, s.value_scales + k);
      if (own) {
        open_strip(c.keys + strip, c.head_size, s.opened_keys + k * c.head_size);
        open_strip(c.values + strip, c.head_size, s.opened_values);
        s.keys[k / STRIP] = s.opened_keys + k * c.head_size;
      }
      stored = s.opened_values;
    }
    const int64_t later = start + k + FETCHED, end = start + count;
    Ahead keys(c.keys, c, item, later, end), values(c.values, c, item, later, end);
    for (int64_t i = 0; i < c.head_size; i += 16) {
      bf16* target = s.values + i * KEYS + k * 16;
      keys.fetch(8);
      values.fetch(8);
      const bf16* source = stored + i * STRIP;
      if (own == STRIP) {
        std::memcpy(target, source, PIECE * sizeof(bf16));
        continue;
      }
      std::memcpy(target, source, own / 2 * 32 * sizeof(bf16));
      std::memset(target + own / 2 * 32, 0, (PIECE - own / 2 * 32) * sizeof(bf16));
      if (own % 2)
        for (int64_t lane = 0; lane < 16; ++lane)
          target[own / 2 * 32 + lane * 2] = source[own / 2 * 32 + lane * 2];
    }
  }
}

// Multiplies the columns of `rows` rows by a scale each, `count` of them (to the next 32).
template <typename Products, typename Value>
void multiply_rows(const float* scales, int64_t rows, int64_t count, Value (*values)[KEYS]) {
  for (int64_t row = 0; row < rows; ++row) Products::multiply_each(scales, (count + 31) / 32 * 32, values[row]);
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
    gather(c, item, start, count, s);
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t from = set * ROWS, to = std::min(rows, from + ROWS);
      // Later rows see later keys: what the last sees bounds what is to be scored for the set.
      const int64_t needed = sight(item, shape, item.position + (to - 1) / shape.shared).end - start;
      const int64_t seen = std::min(count, needed);
      if (seen <= 0) continue;
      Products::score(s.queries[set], size, to - from, seen, s);
      if (c.narrow) multiply_rows<Products>(s.key_scales, to - from, seen, s.scores);
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
      if (c.narrow) multiply_rows<Products>(s.value_scales, to - from, seen, s.weights);
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

Attend attend_for(const Cache& c, int64_t shared) {
  if (!c.has_strips() || shared > MAX_ROWS) return attend_plain;
#if HAS_X86
  if (instructions() == Instructions::amx) return attend<OnTiles>;
  if (has_avx512()) return attend<OnVectors>;
#endif
  return attend<OnLanes>;
}

#if HAS_X86
template <typename Lines>
Attend single_queries(int64_t shared) {
  constexpr Attend known[] = {
      attend_single<1, Lines>, attend_single<2, Lines>, attend_single<3, Lines>,
      attend_single<4, Lines>, attend_single<5, Lines>, attend_single<6, Lines>,
      attend_single<7, Lines>, attend_single<8, Lines>};
  return known[shared - 1];
}
#endif

// How a single query is attended to, if not as any other: tiles add up in an order of their own.
Attend attend_single_for(const Cache& c, int64_t shared) {
#if HAS_X86
  if (c.has_strips() && shared <= MAX_SHARED && instructions() == Instructions::avx512)
    return c.narrow ? single_queries<NarrowLines>(shared) : single_queries<PlainLines>(shared);
#endif
  return nullptr;
}

}  // namespace

std::vector<AttentionWork> attention_works(const bf16* query, bf16* out, const Cache& cache, const Shape& shape,
                                           const Sequences& sequences, int64_t threads) {
  const Attend attend = attend_for(cache, shape.shared), attend_single = attend_single_for(cache, shape.shared);
  const int64_t stretch = std::max<int64_t>(1, MAX_ROWS / shape.shared);
  // Of many sequences a thread takes a whole one, and reads its cache from end to end; few are split by key head.
  const bool whole = sequences.count >= 2 * threads && cache.groups * shape.shared <= MAX_SINGLES;
  std::vector<AttentionWork> works;
  for (int64_t b = 0; b < sequences.count; ++b) {
    const int64_t begin = sequences.starts[b], end = sequences.starts[b + 1], context = sequences.contexts[b];
    const bool single = attend_single && end - begin == 1;
    const int64_t groups = single && whole ? cache.groups : 1;
    for (int64_t token = begin; token < end; token += stretch)
      for (int64_t group = 0; group < cache.groups; group += groups) {
        const int64_t offset = group * shape.shared * cache.head_size;
        const Item item{query + token * shape.query_stride + offset,
                        out + token * shape.out_stride + offset,
                        sequences.tables + b * sequences.table_width, group, groups, std::min(stretch, end - token),
                        context - end + token, context};
        works.push_back({item, single ? attend_single : attend});
      }
  }
  return works;
}

void attend(const std::vector<AttentionWork>& works, const Cache& cache, const Shape& shape, Member& member) {
  const auto count = static_cast<int64_t>(works.size());
  member.share(count, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) works[i].attend(cache, works[i].item, shape);
  });
}

namespace {

// query [T, H, D] bfloat16 with whole rows; caches as `cache_of` takes them.
// Sequence b has the queries from query_starts[b] to query_starts[b + 1], which are the last of its context_lens[b]
// positions (or, not causal, see all of them); block_tables [B, N]. `window` 0: none. Returns [T, H, D].
Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                       double scale, int64_t window, bool causal) {
  const Cache cache = cache_of(key_cache, value_cache);
  const int64_t heads = query.size(1), size = query.size(2);
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && has_whole_rows(query) && size == cache.head_size,
              "query is [T, H, D] bfloat16 with whole rows, D as the caches have it");
  auto result = at::empty({query.size(0), heads, size}, query.options());
  const Shape shape{heads / cache.groups, query.stride(0), heads * size, static_cast<float>(scale), window, causal};
  const auto works = attention_works(data(query), mutable_data(result), cache, shape,
                                     sequences_of(block_tables, query_starts, context_lens), at::get_num_threads());
  go_through(1, [&](Member member) { attend(works, cache, shape, member); });
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
