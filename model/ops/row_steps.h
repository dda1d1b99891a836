// What is done to a row between the products, in float32, sixteen numbers at a time; included by `rows.h` once for each
// width of registers, which gives `Floats`, its functions and the attribute VECTORS.
//
// Legend: E hidden size, F inner size.

// Has step(i, 16) called for the sixteen numbers from i on, and step(i, count) for the last of a row if they are fewer.
template <typename Step>
VECTORS INLINE void by_sixteen(int64_t end, const Step& step) {
  int64_t i = 0;
  for (; i + 16 <= end; i += 16) step(i, 16);
  if (i < end) step(i, end - i);
}

// Likewise step(i, count, turn), turn 0 and 1: of two sums neither waits for the other.
template <typename Step>
VECTORS INLINE void in_turn(int64_t end, const Step& step) {
  int64_t i = 0;
  for (; i + 32 <= end; i += 32) {
    step(i, 16, 0);
    step(i + 16, 16, 1);
  }
  by_sixteen(end - i, [&](int64_t j, int64_t count) VECTORS INLINED { step(i + j, count, 0); });
}

// --- exponentials and activations

VECTORS INLINE Floats exp_of(Floats x) {  // e^x, relative error below 2e-7 (Cephes' polynomial); of NaN NaN
  x = smaller(all(88.0f), greater(all(-87.0f), x));
  const Floats n = rounded(x * all(LOG2_E));
  Floats r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + all(1.0f));
  return times_power(p, n);
}

VECTORS INLINE Floats exp2_of(Floats x) {  // relative error below 4e-5; of -inf 0, of NaN NaN
  x = greater(all(-200.0f), x);
  const Floats n = rounded(x), r = x - n;
  Floats p = all(9.6181291e-3f);
  p = fma(p, r, all(5.5504109e-2f));
  p = fma(p, r, all(2.4022651e-1f));
  p = fma(p, r, all(6.9314718e-1f));
  p = fma(p, r, all(1.0f));
  return times_power(p, n);
}

VECTORS INLINE Floats silu(Floats x) { return x / (all(1.0f) + exp_of(zeros() - x)); }

// x / (1 + e^(-2 u)), u the argument of the hyperbolic tangent.
VECTORS INLINE Floats gelu_tanh(Floats x) {
  const Floats cubic = fma(x * x, all(0.044715f), all(1.0f));
  return x / (all(1.0f) + exp_of((x * cubic) * all(-2.0f * 0.79788456f)));
}

template <int PANELS>
VECTORS INLINE void activate(Activation activation, Floats (&x)[PANELS]) {
  const auto each = [&](const auto& step) VECTORS INLINED {
#pragma GCC unroll 4
    for (int j = 0; j < PANELS; ++j) step(x[j]);
  };
  switch (activation) {
    case Activation::none: return;
    case Activation::gelu: return each([](Floats& x) VECTORS INLINED { x = gelu(x); });
    case Activation::gelu_tanh: return each([](Floats& x) VECTORS INLINED { x = gelu_tanh(x); });
    case Activation::relu: return each([](Floats& x) VECTORS INLINED { x = greater(zeros(), x); });  // NaN stays NaN
    case Activation::silu: return each([](Floats& x) VECTORS INLINED { x = silu(x); });
  }
}

// One row's sums for the outputs of panels side by side, of which `first` is the first.
template <bool WHOLE, int PANELS>
VECTORS INLINE void put(const Output& out, int64_t row, int64_t first, Floats (&x)[PANELS]) {
  const auto each = [&](const auto& step) VECTORS INLINED {
#pragma GCC unroll 4
    for (int j = 0; j < PANELS; ++j)
      step(x[j], first + j * PANEL, WHOLE ? PANEL : std::clamp<int64_t>(out.n - first - j * PANEL, 0, PANEL));
  };
  const auto add = [&](const auto* values) VECTORS INLINED {
    each([&](Floats& x, int64_t i, int64_t count) VECTORS INLINED { x = x + widen_some(values + i, count); });
  };
  const auto write = [&](auto* target) VECTORS INLINED {
    each([&](Floats x, int64_t i, int64_t count) VECTORS INLINED { narrow_some(target + i, count, x); });
  };
  if (out.bias) add(out.bias);
  activate(out.activation, x);
  if (out.added_wide) add(out.added_wide + row * out.n);
  if (out.added_narrow) add(out.added_narrow + row * out.n);
  if (out.wide) write(out.wide + row * out.stride);
  else write(out.narrow + row * out.stride);
}

