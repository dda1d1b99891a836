// AMX: eight tile registers of up to 16 rows of 64 bytes, and their shapes, which every thread sets for itself.
//
// A thread that is done gives the tiles back (`_tile_release`), so that nobody saves them at its next switch.
#pragma once

#include "common.h"

#if HAS_X86
#define AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")))

namespace slimpajama {

constexpr int64_t TILE_BYTES = 16 * 64;

struct alignas(64) TileShapes {  // as ldtilecfg reads it
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 4 and 5 hold rows of x, `upper` and `lower` of them; 0, 1 and 2, 3 their sums; 6 and 7 weights, always whole.
AMX inline void configure_tiles(int64_t upper, int64_t lower) {
  TileShapes shapes;
  shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = static_cast<uint8_t>(upper);
  shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = static_cast<uint8_t>(lower);
  // GCC takes the instruction to read eight bytes, and might not write the others.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

AMX inline void release_tiles() { _tile_release(); }

}  // namespace slimpajama
#endif
