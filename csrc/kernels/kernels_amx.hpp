// int8 products in AMX tiles: a group of 64 inputs of sixteen outputs has the layout of a tile, and sixteen rows take
// the time of one. Sums of integers are exact, and the rest is done in the order of int8_blocks, so a row has the same
// bits as there. Part of kernels_matmul.hpp.
#pragma once

namespace {

// Fewer rows are faster without tiles.
constexpr int kLeastAmxRows = 3;

// How far ahead weights are prefetched, into the first-level cache.
constexpr size_t kTileAhead = 3 * 1024;

// Tiles 2 and 3 have sixteen rows, of weights or of keys and values, the others as many as there are rows of inputs.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int count) {
    for (int tile = 0; tile < 8; tile++) {
      row_bytes[tile] = 64;
      rows[tile] = uint8_t(tile == 2 || tile == 3 ? 16 : count);
    }
  }
};

// Completes writes that the tiles load: GCC does not know which memory its intrinsics read.
inline void finish_writes(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Multiplies tile 0, the rows, by a tile of weights; a macro, since the intrinsics take literals only.
#define FASTMTP_PRODUCT(weights, tile, sums, out) \
  do {                                            \
    _tile_zero(sums);                             \
    _tile_loadd(weights, tile, 64);               \
    _tile_dpbsud(sums, 0, weights);               \
    _tile_stored(sums, out, 64);                  \
  } while (false)

template <int Rows, int Blocks>
void amx_blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  constexpr size_t kTile = kGroup * kLanes;
  const uint8_t* weights = w.data + block * w.block_bytes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  // Two groups alternate, so that one is stored while another is loaded.
  alignas(64) int32_t sums[2][Blocks][Rows][kLanes];
  Floats total[Blocks][Rows] = {};

  const auto multiply = [&](int g) {
    _tile_loadd(0, values + size_t(g) * kGroup, width);
    for (int b = 0; b < Blocks; b++) {
      const uint8_t* tile = weights + b * w.block_bytes + g * kTile;
      // At a block's end, the blocks after those that are computed together.
      const bool within = g * kTile + kTileAhead < w.block_bytes;
      const uint8_t* next = tile + kTileAhead + (within ? 0 : (Blocks - 1) * w.block_bytes);
      for (size_t line = 0; line < kTile; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T0);
      int32_t* const to = sums[g % 2][b][0];
      if (b == 0) FASTMTP_PRODUCT(2, tile, 4, to);
      if (b == 1) FASTMTP_PRODUCT(3, tile, 5, to);
    }
  };
  const auto accumulate = [&](int g) {
    for (int b = 0; b < Blocks; b++) {
      const uint8_t* scales = weights + b * w.block_bytes + w.groups * kTile;
      const Floats scale = load_bf16(reinterpret_cast<const uint16_t*>(scales) + g * kLanes);
      for (int m = 0; m < Rows; m++) {
        const size_t index = x.index(row + m, g);
        const Ints sum = _mm512_add_epi32(_mm512_load_si512(sums[g % 2][b][m]), splat_int(x.sums[index]));
        total[b][m] = fma(to_floats(sum), mul(scale, splat(x.scales[index])), total[b][m]);
      }
    }
  };
  multiply(0);
  for (int g = 1; g < w.groups; g++) {
    multiply(g);
    accumulate(g - 1);
  }
  accumulate(w.groups - 1);
  store_totals(total, w, block, x.factors + row, out, stride);
}

void amx_matmul(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out,
                int stride) {
  for (int row = 0; row < rows; row += kLanes) {
    const int count = rows - row < kLanes ? rows - row : kLanes;
    const TileConfig config(count);
    finish_writes(&config);
    _tile_loadconfig(&config);
    float* of_row = out + size_t(row) * stride;
    int block = first_block;
    // Two blocks together if there are registers for their totals.
    if (count <= kLanes / 2)
      for (; block + 2 <= last_block; block += 2)
        with_constant<kLanes / 2>(count, [&](auto rows) {
          amx_blocks<rows.value, 2>(w, x, row, block, of_row + block * kLanes, stride);
        });
    for (; block < last_block; block++)
      with_constant<kLanes>(count, [&](auto rows) {
        amx_blocks<rows.value, 1>(w, x, row, block, of_row + block * kLanes, stride);
      });
  }
  _tile_release();
}

}  // namespace
