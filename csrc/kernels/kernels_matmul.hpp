// Matrix products: each weight is loaded once for all rows of a tile; and the rounding of rows for them.
// Part of kernels.cpp, which states the rules for all of it.
#pragma once

namespace {

constexpr size_t kAhead = 16 * 1024;

// One of the passes over a block, each for some of the rows. They take turns in prefetching the groups `ahead` bytes of
// theirs, so that memory is read during all of them, not during the first alone. No line of weights or scales may be
// left out: to wait for one takes as long as to read many.
struct Pass {
  int index, count;
  size_t ahead;

  // How far ahead of group g to prefetch; 0, which is in the cache, where another pass does it.
  size_t distance(int g) const { return g % count == index ? ahead : 0; }
};

// How far ahead of a kilobyte of weights to prefetch if several blocks are computed together: the next kilobyte of
// each of them, and at their ends the beginnings of the next blocks.
template <int Blocks>
inline size_t prefetch_distance(const PackedView& w, int part, int parts) {
  constexpr size_t kPart = kGroup * kLanes;
  return part + 1 < parts ? kPart : Blocks * w.block_bytes - (parts - 1) * kPart;
}

// The same, at an offset in a block, for what is read `ahead` bytes before.
template <int Blocks>
inline size_t prefetch_distance(const PackedView& w, size_t offset, size_t ahead) {
  return ahead + (offset + ahead < w.block_bytes ? 0 : (Blocks - 1) * w.block_bytes);
}

// Stores the totals of some blocks, by the rows' factors and with their bias.
template <int Rows, int Blocks>
[[gnu::always_inline]] inline void store_totals(const Floats (&total)[Blocks][Rows], const PackedView& w, int block,
                                                const float* factors, float* out, int stride) {
  for (int b = 0; b < Blocks; b++) {
    const Floats bias = w.bias ? load(w.bias + (block + b) * kLanes) : splat(0.0f);
    for (int m = 0; m < Rows; m++)
      store(out + size_t(m) * stride + b * kLanes, fma(total[b][m], splat(factors[m]), bias));
  }
}

template <int Rows, int Blocks>
void int8_blocks(const PackedView& w, const Operand& x, int row, int block, Pass pass, float* out, int stride) {
  const uint8_t* weights = w.data + block * w.block_bytes;
  const uint8_t* scales = weights + size_t(w.groups) * kGroup * kLanes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  Floats total[Blocks][Rows] = {};
  for (int g = 0; g < w.groups; g++) {
    const uint8_t* next = weights + (Blocks > 1 ? prefetch_distance<Blocks>(w, g, w.groups) : pass.distance(g));
    // A line has the scales of two groups.
    if (g % 2 == 0)
      for (int b = 0; b < Blocks; b++)
        prefetch(scales + b * w.block_bytes + (Blocks > 1 ? Blocks * w.block_bytes : pass.ahead));
    Ints sums[Blocks][Rows];
    for (int b = 0; b < Blocks; b++)
      for (int m = 0; m < Rows; m++) sums[b][m] = splat_int(x.sums[x.index(row + m, g)]);
#pragma GCC unroll kUnroll
    for (int k = 0; k < kGroup; k += 4) {
      for (int b = 0; b < Blocks; b++) {
        const size_t line = b * w.block_bytes + k * kLanes;
        prefetch(next + line);
        const Bytes four = load_bytes(weights + line);
        for (int m = 0; m < Rows; m++) sums[b][m] = dot4(sums[b][m], four, values + m * width + k);
      }
    }
    for (int b = 0; b < Blocks; b++) {
      const Floats scale = load_bf16(reinterpret_cast<const uint16_t*>(scales + b * w.block_bytes));
      for (int m = 0; m < Rows; m++) {
        const Floats both = mul(scale, splat(x.scales[x.index(row + m, g)]));
        total[b][m] = fma(to_floats(sums[b][m]), both, total[b][m]);
      }
    }
    weights += kGroup * kLanes;
    scales += 2 * kLanes;
    values += kGroup;
  }
  store_totals(total, w, block, x.factors + row, out, stride);
}

template <int Rows, int Blocks>
void int4_blocks(const PackedView& w, const Operand& x, int row, int block, Pass pass, float* out, int stride) {
  constexpr size_t kNear = kGroup * kLanes;
  const uint8_t* weights = w.data + block * w.block_bytes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  const int groups = 2 * w.groups;
  Floats total[Blocks][Rows] = {};
  for (int g = 0; g < groups; g++) {
    const uint8_t* next =
        weights + (Blocks > 1 ? prefetch_distance<Blocks>(w, g * kHalfBytes, kNear) : pass.distance(g));
    SmallInts sums[Blocks][Rows] = {};
#pragma GCC unroll kUnroll
    for (int k = 0; k < kHalf; k += 8)
      for (int b = 0; b < Blocks; b++) {
        const size_t line = b * w.block_bytes + k / 8 * 4 * kLanes;
        prefetch(next + line);
        const Bytes eight = load_bytes(weights + line), low = low_nibbles(eight), high = high_nibbles(eight);
        for (int m = 0; m < Rows; m++) sums[b][m] = dot4_small(sums[b][m], low, values + m * width + k);
        for (int m = 0; m < Rows; m++) sums[b][m] = dot4_small(sums[b][m], high, values + m * width + k + 4);
      }
    for (int b = 0; b < Blocks; b++) {
      const size_t line = b * w.block_bytes + kHalfWords;
      prefetch(next + line);
      const auto* scales = reinterpret_cast<const uint16_t*>(weights + line);
      const Floats step = load_bf16(scales), least = load_bf16(scales + kLanes);
      for (int m = 0; m < Rows; m++) {
        const size_t index = x.index(row + m, g);
        const Floats all = splat(static_cast<float>(x.sums[index]));
        const Floats product = fma(to_floats(to_ints(sums[b][m])), step, mul(all, least));
        total[b][m] = fma(product, splat(x.scales[index]), total[b][m]);
      }
    }
    weights += kHalfBytes;
    values += kHalf;
  }
  store_totals(total, w, block, x.factors + row, out, stride);
}

template <int Rows, int Blocks>
void bf16_blocks(const PackedView& w, const Operand& x, int row, int block, Pass pass, float* out, int stride) {
  const uint8_t* weights = w.data + block * w.block_bytes;
  const uint16_t* values = x.bf16_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  Floats total[Blocks][Rows] = {};
  for (int g = 0; g < 2 * w.groups; g++) {
    const uint8_t* next = weights + (Blocks > 1 ? prefetch_distance<Blocks>(w, g, 2 * w.groups) : pass.distance(g));
#pragma GCC unroll kUnroll
    for (int k = 0; k < kGroup / 2; k += 2) {
      for (int b = 0; b < Blocks; b++) {
        const size_t line = b * w.block_bytes + 2 * k * kLanes;
        prefetch(next + line);
        const Bytes two = load_bytes(weights + line);
        for (int m = 0; m < Rows; m++) total[b][m] = dot2(total[b][m], two, values + m * width + k);
      }
    }
    weights += kGroup * kLanes;
    values += kGroup / 2;
  }
  store_totals(total, w, block, x.factors + row, out, stride);
}

template <int Rows, int Blocks>
void blocks(const PackedView& w, const Operand& x, int row, int block, Pass pass, float* out, int stride) {
  if (w.type == Type::int8)
    int8_blocks<Rows, Blocks>(w, x, row, block, pass, out, stride);
  else if (w.type == Type::bf16)
    bf16_blocks<Rows, Blocks>(w, x, row, block, pass, out, stride);
  else
    int4_blocks<Rows, Blocks>(w, x, row, block, pass, out, stride);
}

template <int Rows>
void tiles(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out, int stride) {
  // With few rows several blocks are computed together: more streams from memory at once, in registers that are free.
  constexpr int kFew = (Rows + 1) / kBlocksTogether;
  const int passes = (rows - 1) / Rows + 1;
  // The first of several passes should find all of its block prefetched.
  const size_t ahead = passes > 1 && kAhead < w.block_bytes ? w.block_bytes : kAhead;
  int block = first_block;
  if (rows <= kFew)
    for (; block + kBlocksTogether <= last_block; block += kBlocksTogether)
      with_constant<kFew>(rows, [&](auto count) {
        blocks<count.value, kBlocksTogether>(w, x, 0, block, {0, 1, ahead}, out + block * kLanes, stride);
      });
  for (; block < last_block; block++)
    for (int pass = 0; pass < passes; pass++) {
      const int row = pass * Rows;
      with_constant<Rows>(rows - row < Rows ? rows - row : Rows, [&](auto count) {
        float* to = out + size_t(row) * stride + block * kLanes;
        blocks<count.value, 1>(w, x, row, block, {pass, passes, ahead}, to, stride);
      });
    }
}

}  // namespace

