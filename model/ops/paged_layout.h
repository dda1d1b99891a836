// How keys and values lie in the paged cache, and what attention is asked for.
//
// A block is cut into strips of 16 positions, a strip into its key heads. Under a head keys are [D / 2][16 positions][2]
// and values [D / 16][8 pairs of positions][16][2]: the lines of 64 bytes that packed weights have (`projection.h`), so
// that both products of attention read them as they are. In 8 bits a strip's numbers lie so, too, and behind them are the
// positions' scales (`narrow_strips.h`). Heads and blocks that do not divide so are [position][G][D].
#pragma once

#include "common.h"

namespace slimpajama {

constexpr int64_t STRIP = 16;      // positions
constexpr int64_t MAX_SIZE = 256;  // of a head that is cut into lines
constexpr int64_t SCALE_BYTES = 4;

struct Cache {
  bf16 *keys, *values;  // or 8 bits, of which two are counted as one of these
  int64_t block_size, groups, head_size;
  bool narrow;  // whether they are 8 bits: only where there are strips

  bool has_strips() const { return head_size % 32 == 0 && head_size <= MAX_SIZE && block_size % STRIP == 0; }
  // Of one head.
  int64_t strip_size() const { return narrow ? STRIP * (head_size + SCALE_BYTES) / 2 : STRIP * head_size; }

  // Where the strip of a slot is under a key head, from the beginning of the cache.
  int64_t strip_at(int64_t slot, int64_t group) const { return (slot / STRIP * groups + group) * strip_size(); }

  // Where a number of a slot's key is in the strip; likewise of a value.
  static int64_t key_in_strip(int64_t slot, int64_t i) { return (i / 2 * STRIP + slot % STRIP) * 2 + i % 2; }
  static int64_t value_in_strip(int64_t slot, int64_t i) {
    return i / 16 * 16 * STRIP + slot % STRIP / 2 * 32 + i % 16 * 2 + slot % 2;
  }
};

// Of `keys` and `values` in a tensor [.., blocks, block_size, G, D] of bfloat16, or of 8 bits, where D is followed by
// SCALE_BYTES.
inline Cache cache_of(const Tensor& tensor, void* keys, void* values) {
  const bool narrow = tensor.scalar_type() == at::kChar;
  TORCH_CHECK((narrow || tensor.scalar_type() == at::kBFloat16) && tensor.dim() >= 4 && tensor.is_contiguous(),
              "caches are contiguous, in bfloat16 or 8 bits");
  const Cache found{static_cast<bf16*>(keys), static_cast<bf16*>(values), tensor.size(-3), tensor.size(-2),
                    tensor.size(-1) - (narrow ? SCALE_BYTES : 0), narrow};
  TORCH_CHECK(!narrow || found.has_strips(), "8 bits are for heads of a multiple of 32 and blocks of a multiple of 16");
  return found;
}

inline Cache cache_of(const Tensor& keys, const Tensor& values) {
  TORCH_CHECK(keys.sizes() == values.sizes() && keys.scalar_type() == values.scalar_type() && values.is_contiguous(),
              "keys and values have caches that are alike");
  return cache_of(keys, keys.data_ptr(), values.data_ptr());
}

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
