// Writing to the paged cache.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "common.h"
#include "operators.h"

namespace slimpajama {

// key and value [M, G, D] (views with whole rows) to `slots` [M] of the caches [blocks, block_size, G, D].
void store(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
           const Tensor& slots) {
  TORCH_CHECK(key.scalar_type() == at::kBFloat16 && key.stride(2) == 1 && key.stride(1) == key.size(2) &&
                  value.stride(2) == 1 && value.stride(1) == value.size(2) && key_cache.is_contiguous() &&
                  value_cache.is_contiguous() && key_cache.scalar_type() == at::kBFloat16,
              "keys and values are [M, G, D] bfloat16 with whole rows, caches are contiguous");
  const int64_t m = key.size(0), size = key.size(1) * key.size(2);
  const bf16 *keys = data(key), *values = data(value);
  bf16 *cached_keys = mutable_data(key_cache), *cached_values = mutable_data(value_cache);
  const int64_t *targets = slots.const_data_ptr<int64_t>(), key_stride = key.stride(0), value_stride = value.stride(0);
  at::parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(cached_keys + targets[row] * size, keys + row * key_stride, size * sizeof(bf16));
      std::memcpy(cached_values + targets[row] * size, values + row * value_stride, size * sizeof(bf16));
    }
  });
}

}  // namespace slimpajama

TORCH_LIBRARY_FRAGMENT(slimpajama, library) {
  library.def(
      "store(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(slimpajama, CPU, library) {
  library.impl("store", slimpajama::store);
}
