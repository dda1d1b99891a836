// A layer's experts: gated SiLU MLPs of which a router chooses a few for each row, whose results are added up by their
// shares (arXiv 1701.06538, 2101.03961). One more may compute every row, whole or by a share of its own.
//
// Rows are gathered by expert, an expert's weights are read once for all of its rows, and a row's sum goes through its
// experts in the order in which they were chosen: its result does not depend, to a bit, on the rows beside it.
//
// Legend: T rows, E hidden size, X experts, the shared one included, C chosen for a row, F an expert's inner size. An
// entry is a row's with one of its experts; those of one expert lie side by side.
#pragma once

#include <torch/custom_class.h>

#include <vector>

#include "packed.h"
#include "rows.h"

namespace slimpajama {

// How a router's scores become a row's choice.
struct Routing {
  int64_t chosen;
  bool sigmoid;     // shares are each score's sigmoid; else softmax over all
  bool normalized;  // those of a row's experts are divided by their sum
  float scale;      // and then times this
  bool shared;      // the last expert computes every row,
  bool gated;       // by the sigmoid of the last score; else by one
};

struct Expert {
  Projection gate_up, down;

  int64_t inner() const { return down.k; }
};

// Rows in 8 bits.
struct NarrowRows {
  Kept<uint8_t> values;
  Kept<float> scales;
  Kept<int32_t> zeros;

  void grow(int64_t rows, int64_t bytes) {
    grown(values, bytes);
    grown(scales, rows);
    grown(zeros, rows);
  }

  void quantize(const bf16* x, int64_t k, int64_t row, int64_t at) {
    const Steps8 steps = quantize_row(x, k, nullptr, values.data() + at);
    scales[row] = steps.scale;
    zeros[row] = steps.zero;
  }

  Rows rows(int64_t first, int64_t count, int64_t groups, int64_t at) const {
    return {values.data() + at, count, groups, scales.data() + first, zeros.data() + first};
  }
};

class Experts;

// What is between the steps; kept from call to call.
struct MixingSpace {
  Kept<float> scores, shares;            // [T, scores of the router], [T, C + 1]
  Kept<int32_t> chosen;                  // [T, C]
  Kept<bf16> gathered, gate_up, gated;   // an entry's E, 2 F and F
  Kept<float> made;                      // an entry's E
  NarrowRows own, narrow, narrow_gated;  // the rows', the entries', and of what is gated

  void grow(int64_t rows, const Experts& experts);
};

class Experts : public torch::CustomClassHolder {
 public:
  explicit Experts(const Routing& routing) : routing(routing) {}

  // Of an expert's gate_up and down each four tensors (`projection_of`); inputs and outputs of both.
  void add(std::vector<Tensor> tensors, const std::vector<int64_t>& inputs, const std::vector<int64_t>& outputs);

  // Packed bfloat16, with an output for each expert that is chosen, and one for the shared one's gate if it has any; and
  // what is added to an expert's share where it is chosen by it (float32, empty if nothing is).
  void set_router(const Tensor& packed, const Tensor& bias);

  // x [T, E]
  Tensor run(const Tensor& x);

  int64_t count() const { return static_cast<int64_t>(experts.size()); }
  int64_t hidden() const { return experts[0].gate_up.k; }
  int64_t routed() const { return count() - routing.shared; }

  const Routing routing;
  Projection router{};
  const float* bias = nullptr;  // [X]
  std::vector<Expert> experts;

 private:
  std::vector<Tensor> kept_;  // that the experts point into
};

inline void MixingSpace::grow(int64_t rows, const Experts& experts) {
  const int64_t routed = rows * experts.routing.chosen, shared = experts.routing.shared * rows, all = routed + shared;
  const int64_t hidden = experts.hidden();
  const int64_t inner = routed * experts.experts[0].inner() + shared * experts.experts.back().inner();
  grown(scores, rows * experts.router.n);
  grown(shares, rows * (experts.routing.chosen + 1));
  grown(chosen, routed);
  grown(gathered, routed * hidden);
  grown(gate_up, 2 * inner);
  grown(gated, inner);
  grown(made, all * hidden);
  if (!experts.experts[0].gate_up.narrow) return;
  own.grow(rows, rows * padded(hidden, LINE));
  narrow.grow(routed, routed * padded(hidden, LINE));
  narrow_gated.grow(all, inner + all * LINE);
}

// Rows on their way through a layer's experts, in the hands of one of the threads that work on it.
class Mixing {
 public:
  static constexpr int64_t STEPS = 7, MOST_CHOSEN = 64;
  static constexpr float LEAST_SUM = 1e-20f;