// Likewise; whether the panels are `WHOLE`, all 16 outputs of each being wanted, is asked once.
template <int PANELS>
VECTORS INLINE void put_panels(const Output& out, int64_t row, int64_t first, Floats (&x)[PANELS]) {
  if (first + PANELS * PANEL <= out.n) put<true>(out, row, first, x);
  else put<false>(out, row, first, x);
}

VECTORS inline void silu_mul(const bf16* gate, const bf16* up, int64_t f, bf16* out) {  // silu(gate) * up
  by_sixteen(f, [&](int64_t i, int64_t count) VECTORS INLINED {
    narrow_some(out + i, count, silu(widen_some(gate + i, count)) * widen_some(up + i, count));
  });
}

template <typename Value>
VECTORS void gate_mul(Activation activation, const Value* gate, const Value* up, int64_t f, Value* out) {
  by_sixteen(f, [&](int64_t i, int64_t count) VECTORS INLINED {
    Floats x[] = {widen_some(gate + i, count)};  // activation(gate) * up
    activate(activation, x);
    narrow_some(out + i, count, x[0] * widen_some(up + i, count));
  });
}

// --- halves of float32 (`kinds.h`)

// Of `each` numbers, a multiple of 16, first the nearest bfloat16 and then what those leave: NaN where one is infinite.
VECTORS inline void split(const float* x, int64_t k, int64_t each, bf16* out) {
  for (int64_t begin = 0; begin < k; begin += each, out += 2 * each)
    for (int64_t i = 0; i < each; i += 16) {
      const Floats whole = widen(x + begin + i), nearest = as_bf16(whole);
      narrow(out + i, nearest);
      narrow(out + each + i, whole - nearest);
    }
}

// --- norms

template <typename Row, typename Value>
VECTORS INLINE void norm_row(const Row* row, int64_t e, const Norm& norm, Value* out) {  // arXiv 1607.06450
  Floats sums[] = {zeros(), zeros()}, squares[] = {zeros(), zeros()};
  in_turn(e, [&](int64_t i, int64_t count, int turn) VECTORS INLINED {
    sums[turn] = sums[turn] + widen_some(row + i, count);
  });
  const float mean = sum_of(sums[0] + sums[1]) / static_cast<float>(e);
  in_turn(e, [&](int64_t i, int64_t count, int turn) VECTORS INLINED {
    const Floats distance = widen_some(row + i, count) - all(mean);
    const Floats own = count == 16 ? distance : chosen(0, count, distance, 0.0f);
    squares[turn] = fma(own, own, squares[turn]);
  });
  const float variance = sum_of(squares[0] + squares[1]) / static_cast<float>(e);
  const Floats factor = all(1.0f / std::sqrt(variance + norm.epsilon));
  by_sixteen(e, [&](int64_t i, int64_t count) VECTORS INLINED {
    const Floats standard = (widen_some(row + i, count) - all(mean)) * factor;
    narrow_some(out + i, count, fma(standard, widen_some(norm.weight + i, count), widen_some(norm.bias + i, count)));
  });
}

template <typename Value>
VECTORS void layer_norm(const float* row, int64_t e, const Norm& norm, Value* out) {
  norm_row(row, e, norm, out);
}

// Likewise of a row that is no sum; `out` may be the row itself.
template <typename Value>
VECTORS void layer_norm_of(const Value* row, int64_t e, const Norm& norm, Value* out) {
  norm_row(row, e, norm, out);
}

