// Room that is kept from call to call.
//
// Large room lies in huge pages where Linux gives them, whole ones: results of many rows are written a line a row, each
// to a page of its own, and of small pages a core knows too few at a time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace slimpajama {

template <typename Number>
struct HugePageAllocator {
  using value_type = Number;

  static constexpr size_t PAGE = 1 << 21, LEAST = 1 << 19, ALIGNMENT = 64;  // bytes
  static_assert(alignof(Number) <= ALIGNMENT);

  HugePageAllocator() = default;
  template <typename Other>
  HugePageAllocator(const HugePageAllocator<Other>&) {}

  Number* allocate(size_t count) {
    const size_t bytes = count * sizeof(Number), unit = bytes < LEAST ? ALIGNMENT : PAGE;
    const size_t whole = (bytes + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, whole);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == PAGE) madvise(memory, whole, MADV_HUGEPAGE);  // advice: it may be declined
#endif
    return static_cast<Number*>(memory);
  }

  void deallocate(Number* memory, size_t) { std::free(memory); }

  template <typename Other>
  bool operator==(const HugePageAllocator<Other>&) const { return true; }
};

template <typename Number>
using Kept = std::vector<Number, HugePageAllocator<Number>>;

template <typename Number>
Number* grown(Kept<Number>& values, int64_t count) {
  if (static_cast<int64_t>(values.size()) < count) values.resize(count);
  return values.data();
}

}  // namespace slimpajama
