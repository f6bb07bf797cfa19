// Sixteen lanes in one AVX-512 register; simd_portable.hpp defines each function.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kTileRows = 8, kInt8TileRows = 8, kUnroll = 4, kQueries = 8, kSums = 16;

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats nearest(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scale_by_power(Floats a, Floats n) { return _mm512_scalef_ps(a, n); }

inline Floats keep(Floats x, int begin, int end, float other) {
  const __mmask16 mask = static_cast<__mmask16>(((1u << end) - 1u) & ~((1u << begin) - 1u));
  return _mm512_mask_blend_ps(mask, _mm512_set1_ps(other), x);
}

template <int Distance>
inline Floats swap(Floats x) {
  if constexpr (Distance == 1) return _mm512_permute_ps(x, 0xb1);
  if constexpr (Distance == 2) return _mm512_permute_ps(x, 0x4e);
  if constexpr (Distance == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  return _mm512_shuffle_f32x4(x, x, 0x4e);
}

inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

inline Floats load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_bf16(uint16_t* p, Floats x) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &halves, sizeof halves);
#else
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#endif
}
inline void store_int8(int8_t* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

inline int32_t word_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

inline Floats room(Floats x) { return abs(x); }
// vpdpbusd takes unsigned weights: they are stored as w + 128, and starting at -128 * sum(x) subtracts that.
inline int32_t dot_start(int32_t sum_of_x) { return -128 * sum_of_x; }
inline Ints dot4(Ints total, Bytes weights, const int8_t* x) {
  return _mm512_dpbusd_epi32(total, weights, _mm512_set1_epi32(word_at(x)));
}

inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
using SmallInts = Ints;
inline Ints to_ints(SmallInts x) { return x; }
inline SmallInts dot4_small(SmallInts total, Bytes weights, const int8_t* x) { return dot4(total, weights, x); }

inline Floats dot2(Floats total, Bytes weights, const uint16_t* x) {
  const __m512i x2 = _mm512_set1_epi32(word_at(x));
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(total, (__m512bh)weights, (__m512bh)x2);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const Floats even = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
  const Floats odd = _mm512_castsi512_ps(_mm512_and_si512(weights, high));
  total = fma(even, _mm512_castsi512_ps(_mm512_slli_epi32(x2, 16)), total);
  return fma(odd, _mm512_castsi512_ps(_mm512_and_si512(x2, high)), total);
#endif
}

using Factor = uint16_t;
inline Factor factor(uint16_t bf16) { return bf16; }
inline Floats store_factors(Factor* p, Floats x) {
  store_bf16(p, x);
  return load_bf16(p);
}

}  // namespace
