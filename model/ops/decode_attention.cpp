// Decode attention: one query per sequence over keys and values where they lie in the paged cache
// [blocks][block_size][G][D]. Softmax runs online (arXiv 1805.02867), a block at a time.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "vectors.h"

namespace {

using namespace slimpajama;

struct DecodeShape {
  int64_t heads, groups, head_size, block_size, max_blocks;
  float scale;
};

constexpr int64_t MAX_SHARED = 8;     // query heads that share a key head on the fast path
constexpr int64_t MAX_HEADS = 64;     // query heads, and
constexpr int64_t MAX_SUMS = 1 << 14;  // their sums, that one pass over a sequence keeps

struct Groups {  // key heads that are read in one pass
  int64_t begin, end;
};

void attend_plain(const bf16* query, const bf16* keys, const bf16* values, const int32_t* blocks, int64_t first,
                  int64_t length, Groups groups, const DecodeShape& s, bf16* out) {
  const int64_t d = s.head_size, per_group = s.heads / s.groups;
  std::vector<float> sum(d);
  for (int64_t h = groups.begin * per_group; h < groups.end * per_group; ++h) {
    const int64_t group = h / per_group;
    float largest = -INFINITY, total = 0.0f;
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t position = first; position < length; ++position) {
      const int64_t slot = blocks[position / s.block_size] * s.block_size + position % s.block_size;
      const bf16 *key = keys + (slot * s.groups + group) * d, *value = values + (slot * s.groups + group) * d;
      float score = 0.0f;
      for (int64_t i = 0; i < d; ++i) score += to_float(query[h * d + i]) * to_float(key[i]);
      score *= s.scale;
      const float now = std::max(largest, score), shrink = std::exp(largest - now), weight = std::exp(score - now);
      for (int64_t i = 0; i < d; ++i) sum[i] = sum[i] * shrink + weight * to_float(value[i]);
      total = total * shrink + weight;
      largest = now;
    }
    for (int64_t i = 0; i < d; ++i) out[h * d + i] = to_bf16(sum[i] / total);
  }
}

#if HAS_X86
// The 16 sums over lanes of 16 registers, by halving: lane t of the result is the sum of sums[t].
AVX512 inline __m512 sum_each(__m512 sums[16]) {
  const __m512i even = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const __m512i odd = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#pragma GCC unroll 8
  for (int t = 0; t < 8; ++t)  // lanes alternate between sums[2 t] and sums[2 t + 1]
    sums[t] = _mm512_add_ps(_mm512_permutex2var_ps(sums[2 * t], even, sums[2 * t + 1]),
                            _mm512_permutex2var_ps(sums[2 * t], odd, sums[2 * t + 1]));
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {  // pairs of lanes
    const __m512d first = _mm512_castps_pd(sums[2 * t]), second = _mm512_castps_pd(sums[2 * t + 1]);
    sums[t] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  }
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t)  // quarters, first of both registers' even ones, then of their odd ones
    sums[t] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[2 * t], sums[2 * t + 1], 0x88),
                            _mm512_shuffle_f32x4(sums[2 * t], sums[2 * t + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(sums[0], sums[1], 0x88), _mm512_shuffle_f32x4(sums[0], sums[1], 0xdd));
}