// sum = the sum of `count` rows side by side.
template <typename Value>
VECTORS void sum_rows(const Value* rows, int64_t count, int64_t e, float* sum) {
  by_sixteen(e, [&](int64_t i, int64_t width) VECTORS INLINED {
    Floats x = zeros();
    for (int64_t row = 0; row < count; ++row) x = x + widen_some(rows + row * e + i, width);
    narrow_some(sum + i, width, x);
  });
}

// sum = the rows that there are, the first of which there is.
template <typename Value>
VECTORS void add_rows(const Value* const (&rows)[3], int64_t e, float* sum) {
  by_sixteen(e, [&](int64_t i, int64_t count) VECTORS INLINED {
    Floats x = widen_some(rows[0] + i, count);
    if (rows[1]) x = x + widen_some(rows[1] + i, count);
    if (rows[2]) x = x + widen_some(rows[2] + i, count);
    narrow_some(sum + i, count, x);
  });
}

// The sum of some rows, each times its share, in their order.
VECTORS inline void mix_rows(const float* const* rows, const float* shares, int64_t count, int64_t e, bf16* out) {
  by_sixteen(e, [&](int64_t i, int64_t width) VECTORS INLINED {
    Floats x = zeros();
    for (int64_t row = 0; row < count; ++row) x = fma(widen_some(rows[row] + i, width), all(shares[row]), x);
    narrow_some(out + i, width, x);
  });
}

// Adds `more` to the values in place, if there is any, then writes values / rms(values) * weights (arXiv 1910.07467).
VECTORS inline void add_rms_norm(bf16* values, const bf16* more, const bf16* weights, int64_t e, float epsilon,
                                 bf16* out) {
  Floats squares = zeros();
  by_sixteen(e, [&](int64_t i, int64_t count) VECTORS INLINED {
    Floats x = widen_some(values + i, count);
    if (more) {
      x = as_bf16(x + widen_some(more + i, count));
      narrow_some(values + i, count, x);
    }
    squares = fma(x, x, squares);
  });
  const Floats scale = all(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(e) + epsilon));
  by_sixteen(e, [&](int64_t i, int64_t count) VECTORS INLINED {
    const Floats standard = as_bf16(widen_some(values + i, count) * scale);  // before the weight, as others have it
    narrow_some(out + i, count, standard * widen_some(weights + i, count));
  });
}

// --- positions

// Turns a head's first 2 `half` numbers by their cosines and signed sines, halves paired.
VECTORS inline void rotate(bf16* head, const bf16* cosines, const bf16* sines, int64_t half) {
  by_sixteen(half, [&](int64_t i, int64_t count) VECTORS INLINED {
    const int64_t j = i + half;
    const Floats a = widen_some(head + i, count), b = widen_some(head + j, count);
    narrow_some(head + i, count, fma(a, widen_some(cosines + i, count), b * widen_some(sines + i, count)));
    narrow_some(head + j, count, fma(b, widen_some(cosines + j, count), a * widen_some(sines + j, count)));
  });
}

// Likewise by `half` cosines and as many sines.
template <typename Value>
VECTORS void turn(Value* head, const float* cosines, const float* sines, int64_t half) {
  by_sixteen(half, [&](int64_t i, int64_t count) VECTORS INLINED {
    const Floats a = widen_some(head + i, count), b = widen_some(head + half + i, count);
    const Floats cosine = widen_some(cosines + i, count), sine = widen_some(sines + i, count);
    narrow_some(head + i, count, a * cosine - b * sine);
    narrow_some(head + half + i, count, fma(b, cosine, a * sine));
  });
}

// --- softmax

// `len` scores, a multiple of 16, -infinity where there is nothing; up to `padded_len` follow zeros.
template <typename Value>
VECTORS void softmax(float* scores, int64_t len, int64_t padded_len, float scale, Value* out) {
  Floats top = widen(scores);
  for (int64_t j = 16; j < len; j += 16) top = greater(top, widen(scores + j));
  const Floats largest = all(greatest(top)), factor = all(scale);
  Floats sum = zeros();
  for (int64_t j = 0; j < len; j += 16) {
    const Floats power = exp_of((widen(scores + j) - largest) * factor);
    sum = sum + power;
    narrow(scores + j, power);
  }
  const Floats inverse = all(1.0f / sum_of(sum));
  for (int64_t j = 0; j < len; j += 16) narrow(out + j, widen(scores + j) * inverse);
  for (int64_t j = len; j < padded_len; j += 16) narrow(out + j, zeros());
}

