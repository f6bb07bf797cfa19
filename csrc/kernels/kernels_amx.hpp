// Products in AMX tiles: in int8 a group of 64 inputs of sixteen outputs has the layout of a tile, and sixteen rows take
// the time of one. Sums of integers are exact, and the rest is done in the order of int8_blocks and int4_blocks, so a row
// has the same bits as there. Part of kernels_matmul.hpp.
#pragma once

namespace {

// Fewer rows are faster without tiles.
constexpr int kLeastAmxRows = 3, kLeastAmxInt4Rows = 9;

// How far ahead weights are prefetched, into the first-level cache.
constexpr size_t kTileAhead = 3 * 1024;

// Tiles 2 and 3 have sixteen rows, of weights or of keys and values, the others as many as there are rows of inputs.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // A row of inputs has `depth` bytes.
  explicit TileConfig(int count, int depth = 64) {
    for (int tile = 0; tile < 8; tile++) {
      row_bytes[tile] = tile < 2 ? uint16_t(depth) : 64;
      rows[tile] = uint8_t(tile == 2 || tile == 3 ? depth / 4 : count);
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
      const uint8_t* next = tile + prefetch_distance<Blocks>(w, g * kTile, kTileAhead);
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

// The same for int4: the 32 inputs of a group make a tile half as deep, whose numbers are unpacked in memory first.
template <int Rows, int Blocks>
void amx_int4_blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  constexpr size_t kTile = kHalf * kLanes;
  const uint8_t* weights = w.data + block * w.block_bytes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  const int groups = 2 * w.groups;
  // A group is unpacked while the one before is multiplied, and the one before that is added to the totals.
  alignas(64) uint8_t unpacked[2][Blocks][kTile];
  alignas(64) int32_t sums[2][Blocks][Rows][kLanes];
  Floats total[Blocks][Rows] = {};

  const auto unpack = [&](int g) {
    for (int b = 0; b < Blocks; b++) {
      const uint8_t* packed = weights + b * w.block_bytes + g * kHalfBytes;
      const uint8_t* next = packed + prefetch_distance<Blocks>(w, g * kHalfBytes, kTileAhead);
      for (size_t line = 0; line < kHalfBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T0);
      for (size_t line = 0; line < kTile / 128; line++) {
        const Bytes eight = load_bytes(packed + 64 * line);
        _mm512_store_si512(unpacked[g % 2][b] + 128 * line, low_nibbles(eight));
        _mm512_store_si512(unpacked[g % 2][b] + 128 * line + 64, high_nibbles(eight));
      }
      finish_writes(unpacked[g % 2][b]);
    }
  };
  const auto multiply = [&](int g) {
    _tile_loadd(0, values + size_t(g) * kHalf, width);
    for (int b = 0; b < Blocks; b++) {
      const uint8_t* tile = unpacked[g % 2][b];
      int32_t* const to = sums[g % 2][b][0];
      if (b == 0) FASTMTP_PRODUCT(2, tile, 4, to);
      if (b == 1) FASTMTP_PRODUCT(3, tile, 5, to);
    }
  };
  const auto accumulate = [&](int g) {
    for (int b = 0; b < Blocks; b++) {
      const uint8_t* packed = weights + b * w.block_bytes + g * kHalfBytes;
      const auto* scales = reinterpret_cast<const uint16_t*>(packed + kHalfWords);
      const Floats step = load_bf16(scales), least = load_bf16(scales + kLanes);
      for (int m = 0; m < Rows; m++) {
        const size_t index = x.index(row + m, g);
        const Floats all = splat(static_cast<float>(x.sums[index]));
        const Floats product = fma(to_floats(_mm512_load_si512(sums[g % 2][b][m])), step, mul(all, least));
        total[b][m] = fma(product, splat(x.scales[index]), total[b][m]);
      }
    }
  };
  unpack(0);
  for (int g = 0; g < groups; g++) {
    if (g + 1 < groups) unpack(g + 1);
    multiply(g);
    if (g > 0) accumulate(g - 1);
  }
  accumulate(groups - 1);
  store_totals(total, w, block, x.factors + row, out, stride);
}

template <int Rows, int Blocks>
void amx_some_blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  if (w.type == Type::int8)
    amx_blocks<Rows, Blocks>(w, x, row, block, out, stride);
  else
    amx_int4_blocks<Rows, Blocks>(w, x, row, block, out, stride);
}

void amx_matmul(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out,
                int stride) {
  for (int row = 0; row < rows; row += kLanes) {
    const int count = rows - row < kLanes ? rows - row : kLanes;
    const TileConfig config(count, w.type == Type::int8 ? kGroup : kHalf);
    finish_writes(&config);
    _tile_loadconfig(&config);
    float* of_row = out + size_t(row) * stride;
    int block = first_block;
    // Two blocks together if there are registers for their totals.
    if (count <= kLanes / 2)
      for (; block + 2 <= last_block; block += 2)
        with_constant<kLanes / 2>(count, [&](auto rows) {
          amx_some_blocks<rows.value, 2>(w, x, row, block, of_row + block * kLanes, stride);
        });
    for (; block < last_block; block++)
      with_constant<kLanes>(count, [&](auto rows) {
        amx_some_blocks<rows.value, 1>(w, x, row, block, of_row + block * kLanes, stride);
      });
  }
  _tile_release();
}

}  // namespace