// 16 positions at a time, for all query heads of the key heads asked for: each key and value is read once. The head
// size is a multiple of 32, at most 256; at most MAX_SHARED heads share a key head here.
template <int CHUNKS>
AVX512 void attend_avx512(const bf16* query, const bf16* keys, const bf16* values, const int32_t* blocks,
                          int64_t first, int64_t length, Groups groups, const DecodeShape& s, bf16* out) {
  constexpr int64_t TILE = 16, D = 32 * CHUNKS;
  const int64_t shared = s.heads / s.groups, first_head = groups.begin * shared;
  const int64_t heads = (groups.end - groups.begin) * shared;
  float largest[MAX_HEADS], totals[MAX_HEADS];
  alignas(64) float sums[MAX_SUMS], weights[MAX_SHARED][TILE];
  for (int64_t h = 0; h < heads; ++h) largest[h] = -INFINITY, totals[h] = 0.0f;
  std::fill(sums, sums + heads * D, 0.0f);
  for (int64_t start = first; start < length; start += TILE) {
    const int64_t count = std::min(TILE, length - start);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    int64_t offsets[TILE];
    for (int64_t t = 0; t < TILE; ++t) {
      const int64_t position = start + std::min(t, count - 1);  // past the end: the last one again, with weight zero
      offsets[t] = (blocks[position / s.block_size] * s.block_size + position % s.block_size) * s.groups * D;
    }
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      const bf16 *group_keys = keys + group * D, *group_values = values + group * D;
      const int64_t h0 = (group - groups.begin) * shared;
      for (int64_t t = 0; t < TILE; ++t)  // one head's rows are far apart, which the hardware does not foresee
        for (int64_t i = 0; i < D; i += 32)
          _mm_prefetch(reinterpret_cast<const char*>(group_values + offsets[t] + i), _MM_HINT_T0);
      for (int64_t h = 0; h < shared; ++h) {
        const bf16* q = query + (first_head + h0 + h) * D;
        __m512 dots[TILE];
#pragma GCC unroll 16
        for (int64_t t = 0; t < TILE; ++t) {
          dots[t] = _mm512_setzero_ps();
          for (int c = 0; c < CHUNKS; ++c)
            dots[t] = _mm512_dpbf16_ps(dots[t], reinterpret_cast<__m512bh>(_mm512_loadu_si512(q + 32 * c)),
                                       reinterpret_cast<__m512bh>(_mm512_loadu_si512(group_keys + offsets[t] + 32 * c)));
        }
        const __m512 scores = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask,
                                                 _mm512_mul_ps(sum_each(dots), _mm512_set1_ps(s.scale)));
        float &top = largest[h0 + h], *sum = sums + (h0 + h) * D;
        const float now = std::max(top, _mm512_reduce_max_ps(scores));
        const __m512 tile = _mm512_maskz_mov_ps(mask, exp_avx512(_mm512_sub_ps(scores, _mm512_set1_ps(now))));
        const float shrink = top == -INFINITY ? 0.0f : std::exp(top - now);
        totals[h0 + h] = totals[h0 + h] * shrink + _mm512_reduce_add_ps(tile);
        top = now;
        _mm512_store_ps(weights[h], tile);
        if (shrink != 1.0f)
          for (int64_t i = 0; i < D; i += 16)
            _mm512_store_ps(sum + i, _mm512_mul_ps(_mm512_load_ps(sum + i), _mm512_set1_ps(shrink)));
      }
      for (int64_t i = 0; i < D; i += 16) {
        __m512 wide[TILE];
#pragma GCC unroll 16
        for (int64_t t = 0; t < TILE; ++t) wide[t] = widen(group_values + offsets[t] + i);
        for (int64_t h = 0; h < shared; ++h) {
          float* sum = sums + (h0 + h) * D + i;
          __m512 even = _mm512_load_ps(sum), odd = _mm512_setzero_ps();
#pragma GCC unroll 8
          for (int64_t t = 0; t < TILE; t += 2) {
            even = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][t]), wide[t], even);
            odd = _mm512_fmadd_ps(_mm512_set1_ps(weights[h][t + 1]), wide[t + 1], odd);
          }
          _mm512_store_ps(sum, _mm512_add_ps(even, odd));
        }
      }
    }
  }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < D; i += 16)
      narrow(out + (first_head + h) * D + i,
             _mm512_mul_ps(_mm512_load_ps(sums + h * D + i), _mm512_set1_ps(1.0f / totals[h])));
}

using Attend = void (*)(const bf16*, const bf16*, const bf16*, const int32_t*, int64_t, int64_t, Groups,
                        const DecodeShape&, bf16*);

Attend attend_for(const DecodeShape& s) {
  if (!has_avx512() || s.heads / s.groups > MAX_SHARED) return attend_plain;
  switch (s.head_size) {
    case 32: return attend_avx512<1>;
    case 64: return attend_avx512<2>;
    case 96: return attend_avx512<3>;
    case 128: return attend_avx512<4>;
    case 256: return attend_avx512<8>;
    default: return attend_plain;
  }
}
#endif

// query [B, H, D]; caches [blocks, block_size, G, D], all bfloat16; block_tables [B, max_blocks] and context_lens [B]
// int32. `window` 0 means none; else only the last `window` positions are seen. Returns [B, H, D].
Tensor decode_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_tables, const Tensor& context_lens, double scale, int64_t window) {
  TORCH_CHECK(query.scalar_type() == at::kBFloat16 && query.dim() == 3 && query.stride(2) == 1 &&
                  query.stride(1) == query.size(2) && key_cache.is_contiguous() && value_cache.is_contiguous(),
              "query is [B, H, D] bfloat16 with whole rows; caches are contiguous");
  const int64_t batch = query.size(0);
  const DecodeShape shape{query.size(1), key_cache.size(2), query.size(2), key_cache.size(1), block_tables.size(1),
                          static_cast<float>(scale)};
  auto result = at::empty({batch, shape.heads, shape.head_size}, query.options());
  const bf16 *keys = data(key_cache), *values = data(value_cache), *queries = data(query);
  bf16* out = mutable_data(result);
  const int32_t *tables = block_tables.const_data_ptr<int32_t>(), *lens = context_lens.const_data_ptr<int32_t>();
  const int64_t row_size = shape.heads * shape.head_size, query_stride = query.stride(0);
#if HAS_X86
  const Attend attend = attend_for(shape);
#else
  const auto attend = attend_plain;
#endif
  // Many sequences: a thread takes a whole one, and reads its cache from end to end. Few: they are split by key head.
  const bool whole = batch >= 2 * at::get_num_threads() && shape.heads <= MAX_HEADS && row_size <= MAX_SUMS;
  const int64_t parts = whole ? 1 : shape.groups, width = shape.groups / parts;
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / parts, group = item % parts * width, length = lens[b];
      const int64_t first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
      attend(queries + b * query_stride, keys, values, tables + b * shape.max_blocks, first, length,
             {group, group + width}, shape, out + b * row_size);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor context_lens, "
      "float scale, int window) -> Tensor");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("decode_attention", decode_attention);
}
