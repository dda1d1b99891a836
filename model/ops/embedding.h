// What an encoder's layers begin with: of three tables a row each, added up and normalized.
//
// Legend: T tokens, E hidden size.
#pragma once

#include <optional>

#include "projection.h"
#include "rows.h"

namespace slimpajama {

// Tables [rows, E], all of float32 or of bfloat16: of tokens, of their types and of their positions, of which the last
// two may be missing.
struct Tables {
  std::optional<Tensor> rows[3];
  Norm norm{};

  // Whether each of the numbers [T] is that of a row; nothing is asked where there is no table.
  void check(const Tensor (&numbers)[3]) const {
    for (int64_t i = 0; i < 3; ++i) {
      TORCH_CHECK(numbers[i].scalar_type() == at::kLong && numbers[i].is_contiguous() &&
                  numbers[i].numel() == numbers[0].numel(), "ids, types and positions are int64 [T]");
      if (!rows[i]) continue;
      const auto* number = numbers[i].const_data_ptr<int64_t>();
      for (int64_t t = 0; t < numbers[i].numel(); ++t)
        TORCH_CHECK_INDEX(0 <= number[t] && number[t] < rows[i]->size(0), "row ", number[t], " of a table of ",
                          rows[i]->size(0));
    }
  }
};

template <typename Value>
class Embedding {
 public:
  Embedding(const Tables& tables, const Tensor (&numbers)[3], int64_t e) : norm_(tables.norm), e_(e) {
    for (int64_t i = 0; i < 3; ++i) {
      numbers_[i] = numbers[i].const_data_ptr<int64_t>();
      tables_[i] = tables.rows[i] ? static_cast<const Value*>(tables.rows[i]->const_data_ptr()) : nullptr;
    }
  }

  // The states of tokens from `begin` to `end`, into `out` [end - begin, E]; `sum` [E] is written to.
  void run(int64_t begin, int64_t end, float* sum, Value* out) const {
    const auto add = FASTEST(add_rows<Value>);
    const auto normalize = FASTEST(layer_norm<Value>);
    for (int64_t token = begin; token < end; ++token, out += e_) {
      if (token + 1 < end) fetch(tables_[0] + numbers_[0][token + 1] * e_);
      const Value* rows[3];
      for (int64_t i = 0; i < 3; ++i) rows[i] = tables_[i] ? tables_[i] + numbers_[i][token] * e_ : nullptr;
      add(rows, e_, sum);
      normalize(sum, e_, norm_, out);
    }
  }

 private:
  // The tokens' table is large, and where the next row of it lies nobody could guess.
  void fetch(const Value* row) const {
    for (int64_t i = 0; i < e_; i += LINE / sizeof(Value)) __builtin_prefetch(row + i);
  }

  const Value* tables_[3];
  const int64_t* numbers_[3];
  Norm norm_;
  int64_t e_;
};

}  // namespace slimpajama
