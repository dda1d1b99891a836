// The products of `multiply.h` on lanes: of x and of weights every 32 bits are opened (`kinds.h`) before they meet.
#pragma once

#include "kinds.h"

namespace slimpajama {

struct OpenedRows {
  const uint8_t* values;
  int64_t stride;  // bytes from row to row
};

// `count` rows of x with every 32 bits opened (`kinds.h`): what every block of panels would do again.
template <typename Kind>
OpenedRows open_rows(const Rows& x, int64_t first, int64_t count) {
  if constexpr (Kind::OPENED == 1) {
    return {x.row(first), x.stride};
  } else {
    static thread_local Kept<uint32_t> kept;
    const int64_t width = x.groups * Kind::OPENED;
    uint32_t* numbers = grown(kept, count * width);
    for (int64_t row = 0; row < count; ++row) Kind::open_x(x.row(first + row), x.groups, numbers + row * width);
    return {reinterpret_cast<const uint8_t*>(numbers), width * 4};
  }
}

// The sums of ROWS rows by PANELS panels.
template <typename Kind, int ROWS, int PANELS>
LANES INLINE void add_up_lanes(int64_t groups, OpenedRows rows, Fetching ahead, const Weights& w, int64_t panel,
                               typename Kind::Lanes (&sums)[ROWS][PANELS]) {
  using lanes::PARTS;
  const uint8_t* lines = w.panel(panel);
  const int64_t panel_stride = w.groups * LINE;
  const uint8_t* next = w.panel(panel + PANELS) + ahead.begin;
  for (int64_t g = 0; g < groups; ++g) {
    if constexpr (ROWS > 1)  // with one row there is nothing to do meanwhile
      for (int j = 0; j < PANELS; ++j) __builtin_prefetch(next + j * panel_stride + g * ahead.step);
#pragma GCC unroll 2
    for (int number = 0; number < Kind::OPENED; ++number) {
      asm volatile("" : : : "memory");  // lines are read anew: kept for the next number they would cost registers
      typename Kind::Lanes weights[PANELS];
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; ++j)
        EACH_PART {
          const uint8_t* line = lines + j * panel_stride + g * LINE + p * lanes::REGISTER;
          weights[j].part[p] = Kind::open_weights(lanes::part_at<lanes::IntPart>(line), number);
        }
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        typename Kind::Lane value;
        std::memcpy(&value, rows.values + i * rows.stride + (g * Kind::OPENED + number) * 4, 4);
        const auto broadcast = lanes::part_of(value);
#pragma GCC unroll 4
        for (int j = 0; j < PANELS; ++j)
          EACH_PART lanes::add_product(sums[i][j].part[p], broadcast, weights[j].part[p]);
      }
    }
  }
}

template <typename Kind, int ROWS, int PANELS>
LANES void block_lanes(const Rows& x, OpenedRows rows, Fetching ahead, const Weights& w, const Output& out, int64_t row,
                       int64_t panel) {
  typename Kind::Lanes sums[ROWS][PANELS] = {};
  if constexpr (Kind::IN_GROUPS) Kind::template add_up_lanes<ROWS, PANELS>(x.groups, rows, ahead, w, panel, sums);
  else add_up_lanes<Kind, ROWS, PANELS>(x.groups, rows, ahead, w, panel, sums);
  typename Kind::Lanes finished[ROWS][PANELS];
  std::memcpy(finished, sums, sizeof sums);
  asm volatile("" : : "r"(finished) : "memory");  // calls would take registers from the sums, in the loop too
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < PANELS; ++j) {
      const int64_t first = (panel + j) * PANEL;
      lanes::Floats result[] = {Kind::worth(finished[i][j], x, w, row + i, first)};
      lanes::put_panels(out, row + i, first, result);
    }
}

template <typename Kind, int ROWS, int PANELS>
LANES void panels_lanes(const Rows& x, OpenedRows rows, Fetching ahead, const Weights& w, const Output& out, int64_t row,
                        int64_t panel, int64_t end) {
  for (; panel + PANELS <= end; panel += PANELS) block_lanes<Kind, ROWS, PANELS>(x, rows, ahead, w, out, row, panel);
  if constexpr (PANELS > 1) panels_lanes<Kind, ROWS, PANELS / 2>(x, rows, ahead, w, out, row, panel, end);
}

// `count` rows from `first` on, by the panels from `begin` to `end`.
template <typename Kind>
LANES void multiply_opened(const Rows& x, OpenedRows rows, const Weights& w, const Output& out, int64_t first,
                           int64_t count, int64_t begin, int64_t end) {
  // As many panels at a time as leave the sums enough registers, and enough sums that none is waited for.
  constexpr decltype(&panels_lanes<Kind, 1, 1>) OF_HEIGHT[] = {
      panels_lanes<Kind, 1, Kind::IN_GROUPS ? 2 : 4>, panels_lanes<Kind, 2, 2>, panels_lanes<Kind, 3, 2>,
      panels_lanes<Kind, 4, 1>, panels_lanes<Kind, 5, 1>, panels_lanes<Kind, 6, 1>};
  constexpr int64_t HIGH = std::size(OF_HEIGHT);
  const int64_t blocks = (count + HIGH - 1) / HIGH;
  const int64_t together = blocks == 1 ? end - begin : 1;  // a panel stays in the cache until all rows have met it
  for (int64_t panel = begin; panel < end; panel += together)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = count * block / blocks, height = count * (block + 1) / blocks - row;
      const auto ahead = Fetching::share_of(block, blocks, x.groups, w.group_bytes);
      OF_HEIGHT[height - 1](x, {rows.values + row * rows.stride, rows.stride}, ahead, w, out, first + row, panel,
                            panel + together);
    }
}

template <typename Kind>
LANES void multiply_lanes(const Rows& x, const Weights& w, const Output& out, int64_t begin, int64_t end) {
  constexpr int64_t MOST = 120;  // rows whose opened x stays in the cache
  const int64_t parts = (x.m + MOST - 1) / MOST;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = x.m * part / parts, count = x.m * (part + 1) / parts - first;
    multiply_opened<Kind>(x, open_rows<Kind>(x, first, count), w, out, first, count, 2 * begin, 2 * end);
  }
}

}  // namespace slimpajama
