// Writing to the paged cache.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "narrow_strips.h"
#include "paged_attention.h"

namespace slimpajama {

namespace {

// A head's key or value to its place in a strip, of which `target` is the first number.
template <typename Number>
void put_key(const Number* key, int64_t size, Number* target) {
  for (int64_t i = 0; i < size; i += 2, target += 2 * STRIP) std::memcpy(target, key + i, 2 * sizeof(Number));
}

template <typename Number>
void put_value(const Number* value, int64_t size, Number* target) {
  for (int64_t i = 0; i < size; i += 16, target += 16 * STRIP)
    for (int64_t lane = 0; lane < 16; ++lane) target[2 * lane] = value[i + lane];
}

template <typename Put>
void put_narrow(const bf16* row, int64_t size, bf16* strip, int64_t slot, int64_t place, const Put& put) {
  auto* numbers = reinterpret_cast<uint8_t*>(strip);
  uint8_t steps[MAX_SIZE];
  reinterpret_cast<float*>(numbers + STRIP * size)[slot % STRIP] = narrow_row(row, size, steps);
  for (int64_t i = 0; i < size; ++i) steps[i] ^= 128;  // less 128, as a number with a sign
  put(steps, size, numbers + place);
}

}  // namespace

void store(const Cache& c, const bf16* key, const bf16* value, int64_t slot) {
  if (!c.has_strips()) {
    const int64_t size = c.groups * c.head_size;
    std::memcpy(c.keys + slot * size, key, size * sizeof(bf16));
    std::memcpy(c.values + slot * size, value, size * sizeof(bf16));
    return;
  }
  const int64_t size = c.head_size, key_place = c.key_in_strip(slot, 0), value_place = c.value_in_strip(slot, 0);
  for (int64_t group = 0; group < c.groups; ++group, key += size, value += size) {
    bf16 *keys = c.keys + c.strip_at(slot, group), *values = c.values + c.strip_at(slot, group);
    if (c.narrow) {
      put_narrow(key, size, keys, slot, key_place, put_key<uint8_t>);
      put_narrow(value, size, values, slot, value_place, put_value<uint8_t>);
    } else {
      put_key(key, size, keys + key_place);
      put_value(value, size, values + value_place);
    }
  }
}

namespace {

// key and value [M, G, D] (views with whole rows) to `slots` [M] of the caches (`cache_of`).
void store_all(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
               const Tensor& slots) {
  const Cache cache = cache_of(key_cache, value_cache);
  TORCH_CHECK(key.scalar_type() == at::kBFloat16 && has_whole_rows(key) && has_whole_rows(value) &&
                  key.size(1) == cache.groups && key.size(2) == cache.head_size,
              "keys and values are [M, G, D] bfloat16 with whole rows, as the caches have them");
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