#ifdef __AMX_INT8__
#include "kernels_amx.hpp"
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
#include "kernels_i8mm.hpp"
#endif

namespace {

void matmul(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out,
            int stride) {
#ifdef __AMX_INT8__
  if ((w.type == Type::int8 && rows >= kLeastAmxRows) || (w.type == Type::int4 && rows >= kLeastAmxInt4Rows))
    return amx_matmul(w, x, rows, first_block, last_block, out, stride);
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
  if (w.type == Type::int8 && rows >= kLeastI8mmRows)
    return i8mm_matmul(w, x, rows, first_block, last_block, out, stride);
#endif
  if (w.type == Type::int8)
    tiles<kInt8TileRows>(w, x, rows, first_block, last_block, out, stride);
  else
    tiles<kTileRows>(w, x, rows, first_block, last_block, out, stride);
}

// The orthonormal Walsh-Hadamard transform of a group, which spreads its outliers (see matrix.hpp).
inline void spread(Floats x[kGroup / kLanes]) {
  static_assert(kGroup / kLanes == 4);
  alignas(64) static constexpr float kSigns[4][kLanes] = {
      {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
      {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
      {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
      {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1},
  };
  for (int i = 0; i < 4; i++) {
    x[i] = fma(x[i], load(kSigns[0]), swap<1>(x[i]));
    x[i] = fma(x[i], load(kSigns[1]), swap<2>(x[i]));
    x[i] = fma(x[i], load(kSigns[2]), swap<4>(x[i]));
    x[i] = fma(x[i], load(kSigns[3]), swap<8>(x[i]));
  }
  const Floats a = add(x[0], x[1]), b = sub(x[0], x[1]), c = add(x[2], x[3]), d = sub(x[2], x[3]);
  const Floats eighth = splat(0.125f);
  x[0] = mul(add(a, c), eighth);
  x[1] = mul(add(b, d), eighth);
  x[2] = mul(sub(a, c), eighth);
  x[3] = mul(sub(b, d), eighth);
}

// Rounds a group to steps of a 127th of the largest `size` in it.
template <int Count, Floats (&size)(Floats)>
void quantize(Floats* lanes, int8_t* values, float& scale, int32_t& sum_of_values) {
  Floats most = size(lanes[0]), total = splat(0.0f);
  for (int i = 1; i < Count; i++) most = max(most, size(lanes[i]));
  const float top = largest(most), inverse = top > 1e-30f ? 127.0f / top : 0.0f;
  for (int i = 0; i < Count; i++) {
    const Floats rounded = nearest(mul(lanes[i], splat(inverse)));
    store_int8(values + i * kLanes, rounded);
    total = add(total, rounded);  // exact for integers this small
  }
  scale = top / 127.0f;
  sum_of_values = static_cast<int32_t>(sum(total));
}

void convert(Type type, const float* x, const float* gain, int size, const Operand& operand, int row, int group) {
  Floats lanes[kGroup / kLanes];
  for (int i = 0; i < kGroup / kLanes; i++) {
    const int start = i * kLanes, left = size - start;
    lanes[i] = load_some(x + start, left);
    if (gain) lanes[i] = mul(lanes[i], load_some(gain + start, left));
  }
  if (type == Type::bf16) {
    for (int i = 0; i < kGroup / kLanes; i++)
      store_bf16(operand.bf16_row(row) + group * kGroup + i * kLanes, lanes[i]);
    return;
  }
  int8_t* values = operand.int8_row(row) + group * kGroup;
  if (type == Type::int8) {
    const size_t index = operand.index(row, group);
    spread(lanes);
    quantize<kGroup / kLanes, room>(lanes, values, operand.scales[index], operand.sums[index]);
    operand.sums[index] = dot_start(operand.sums[index]);
    return;
  }
  for (int half = 0; half < 2; half++) {
    const size_t index = operand.index(row, 2 * group + half);
    quantize<kHalf / kLanes, abs>(lanes + half * kHalf / kLanes, values + half * kHalf, operand.scales[index],
                                  operand.sums[index]);
  }
}

}  // namespace
