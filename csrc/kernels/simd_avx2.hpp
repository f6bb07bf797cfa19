// Sixteen lanes in two AVX2 registers, with AVX-VNNI's products if the compiler may use them; simd_portable.hpp defines
// each function.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kTileRows = 4, kUnroll = 2, kQueries = 4, kSums = 4;
// Of the sixteen registers AVX2's products of bytes need more than AVX-VNNI's.
#ifdef __AVXVNNI__
constexpr int kInt8TileRows = 5;
#else
constexpr int kInt8TileRows = 3;
#endif

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
using Bytes = Ints;

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Floats nearest(Floats a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Floats scale_by_power(Floats a, Floats n) { return mul(a, {power_of_two(n.low), power_of_two(n.high)}); }

inline Floats keep(Floats x, int begin, int end, float other) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto half = [&](__m256 values, int offset) {
    const __m256i lane = _mm256_add_epi32(lanes, _mm256_set1_epi32(offset));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane);
    const __m256i inside = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), values, _mm256_castsi256_ps(inside));
  };
  return {half(x.low, 0), half(x.high, 8)};
}

template <int Distance>
inline Floats swap(Floats x) {
  if constexpr (Distance == 1) return {_mm256_permute_ps(x.low, 0xb1), _mm256_permute_ps(x.high, 0xb1)};
  if constexpr (Distance == 2) return {_mm256_permute_ps(x.low, 0x4e), _mm256_permute_ps(x.high, 0x4e)};
  if constexpr (Distance == 4)
    return {_mm256_permute2f128_ps(x.low, x.low, 1), _mm256_permute2f128_ps(x.high, x.high, 1)};
  return {x.high, x.low};
}

inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline __m128i load_eight(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Floats load_bf16(const uint16_t* p) {
  const auto wide = [](__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  };
  return {wide(load_eight(p)), wide(load_eight(p + 8))};
}
// A bf16 in the upper half of each word; the lower halves are to be ignored.
inline __m256i rounded_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline void store_bf16(uint16_t* p, Floats x) {
  const __m256i low = _mm256_srli_epi32(rounded_bf16(x.low), 16), high = _mm256_srli_epi32(rounded_bf16(x.high), 16);
  const __m256i packed = _mm256_packus_epi32(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store_int8(int8_t* p, Floats x) {
  const __m256i low = _mm256_cvtps_epi32(x.low), high = _mm256_cvtps_epi32(x.high);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

inline int32_t word_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Weights are multiplied as they are stored, w + 128; starting at -128 * sum(x) subtracts that.
inline int32_t dot_start(int32_t sum_of_x) { return -128 * sum_of_x; }
inline Ints splat_int(int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  return {all, all};
}
#ifdef __AVXVNNI__
inline Floats room(Floats x) { return abs(x); }
inline Ints dot4(Ints total, Bytes weights, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(word_at(x));
  return {_mm256_dpbusd_avx_epi32(total.low, weights.low, four),
          _mm256_dpbusd_avx_epi32(total.high, weights.high, four)};
}

using SmallInts = Ints;
inline Ints to_ints(SmallInts x) { return x; }
inline SmallInts dot4_small(SmallInts total, Bytes weights, const int8_t* x) { return dot4(total, weights, x); }
#else
// maddubs adds the products of neighbours in 16 bits, which hold 255 * (|x0| + |x1|) where |x0| + |x1| is at most 128:
// 127 steps before each of the two is rounded.
inline Floats room(Floats x) { return add(abs(x), swap<1>(abs(x))); }
inline Ints dot4(Ints total, Bytes weights, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(word_at(x)), ones = _mm256_set1_epi16(1);
  const auto half = [&](__m256i sum, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, four), ones));
  };
  return {half(total.low, weights.low), half(total.high, weights.high)};
}

struct SmallInts {  // two sums of 16 bits in each lane
  __m256i low, high;
};
inline Ints to_ints(SmallInts x) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(x.low, ones), _mm256_madd_epi16(x.high, ones)};
}
inline SmallInts dot4_small(SmallInts total, Bytes weights, const int8_t* x) {
  const __m256i four = _mm256_set1_epi32(word_at(x));
  return {_mm256_add_epi16(total.low, _mm256_maddubs_epi16(weights.low, four)),
          _mm256_add_epi16(total.high, _mm256_maddubs_epi16(weights.high, four))};
}
#endif

inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)}); }

inline __m256 upper_halves(__m256i x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
}
inline __m256 lower_halves(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Floats dot2(Floats total, Bytes weights, __m256 x0, __m256 x1) {
  const auto half = [&](__m256 sum, __m256i stored) {
    return _mm256_fmadd_ps(upper_halves(stored), x1, _mm256_fmadd_ps(lower_halves(stored), x0, sum));
  };
  return {half(total.low, weights.low), half(total.high, weights.high)};
}
inline Floats dot2(Floats total, Bytes weights, const uint16_t* x) {
  const __m256i pair = _mm256_set1_epi32(word_at(x));
  return dot2(total, weights, lower_halves(pair), upper_halves(pair));
}

using Factor = float;
inline Factor factor(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline Floats store_factors(Factor* p, Floats x) {
  const Floats rounded{upper_halves(rounded_bf16(x.low)), upper_halves(rounded_bf16(x.high))};
  store(p, rounded);
  return rounded;
}
inline Floats dot2(Floats total, Bytes weights, const Factor* x) {
  return dot2(total, weights, _mm256_broadcast_ss(x), _mm256_broadcast_ss(x + 1));
}

}  // namespace
