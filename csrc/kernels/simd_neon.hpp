// Sixteen lanes in four NEON registers, with the dot products of ARMv8.2, and those of bf16 if the compiler may use them;
// simd_portable.hpp defines each function.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kTileRows = 4, kInt8TileRows = 4, kUnroll = 4, kQueries = 4, kSums = 4;

struct Floats {
  float32x4_t part[4];
};
struct Ints {
  int32x4_t part[4];
};
struct Bytes {
  uint8x16_t part[4];
};

template <class F>
inline Floats each(F part) {
  return {part(0), part(1), part(2), part(3)};
}
template <class F>
inline Ints each_int(F part) {
  return {part(0), part(1), part(2), part(3)};
}
template <class F>
inline Bytes each_byte(F part) {
  return {part(0), part(1), part(2), part(3)};
}

inline Floats load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store(float* p, Floats x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.part[i]);
}
inline Floats splat(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
inline Floats add(Floats a, Floats b) { return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); }); }
inline Floats sub(Floats a, Floats b) { return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); }); }
inline Floats mul(Floats a, Floats b) { return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); }); }
inline Floats div(Floats a, Floats b) { return each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); }); }
inline Floats fma(Floats a, Floats b, Floats c) {
  return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
inline Floats max(Floats a, Floats b) { return each([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); }); }
inline Floats min(Floats a, Floats b) { return each([&](int i) { return vminq_f32(a.part[i], b.part[i]); }); }
inline Floats abs(Floats a) { return each([&](int i) { return vabsq_f32(a.part[i]); }); }
inline Floats nearest(Floats a) { return each([&](int i) { return vrndnq_f32(a.part[i]); }); }
inline Floats scale_by_power(Floats a, Floats n) {
  return each([&](int i) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.part[i]), vdupq_n_s32(127));
    return vmulq_f32(a.part[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  });
}

inline Floats keep(Floats x, int begin, int end, float other) {
  constexpr int32_t kFirst[4] = {0, 1, 2, 3};
  const int32x4_t first = vld1q_s32(kFirst);
  return each([&](int i) {
    const int32x4_t lane = vaddq_s32(first, vdupq_n_s32(4 * i));
    const uint32x4_t inside = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(begin)), vcltq_s32(lane, vdupq_n_s32(end)));
    return vbslq_f32(inside, x.part[i], vdupq_n_f32(other));
  });
}

template <int Distance>
inline Floats swap(Floats x) {
  if constexpr (Distance == 1) return each([&](int i) { return vrev64q_f32(x.part[i]); });
  if constexpr (Distance == 2) return each([&](int i) { return vextq_f32(x.part[i], x.part[i], 2); });
  return each([&](int i) { return x.part[i ^ Distance / 4]; });
}

// In the order of the other processors' functions.
inline float sum(Floats x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.part[0], x.part[2]), vaddq_f32(x.part[1], x.part[3]));
  return vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float largest(Floats x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}

inline Floats load_bf16(const uint16_t* p) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
// A bf16 in the upper half of each word; the lower halves are to be ignored.
inline uint32x4_t rounded_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
inline void store_bf16(uint16_t* p, Floats x) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vshrn_n_u32(rounded_bf16(x.part[i]), 16));
}
inline void store_int8(int8_t* p, Floats x) {
  const auto eight = [&](int i) {
    return vqmovn_s16(vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.part[i])), vqmovn_s32(vcvtnq_s32_f32(x.part[i + 1]))));
  };
  vst1q_s8(p, vcombine_s8(eight(0), eight(2)));
}

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
inline Bytes load_bytes(const uint8_t* p) { return each_byte([&](int i) { return vld1q_u8(p + 16 * i); }); }
inline Floats to_floats(Ints x) { return each([&](int i) { return vcvtq_f32_s32(x.part[i]); }); }

inline int32_t word_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

inline Floats room(Floats x) { return abs(x); }

// Weights are stored as w + 128; with the highest bit turned they are w.
inline int8x16_t signed_weights(uint8x16_t stored) { return vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80))); }
inline int32_t dot_start(int32_t) { return 0; }
inline Ints splat_int(int32_t x) { return each_int([&](int) { return vdupq_n_s32(x); }); }
inline Ints dot4(Ints total, Bytes weights, const int8_t* x) {
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word_at(x)));
  return each_int([&](int i) { return vdotq_s32(total.part[i], signed_weights(weights.part[i]), four); });
}

using SmallInts = Ints;
inline Ints to_ints(SmallInts x) { return x; }
inline SmallInts dot4_small(SmallInts total, Bytes weights, const int8_t* x) {
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word_at(x)));
  return each_int([&](int i) { return vdotq_s32(total.part[i], vreinterpretq_s8_u8(weights.part[i]), four); });
}
inline Bytes low_nibbles(Bytes x) {
  return each_byte([&](int i) { return vandq_u8(x.part[i], vdupq_n_u8(15)); });
}
inline Bytes high_nibbles(Bytes x) {
  return each_byte([&](int i) { return vshrq_n_u8(x.part[i], 4); });
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
inline Floats dot2(Floats total, Bytes weights, const uint16_t* x) {
  const bfloat16x8_t two = vreinterpretq_bf16_s32(vdupq_n_s32(word_at(x)));
  return each([&](int i) { return vbfdotq_f32(total.part[i], vreinterpretq_bf16_u8(weights.part[i]), two); });
}

using Factor = uint16_t;
inline Factor factor(uint16_t bf16) { return bf16; }
inline Floats store_factors(Factor* p, Floats x) {
  store_bf16(p, x);
  return load_bf16(p);
}
#else
inline float32x4_t upper_halves(uint32x4_t x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); }
inline Floats dot2(Floats total, Bytes weights, float x0, float x1) {
  return each([&](int i) {
    const uint32x4_t both = vreinterpretq_u32_u8(weights.part[i]);
    const float32x4_t first = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
    return vfmaq_n_f32(vfmaq_n_f32(total.part[i], first, x0), upper_halves(both), x1);
  });
}

using Factor = float;
inline Factor factor(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline Floats store_factors(Factor* p, Floats x) {
  const Floats rounded = each([&](int i) { return upper_halves(rounded_bf16(x.part[i])); });
  store(p, rounded);
  return rounded;
}
inline Floats dot2(Floats total, Bytes weights, const uint16_t* x) {
  return dot2(total, weights, factor(x[0]), factor(x[1]));
}
inline Floats dot2(Floats total, Bytes weights, const Factor* x) { return dot2(total, weights, x[0], x[1]); }
#endif

}  // namespace
