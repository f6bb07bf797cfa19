// The most multiply-adds that a thread can do: the loops in the middle of products and of attention, again and again on
// memory that stays in the first-level cache, with as many sums as there are registers for. Each function returns the
// number of multiply-adds done. Part of kernels.cpp.
#pragma once

namespace {

constexpr int kRounds = 20000;

// Calls dot(sum, 64 bytes of weights, inputs) for lines of some blocks and some rows: of one block where registers are few,
// since loads of weights for two would take longer than the products.
template <class Sum, class Dot>
double peak(uint8_t* memory, int inputs, Dot dot) {
  constexpr int kBlocks = kSums < 8 ? 1 : 2, kRows = kSums < 8 ? 5 : kSums / kBlocks, kLines = 16, kWidth = 128;
  const uint8_t* rows = memory + kBlocks * kLines * 64;
  Sum sums[kBlocks][kRows] = {};
  static_assert(kBlocks * kLines * 64 + kRows * kWidth + sizeof sums <= kPeakBytes);
  for (int round = 0; round < kRounds; round++)
#pragma GCC unroll kUnroll
    for (int line = 0; line < kLines; line++)
      for (int b = 0; b < kBlocks; b++) {
        const Bytes weights = load_bytes(memory + (b * kLines + line) * 64);
        for (int m = 0; m < kRows; m++) dot(sums[b][m], weights, rows + m * kWidth + line * kWidth / kLines);
      }
  std::memcpy(memory + kPeakBytes - sizeof sums, sums, sizeof sums);
  return double(kRounds) * kLines * kBlocks * kRows * kLanes * inputs;
}

#ifdef __AMX_INT8__
// Two tiles of sixteen rows by two tiles of weights.
template <bool Int8>
double amx_peak(uint8_t* memory) {
  const TileConfig config(kLanes);
  finish_writes(&config);
  _tile_loadconfig(&config);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  _tile_loadd(0, memory, 64);
  _tile_loadd(1, memory + 1024, 64);
  for (int round = 0; round < kRounds; round++) {
    _tile_loadd(2, memory + 2048, 64);
    _tile_loadd(3, memory + 3072, 64);
    if constexpr (Int8) {
      _tile_dpbsud(4, 0, 2);
      _tile_dpbsud(5, 0, 3);
      _tile_dpbsud(6, 1, 2);
      _tile_dpbsud(7, 1, 3);
    } else {
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 0, 3);
      _tile_dpbf16ps(6, 1, 2);
      _tile_dpbf16ps(7, 1, 3);
    }
  }
  _tile_release();
  return double(kRounds) * 4 * kLanes * kLanes * (Int8 ? 64 : 32);
}
#endif

double product_peak(Type type, uint8_t* memory) {
  const auto int8s = [](const uint8_t* x) { return reinterpret_cast<const int8_t*>(x); };
  if (type == Type::bf16)
    return peak<Floats>(memory, 2, [](Floats& sum, const Bytes& two, const uint8_t* x) {
      sum = dot2(sum, two, reinterpret_cast<const uint16_t*>(x));
    });
  if (type == Type::int4)
    return peak<SmallInts>(memory, 8, [&](SmallInts& sum, const Bytes& eight, const uint8_t* x) {
      sum = dot4_small(sum, low_nibbles(eight), int8s(x));
      sum = dot4_small(sum, high_nibbles(eight), int8s(x + 4));
    });
#ifdef __AMX_INT8__
  return amx_peak<true>(memory);
#else
  return peak<Ints>(memory, 4, [&](Ints& sum, const Bytes& four, const uint8_t* x) { sum = dot4(sum, four, int8s(x)); });
#endif
}

double attention_peak(uint8_t* memory) {
#ifdef __AMX_BF16__
  return amx_peak<false>(memory);
#else
  return peak<Floats>(memory, 2, [](Floats& sum, const Bytes& two, const uint8_t* x) {
    sum = dot2(sum, two, reinterpret_cast<const Factor*>(x));
  });
#endif
}

}  // namespace
