// Attention over the paged cache in pieces that anybody may do.
#pragma once

#include <vector>

#include "crew.h"
#include "paged_layout.h"

namespace slimpajama {

// Sequence b has the queries from starts[b] to starts[b + 1], the last of its contexts[b] positions.
struct Sequences {
  int64_t count;
  const int32_t *starts, *contexts;
  const int32_t* tables;  // [count, table_width], of blocks
  int64_t table_width;
};

inline Sequences sequences_of(const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens) {
  return {context_lens.size(0), query_starts.const_data_ptr<int32_t>(), context_lens.const_data_ptr<int32_t>(),
          block_tables.const_data_ptr<int32_t>(), block_tables.size(1)};
}

using Attend = void (*)(const Cache&, const Item&, const Shape&);

struct AttentionWork {
  Item item;
  Attend attend;
};

// What there is to do in a step, where query is [T, H, D] and out likewise. It is the same for caches and windows of
// other layers.
std::vector<AttentionWork> attention_works(const bf16* query, bf16* out, const Cache& cache, const Shape& shape,
                                           const Sequences& sequences, int64_t threads);

// Does it, each work a part: stretches late in a prompt see more than early ones.
void attend(const std::vector<AttentionWork>& works, const Cache& cache, const Shape& shape, Member& member);

// Writes a token's key and value [G, D] to a slot of the cache.
void store(const Cache& cache, const bf16* key, const bf16* value, int64_t slot);

}  // namespace slimpajama