// Of a block of keys those from `begin` to `end` are seen: their scores become weights, the others' zeros, up to
// `count` (to the next 32).
template <typename Value>
VECTORS SoftmaxSum weigh(const float* scores, int64_t begin, int64_t end, int64_t count, float scale, Value* weights) {
  const auto seen = [&](int64_t k, Floats x, float other) VECTORS {
    return chosen(std::clamp<int64_t>(begin - k, 0, 16), std::clamp<int64_t>(end - k, 0, 16), x, other);
  };
  Floats top = all(-INFINITY);
  for (int64_t k = begin / 16 * 16; k < end; k += 16) top = greater(top, seen(k, widen(scores + k), -INFINITY));
  const float largest = greatest(top) * scale;
  Floats sum = zeros();
  for (int64_t k = 0; k < (count + 31) / 32 * 32; k += 16) {
    const Floats weight = seen(k, exp2_of(fma(widen(scores + k), all(scale), all(-largest))), 0.0f);
    sum = sum + weight;
    narrow(weights + k, weight);
  }
  return {largest, sum_of(sum)};
}

// Multiplies `count` numbers, a multiple of 16, by a factor each.
template <typename Value>
VECTORS void multiply_each(const float* factors, int64_t count, Value* values) {
  for (int64_t i = 0; i < count; i += 16) narrow(values + i, widen(values + i) * widen(factors + i));
}

// Adds a block's sum, and its weighted values `found`, to those of the blocks before it.
VECTORS inline void merge(const float* found, SoftmaxSum block, int64_t size, SoftmaxSum& so_far, float* sums) {
  const float now = std::max(so_far.largest, block.largest);
  const float keep = so_far.largest == -INFINITY ? 0.0f : std::exp2(so_far.largest - now);
  const float add = std::exp2(block.largest - now);
  so_far = {now, so_far.total * keep + block.total * add};
  for (int64_t i = 0; i < size; i += 16)
    narrow(sums + i, fma(widen(sums + i), all(keep), widen(found + i) * all(add)));
}

VECTORS inline void write_shares(const float* sums, float total, int64_t size, bf16* out) {
  for (int64_t i = 0; i < size; i += 16) narrow(out + i, widen(sums + i) * all(1.0f / total));
}

// --- 8 bits

VECTORS INLINE Floats scaled(const bf16* x, const float* factors, int64_t i, int64_t count) {
  const Floats values = widen_some(x + i, count);
  return factors ? values * widen_some(factors + i, count) : values;
}

VECTORS inline Range range_of(const bf16* x, int64_t k, const float* factors) {
  Floats least[] = {zeros(), zeros()}, most[] = {zeros(), zeros()}, sums[] = {zeros(), zeros()};
  in_turn(k, [&](int64_t i, int64_t count, int turn) VECTORS INLINED {
    const Floats values = scaled(x, factors, i, count);
    least[turn] = smaller(least[turn], values);
    most[turn] = greater(most[turn], values);
    sums[turn] = sums[turn] + values;  // NaN if one of them is, or if two are infinite
  });
  if (any_nan(sums[0] + sums[1])) return {0.0f, NAN};
  return {smallest(smaller(least[0], least[1])), greatest(greater(most[0], most[1]))};
}

// `zero` is what the least value becomes 0 by: no number is below.
VECTORS inline void quantize(const bf16* x, int64_t k, const float* factors, float inverse, float zero, uint8_t* out) {
  by_sixteen(k, [&](int64_t i, int64_t count) VECTORS INLINED {
    narrow_some(out + i, count, rounded(scaled(x, factors, i, count) * all(inverse)) + all(zero));
  });
}