  Mixing(const Experts& experts, Member& member, MixingSpace& space, int64_t rows)
      : experts_(experts), routing_(experts.routing), member_(member), space_(space), rows_(rows),
        hidden_(experts.hidden()), narrow_(experts.experts[0].gate_up.narrow) {}

  // x [T, E], out [T, E].
  void run(const bf16* x, bf16* out) {
    const Rows wide{reinterpret_cast<const uint8_t*>(x), rows_, experts_.router.weights.groups};
    project(member_, experts_.router, wide, {space_.scores.data(), nullptr, nullptr, experts_.router.n});
    each(rows_, [&](int64_t row) {
      choose(row);
      if (narrow_) space_.own.quantize(x + row * hidden_, hidden_, row, row * padded(hidden_, LINE));
    });
    group();
    if (rows_ > 1) each(rows_ * routing_.chosen, [&](int64_t entry) { gather(x, entry); });
    share_groups([](const Expert& expert) -> const Projection& { return expert.gate_up; },
                 [&](const Group& group, int64_t begin, int64_t end) {
      const Projection& projection = group.expert->gate_up;
      const Output target{nullptr, space_.gate_up.data() + 2 * group.at, nullptr, projection.n};
      projection.multiply(inputs(x, group), projection.weights, target, begin, end);
    });
    gate();
    share_groups([](const Expert& expert) -> const Projection& { return expert.down; },
                 [&](const Group& group, int64_t begin, int64_t end) {
      const Projection& projection = group.expert->down;
      const Output target{space_.made.data() + group.first * hidden_, nullptr, nullptr, hidden_};
      projection.multiply(gated(group), projection.weights, target, begin, end);
    });
    each(rows_, [&](int64_t row) { mix(row, out + row * hidden_); });
  }

 private:
  // An expert's entries: which is the first, how many, and where their inner values begin.
  struct Group {
    const Expert* expert;
    int64_t first, count, at, narrow_at;
  };

