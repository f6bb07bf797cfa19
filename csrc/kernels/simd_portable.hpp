// Sixteen lanes in plain C++, for any processor; also defines what the functions of the other two compute.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// Rows that one pass over a weight block computes, limited by registers, and how far its loop is unrolled.
constexpr int kTileRows = 4, kInt8TileRows = 4, kUnroll = 16;
// Queries that one pass over keys and values computes, and sums of sixteen lanes that it has registers for.
constexpr int kQueries = 4, kSums = 4;

struct Floats {
  float lane[16];
};
struct Ints {
  int32_t lane[16];
};
struct Bytes {  // sixteen words of four bytes: of each of sixteen outputs, four int8 or two bf16 weights
  uint8_t byte[64];
};

template <class F>
inline Floats each(F value) {
  Floats x;
  for (int i = 0; i < 16; i++) x.lane[i] = value(i);
  return x;
}

inline Floats load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline Floats splat(float x) { return each([&](int) { return x; }); }
inline Floats add(Floats a, Floats b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Floats sub(Floats a, Floats b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Floats mul(Floats a, Floats b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Floats div(Floats a, Floats b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
// a * b + c; rounded once by the other two, here twice (std::fma is slow without an instruction for it).
inline Floats fma(Floats a, Floats b, Floats c) { return add(mul(a, b), c); }
inline Floats max(Floats a, Floats b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats min(Floats a, Floats b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats abs(Floats a) { return each([&](int i) { return std::fabs(a.lane[i]); }); }
// To the nearest integer, ties to even; for magnitudes below 2^22.
inline Floats nearest(Floats a) {
  return each([&](int i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
}
// a * 2^n for integers n in the range of a float's exponent.
inline Floats scale_by_power(Floats a, Floats n) {
  return each([&](int i) {
    const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return a.lane[i] * power;
  });
}

// The lanes from begin to end - 1; `other` in the rest.
inline Floats keep(Floats x, int begin, int end, float other) {
  return each([&](int i) { return i >= begin && i < end ? x.lane[i] : other; });
}

// Lane i gets lane i ^ Distance; for powers of two below 16.
template <int Distance>
inline Floats swap(Floats x) {
  return each([&](int i) { return x.lane[i ^ Distance]; });
}

inline float sum(Floats x) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) x.lane[i] += x.lane[i + width];
  return x.lane[0];
}
inline float largest(Floats x) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) x.lane[i] = x.lane[i] > x.lane[i + width] ? x.lane[i] : x.lane[i + width];
  return x.lane[0];
}

inline Floats load_bf16(const uint16_t* p) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  });
}
// Rounded to nearest even.
inline void store_bf16(uint16_t* p, Floats x) {
  for (int i = 0; i < 16; i++) {
    uint32_t bits;
    std::memcpy(&bits, &x.lane[i], sizeof bits);
    p[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
// Sixteen integers of at most 127 in magnitude.
inline void store_int8(int8_t* p, Floats x) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(x.lane[i]);
}

inline void prefetch(const uint8_t*) {}
inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  std::memcpy(x.byte, p, sizeof x.byte);
  return x;
}
inline Floats to_floats(Ints x) {
  return each([&](int i) { return static_cast<float>(x.lane[i]); });
}

// What must not exceed 127 steps in the inputs of int8 products.
inline Floats room(Floats x) { return abs(x); }

// Weights are stored as w + 128. dot4 adds, for each of sixteen outputs, four products w * x to `total`, which
// begins as dot_start(the sum of all x) in all lanes.
inline int32_t dot_start(int32_t) { return 0; }
inline Ints splat_int(int32_t x) {
  Ints all;
  for (int32_t& lane : all.lane) lane = x;
  return all;
}
inline Ints dot4(Ints total, const Bytes& weights, const int8_t* x) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++)
      total.lane[i] += static_cast<int8_t>(weights.byte[4 * i + j] ^ 0x80) * static_cast<int32_t>(x[j]);
  return total;
}

// The two weights of four bits in each byte.
inline Bytes low_nibbles(Bytes x) {
  for (uint8_t& byte : x.byte) byte &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  for (uint8_t& byte : x.byte) byte >>= 4;
  return x;
}
// dot4 for weights of at most 15, stored as they are; its total begins at zeros, and cannot overflow in kHalf inputs.
using SmallInts = Ints;
inline Ints to_ints(SmallInts x) { return x; }
inline SmallInts dot4_small(SmallInts total, const Bytes& weights, const int8_t* x) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) total.lane[i] += weights.byte[4 * i + j] * static_cast<int32_t>(x[j]);
  return total;
}

// For each of sixteen outputs, two bf16 products.
inline Floats dot2(Floats total, const Bytes& weights, const uint16_t* x) {
  uint32_t words[16];
  std::memcpy(words, weights.byte, sizeof words);
  const auto product = [&](uint32_t high_half, uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float w, v;
    std::memcpy(&w, &high_half, sizeof w);
    std::memcpy(&v, &bits, sizeof v);
    return w * v;
  };
  for (int i = 0; i < 16; i++) {
    total.lane[i] += product(words[i] << 16, x[0]);
    total.lane[i] += product(words[i] & 0xffff0000u, x[1]);
  }
  return total;
}

// Numbers rounded to bf16, in the format that dot2 multiplies fastest.
using Factor = uint16_t;
inline Factor factor(uint16_t bf16) { return bf16; }
inline Floats store_factors(Factor* p, Floats x) {  // returns the rounded numbers
  store_bf16(p, x);
  return load_bf16(p);
}

}  // namespace
