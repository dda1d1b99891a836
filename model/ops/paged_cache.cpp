// Writing to the paged cache.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "paged_attention.h"

namespace slimpajama {

void store(const Cache& c, const bf16* key, const bf16* value, int64_t slot) {
  if (!c.has_strips()) {
    const int64_t size = c.groups * c.head_size;
    std::memcpy(c.keys + slot * size, key, size * sizeof(bf16));
    std::memcpy(c.values + slot * size, value, size * sizeof(bf16));
    return;
  }
  for (int64_t group = 0; group < c.groups; ++group, key += c.head_size, value += c.head_size) {
    bf16* target = c.keys + c.key_at(slot, group, 0);
    for (int64_t i = 0; i < c.head_size; i += 2, target += 2 * STRIP) std::memcpy(target, key + i, 2 * sizeof(bf16));
    target = c.values + c.value_at(slot, group, 0);
    for (int64_t i = 0; i < c.head_size; i += 16, target += 16 * STRIP)
      for (int64_t lane = 0; lane < 16; ++lane) target[2 * lane] = value[i + lane];
  }
}

namespace {

// key and value [M, G, D] (views with whole rows) to `slots` [M] of the caches [blocks, block_size, G, D], which lie as
// `paged_layout.h` says.
void store_all(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
               const Tensor& slots) {
  TORCH_CHECK(key.scalar_type() == at::kBFloat16 && has_whole_rows(key) && has_whole_rows(value) &&
                  key_cache.is_contiguous() && value_cache.is_contiguous() && key_cache.scalar_type() == at::kBFloat16,
              "keys and values are [M, G, D] bfloat16 with whole rows, caches are contiguous");
  const Cache cache{mutable_data(key_cache), mutable_data(value_cache), key_cache.size(1), key.size(1), key.size(2)};
  const bf16 *keys = data(key), *values = data(value);
  const int64_t *targets = slots.const_data_ptr<int64_t>(), key_stride = key.stride(0), value_stride = value.stride(0);
  at::parallel_for(0, key.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      store(cache, keys + row * key_stride, values + row * value_stride, targets[row]);
  });
}

}  // namespace

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "store(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("store", slimpajama::store_all);
}
