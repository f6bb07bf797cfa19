// int8 products of two rows and more with ARM's matrix instruction: two rows by two outputs, eight inputs at a time. Sums
// of integers are exact, and the rest is done in the order of int8_blocks, so a row has the same bits as there. Part of
// kernels_matmul.hpp.
#pragma once

namespace {

// Fewer rows are faster without it.
constexpr int kLeastI8mmRows = 2;

// Rows that one pass over half a block computes, limited by registers.
constexpr int kI8mmRows = 8;

// Eight of a block's outputs, from `half` * 8 on: two registers of each line of weights.
template <int Rows>
void i8mm_half(const PackedView& w, const Operand& x, int row, int block, int half, float* out, int stride) {
  constexpr int kPairs = (Rows + 1) / 2;
  const uint8_t* weights = w.data + block * w.block_bytes + half * 2 * 16;
  const uint8_t* scales = w.data + block * w.block_bytes + size_t(w.groups) * kGroup * kLanes;
  const size_t width = size_t(x.groups) * kGroup;
  const int8_t* values = x.int8_row(row);
  float32x4_t total[Rows][2] = {};
  for (int g = 0; g < w.groups; g++, values += kGroup, weights += kGroup * kLanes) {
    // Of a pair of rows and a pair of outputs: first row, first row, second row, second row.
    int32x4_t sums[kPairs][4] = {};
#pragma GCC unroll 2
    for (int k = 0; k < kGroup; k += 8) {
      const uint8_t* line = weights + k * kLanes;
      prefetch(line + kAhead);
      prefetch(line + kAhead + 64);
      int8x16_t outputs[4];
      for (int i = 0; i < 2; i++) {
        const int32x4_t first = vreinterpretq_s32_s8(signed_weights(vld1q_u8(line + 16 * i)));
        const int32x4_t second = vreinterpretq_s32_s8(signed_weights(vld1q_u8(line + 64 + 16 * i)));
        outputs[2 * i] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
        outputs[2 * i + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
      }
      for (int p = 0; p < kPairs; p++) {
        const int8_t* upper = values + size_t(2 * p) * width + k;
        const int8_t* lower = 2 * p + 1 < Rows ? upper + width : upper;
        const int8x16_t rows = vcombine_s8(vld1_s8(upper), vld1_s8(lower));
        for (int i = 0; i < 4; i++) sums[p][i] = vmmlaq_s32(sums[p][i], rows, outputs[i]);
      }
    }
    const auto* of_group = reinterpret_cast<const uint16_t*>(scales) + g * kLanes + half * 8;
    for (int i = 0; i < 2; i++) {
      const float32x4_t scale = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(of_group + 4 * i), 16));
      for (int m = 0; m < Rows; m++) {
        const int64x2_t left = vreinterpretq_s64_s32(sums[m / 2][2 * i]);
        const int64x2_t right = vreinterpretq_s64_s32(sums[m / 2][2 * i + 1]);
        const int32x4_t sum = vreinterpretq_s32_s64(m % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right));
        const float32x4_t both = vmulq_f32(scale, vdupq_n_f32(x.scales[x.index(row + m, g)]));
        total[m][i] = vfmaq_f32(total[m][i], vcvtq_f32_s32(sum), both);
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    const int first = half * 8 + 4 * i;
    const float32x4_t bias = w.bias ? vld1q_f32(w.bias + block * kLanes + first) : vdupq_n_f32(0);
    for (int m = 0; m < Rows; m++)
      vst1q_f32(out + size_t(m) * stride + first, vfmaq_f32(bias, total[m][i], vdupq_n_f32(x.factors[row + m])));
  }
}

void i8mm_matmul(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out,
                 int stride) {
  for (int block = first_block; block < last_block; block++)
    for (int row = 0; row < rows; row += kI8mmRows)
      with_constant<kI8mmRows>(rows - row < kI8mmRows ? rows - row : kI8mmRows, [&](auto count) {
        for (int half = 0; half < 2; half++)
          i8mm_half<count.value>(w, x, row, block, half, out + size_t(row) * stride + block * kLanes, stride);
      });
}

}  // namespace
