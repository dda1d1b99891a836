// The operators that others are made of; each is described where it is defined.
#pragma once

#include <optional>

#include "common.h"

namespace slimpajama {

Tensor linear_bf16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n, bool wide);
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scales, const Tensor& sums,
                   const std::optional<Tensor>& bias, int64_t n, bool wide);
Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double epsilon);
Tensor silu_mul(const Tensor& gate_up);
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin);
void store(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
           const Tensor& slots);
Tensor paged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                       const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens,
                       double scale, int64_t window, bool causal);

}  // namespace slimpajama