  template <typename Work>
  void each(int64_t count, const Work& work) {
    member_.share(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i);
    });
  }

  // A row's experts, the best first, and their shares, behind them the shared one's.
  void choose(int64_t row) {
    const int64_t routed = experts_.routed(), chosen = routing_.chosen;
    float* scores = space_.scores.data() + row * experts_.router.n;
    float* shares = space_.shares.data() + row * (chosen + 1);
    int32_t* experts = space_.chosen.data() + row * chosen;
    shares[chosen] = routing_.gated ? sigmoid(scores[routed]) : 1.0f;
    if (routing_.sigmoid) std::transform(scores, scores + routed, scores, sigmoid);
    else softmax(scores, routed);
    float sum = 0.0f;
    for (int64_t j = 0; j < chosen; ++j) {
      const int64_t best = best_but(scores, experts, j);
      experts[j] = static_cast<int32_t>(best);
      sum += shares[j] = scores[best];
    }
    const float factor = routing_.scale / (routing_.normalized ? std::max(sum, LEAST_SUM) : 1.0f);
    for (int64_t j = 0; j < chosen; ++j) shares[j] *= factor;
  }

  static float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

  static void softmax(float* values, int64_t size) {
    const float largest = *std::max_element(values, values + size);
    float sum = 0.0f;
    for (int64_t i = 0; i < size; ++i) sum += values[i] = std::exp(values[i] - largest);
    for (int64_t i = 0; i < size; ++i) values[i] /= sum;
  }

  // The best expert that is not among the first `count` of `taken`; of equal ones, and of no numbers, the first.
  int64_t best_but(const float* values, const int32_t* taken, int64_t count) const {
    const auto worth = [&](int64_t i) { return experts_.bias ? values[i] + experts_.bias[i] : values[i]; };
    int64_t best = -1;
    for (int64_t i = 0; i < experts_.routed(); ++i)
      if ((best < 0 || worth(i) > worth(best)) && std::find(taken, taken + count, i) == taken + count) best = i;
    return best;
  }

  // Finds the place of each entry, and the groups; every thread for itself.
  void group() {
    const int64_t chosen = routing_.chosen, entries = rows_ * chosen;
    std::vector<int64_t> ends(experts_.routed() + 1);
    for (int64_t i = 0; i < entries; ++i) ++ends[space_.chosen[i] + 1];
    for (int64_t expert = 0; expert < experts_.routed(); ++expert) {
      const int64_t count = ends[expert + 1];
      ends[expert + 1] += ends[expert];
      if (count) add_group(experts_.experts[expert], ends[expert], count);
    }
    if (routing_.shared) add_group(experts_.experts.back(), entries, rows_);
    places_.resize(entries);
    sources_.resize(entries);
    for (int64_t i = 0; i < entries; ++i) {
      places_[i] = ends[space_.chosen[i]]++;
      sources_[places_[i]] = i / chosen;
    }
  }

  void add_group(const Expert& expert, int64_t first, int64_t count) {
    const Group last = groups_.empty() ? Group{&expert, 0, 0, 0, 0} : groups_.back();
    groups_.push_back({&expert, first, count, last.at + last.count * last.expert->inner(),
                       last.narrow_at + last.count * padded(last.expert->inner(), LINE)});
  }

  void gather(const bf16* x, int64_t entry) {
    const int64_t row = sources_[entry], bytes = padded(hidden_, LINE);
    if (!narrow_) {
      std::copy_n(x + row * hidden_, hidden_, space_.gathered.data() + entry * hidden_);
      return;
    }
    std::copy_n(space_.own.values.data() + row * bytes, bytes, space_.narrow.values.data() + entry * bytes);
    space_.narrow.scales[entry] = space_.own.scales[row];
    space_.narrow.zeros[entry] = space_.own.zeros[row];
  }

  // What a group multiplies. A single row is every group's, and so are all rows the shared expert's.
  Rows inputs(const bf16* x, const Group& group) const {
    const bool own = rows_ == 1 || group.expert == shared();
    const int64_t groups = group.expert->gate_up.weights.groups, bytes = padded(hidden_, LINE);
    if (narrow_)
      return own ? space_.own.rows(0, group.count, groups, 0)
                 : space_.narrow.rows(group.first, group.count, groups, group.first * bytes);
    const bf16* values = own ? x : space_.gathered.data() + group.first * hidden_;
    return {reinterpret_cast<const uint8_t*>(values), group.count, groups};
  }

  Rows gated(const Group& group) const {
    const int64_t groups = group.expert->down.weights.groups;
    if (narrow_) return space_.narrow_gated.rows(group.first, group.count, groups, group.narrow_at);
    return {reinterpret_cast<const uint8_t*>(space_.gated.data() + group.at), group.count, groups};
  }

  const Expert* shared() const { return routing_.shared ? &experts_.experts.back() : nullptr; }

  void gate() {
    const auto step = FASTEST(silu_mul);
    const int64_t routed = rows_ * routing_.chosen, all = routed + routing_.shared * rows_;
    const int64_t inner = experts_.experts[0].inner(), width = padded(inner, LINE);
    const int64_t last_inner = experts_.experts.back().inner(), last_width = padded(last_inner, LINE);
    each(all, [&](int64_t entry) {
      const int64_t behind = std::max<int64_t>(entry - routed, 0), before = std::min(entry, routed);
      const int64_t own = entry < routed ? inner : last_inner, at = before * inner + behind * last_inner;
      const bf16* both = space_.gate_up.data() + 2 * at;
      bf16* target = space_.gated.data() + at;
      step(both, both + own, own, target);
      if (narrow_) space_.narrow_gated.quantize(target, own, entry, before * width + behind * last_width);
    });
  }

  // Has work(group, begin, end) called for all pairs of panels of the groups' projections.
  template <typename Of, typename Work>
  void share_groups(const Of& projection_of, const Work& work) {
    int64_t total = 0;
    for (const Group& group : groups_) total += projection_of(*group.expert).pairs();
    member_.share(total, [&](int64_t begin, int64_t end) {
      int64_t start = 0;  // of the group's among all
      for (const Group& group : groups_) {
        const int64_t pairs = projection_of(*group.expert).pairs();
        const int64_t first = std::max(begin - start, int64_t{0}), last = std::min(end - start, pairs);
        if (first < last) work(group, first, last);
        start += pairs;
      }
    });
  }

  void mix(int64_t row, bf16* out) const {
    const int64_t chosen = routing_.chosen;
    const float* rows[MOST_CHOSEN + 1];
    for (int64_t j = 0; j < chosen; ++j) rows[j] = space_.made.data() + places_[row * chosen + j] * hidden_;
    rows[chosen] = space_.made.data() + (rows_ * chosen + row) * hidden_;
    const float* shares = space_.shares.data() + row * (chosen + 1);
    FASTEST(mix_rows)(rows, shares, chosen + routing_.shared, hidden_, out);
  }

  const Experts& experts_;
  const Routing& routing_;
  Member& member_;
  MixingSpace& space_;
  const int64_t rows_, hidden_;
  const bool narrow_;
  std::vector<Group> groups_;
  std::vector<int64_t> places_, sources_;  // of a row's entries among all, and the row of each of those
};

}  // namespace slimpajama
