// How keys and values lie in the paged cache, and what attention is asked for.
//
// A block is cut into strips of 16 positions, a strip into its key heads. Under a head keys are [D / 2][16 positions][2]
// and values [D / 16][8 pairs of positions][16][2]: the lines of 64 bytes that packed weights have (`projection.h`), so
// that both products of attention read them as they are. Heads and blocks that do not divide so are [position][G][D].
#pragma once

#include "common.h"

namespace slimpajama {

constexpr int64_t STRIP = 16;      // positions
constexpr int64_t MAX_SIZE = 256;  // of a head that is cut into lines

struct Cache {
  bf16 *keys, *values;
  int64_t block_size, groups, head_size;

  bool has_strips() const { return head_size % 32 == 0 && head_size <= MAX_SIZE && block_size % STRIP == 0; }
  int64_t strip_size() const { return STRIP * head_size; }  // of one head

  // Where the strip of a slot is under a key head, from the beginning of the cache.
  int64_t strip_at(int64_t slot, int64_t group) const { return (slot / STRIP * groups + group) * strip_size(); }

  // Where a number of a slot's key is, from the beginning of the keys; likewise of a value.
  int64_t key_at(int64_t slot, int64_t group, int64_t i) const {
    if (!has_strips()) return (slot * groups + group) * head_size + i;
    return strip_at(slot, group) + (i / 2 * STRIP + slot % STRIP) * 2 + i % 2;
  }
  int64_t value_at(int64_t slot, int64_t group, int64_t i) const {
    if (!has_strips()) return (slot * groups + group) * head_size + i;
    return strip_at(slot, group) + i / 16 * 16 * STRIP + slot % STRIP / 2 * 32 + i % 16 * 2 + slot % 2;
  }
};

struct Item {
  const bf16* query;      // of its first token, first head of the group
  bf16* out;              // the same place in the result
  const int32_t* blocks;  // the sequence's
  int64_t group, groups;  // key heads: the first, and how many
  int64_t tokens;
  int64_t position;  // of the first token
  int64_t context;   // keys of the sequence

  int64_t slot_of(const Cache& c, int64_t at) const {
    return blocks[at / c.block_size] * c.block_size + at % c.block_size;
  }
};

struct Shape {
  int64_t shared;  // query heads of a key head
  int64_t query_stride, out_stride;
  float scale;
  int64_t window;  // 0: none
  bool causal;
};

// Keys that the token at `position` sees, from `first` to before `end`.
struct Sight {
  int64_t first, end;
};

inline Sight sight(const Item& item, const Shape& shape, int64_t position) {
  const int64_t end = shape.causal ? position + 1 : item.context;
  if (shape.window == 0) return {0, end};
  return {std::max<int64_t>(0, position - shape.window + 1), std::min(end, position + shape.window)};
}

// A strip that is wanted soon, keys or values, under all the item's key heads: its lines are fetched a few at a time
// between other work, as a core that has asked for many waits for them.
class Ahead {
 public:
  // Nothing, if the strip at `start` is not before `end`.
  Ahead(const bf16* cache, const Cache& c, const Item& item, int64_t start, int64_t end) {
    if (start >= end) return;
    next_ = cache + c.strip_at(item.slot_of(c, start), item.group);
    end_ = next_ + item.groups * c.strip_size();
  }

  // Has the next `lines` fetched.
  INLINE void fetch(int64_t lines) {
    for (int64_t i = 0; i < lines && next_ < end_; ++i, next_ += 32) __builtin_prefetch(next_);
  }

 private:
  const bf16 *next_ = nullptr, *end_ = nullptr;
};

}  // namespace slimpajama
