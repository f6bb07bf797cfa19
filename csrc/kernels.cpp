// The kernels, compiled once for each kind of processor (CMakeLists.txt sets FASTMTP_SIMD and FASTMTP_TABLE).
//
// Nothing here may be contracted or reordered by the compiler (-ffp-contract=off, no -ffast-math): the same
// operations in the same order for every number of rows is what makes the engine batch-invariant. No function of
// the standard library that is inlined may be used: the linker keeps one copy of it, for the wrong processor.
#include "kernels.hpp"

#include <math.h>

#include FASTMTP_SIMD

namespace {

using namespace fastmtp;

// exp(x) for x <= 88; 0 below -87. Degree 6 after Cody and Waite's reduction; exact at 0; error below 2 ulp.
inline Floats exponential(Floats x) {
  const Floats clamped = max(x, splat(-87.0f));
  const Floats n = nearest(mul(clamped, splat(1.44269504f)));
  Floats r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = add(fma(y, mul(r, r), r), splat(1.0f));
  return scale_by_power(y, n);
}

// ---- matrix products: each weight is loaded once for all rows of a tile ----

// How far ahead of a kilobyte of weights to fetch. One block is one stream with its successors, and many rows keep
// the processor from looking ahead itself: 16 kB. Several blocks together: what follows in each of them, and at their
// ends the beginnings of the next ones.
template <int Blocks>
inline size_t prefetch_distance(const PackedView& w, int part, int parts) {
  constexpr size_t kPart = kGroup * kLanes;
  if (Blocks == 1) return 16 * kPart;
  return part + 1 < parts ? kPart : Blocks * w.block_bytes - (parts - 1) * kPart;
}

template <int Rows, int Blocks>
void int8_blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  const uint8_t* weights = w.data + block * w.block_bytes;
  const uint8_t* scales = weights + size_t(w.groups) * kGroup * kLanes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  Floats total[Blocks][Rows];
  for (int b = 0; b < Blocks; b++)
    for (int m = 0; m < Rows; m++) total[b][m] = splat(0.0f);
  for (int g = 0; g < w.groups; g++) {
    const size_t ahead = prefetch_distance<Blocks>(w, g, w.groups);
    Ints sums[Blocks][Rows];
    for (int b = 0; b < Blocks; b++)
      for (int m = 0; m < Rows; m++) sums[b][m] = dot_start(x.sums[(row + m) * x.groups + g]);
#pragma GCC unroll 16
    for (int k = 0; k < kGroup; k += 4) {
      for (int b = 0; b < Blocks; b++) {
        const uint8_t* place = weights + b * w.block_bytes + k * kLanes;
        prefetch(place + ahead);
        const Bytes four = load_bytes(place);
        for (int m = 0; m < Rows; m++) sums[b][m] = dot4(sums[b][m], four, values + m * width + k);
      }
    }
    for (int b = 0; b < Blocks; b++) {
      const Floats scale = load_bf16(reinterpret_cast<const uint16_t*>(scales + b * w.block_bytes));
      for (int m = 0; m < Rows; m++) {
        const Floats both = mul(scale, splat(x.scales[(row + m) * x.groups + g]));
        total[b][m] = fma(to_floats(sums[b][m]), both, total[b][m]);
      }
    }
    weights += kGroup * kLanes;
    scales += 2 * kLanes;
    values += kGroup;
  }
  for (int b = 0; b < Blocks; b++) {
    const Floats bias = w.bias ? load(w.bias + (block + b) * kLanes) : splat(0.0f);
    for (int m = 0; m < Rows; m++) store(out + size_t(m) * stride + b * kLanes, add(total[b][m], bias));
  }
}

template <int Rows>
void int4_block(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  constexpr size_t kAhead = 16 * 1024;
  const uint8_t* weights = w.data + block * w.block_bytes;
  const int8_t* values = x.int8_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  const int groups = 2 * w.groups;
  Floats total[Rows];
  for (int m = 0; m < Rows; m++) total[m] = splat(0.0f);
  for (int g = 0; g < groups; g++) {
    Ints sums[Rows];
    for (int m = 0; m < Rows; m++) sums[m] = dot_start(0);
#pragma GCC unroll 4
    for (int k = 0; k < kHalf; k += 8) {
      prefetch(weights + kAhead);
      const Bytes eight = load_bytes(weights), low = low_nibbles(eight), high = high_nibbles(eight);
      for (int m = 0; m < Rows; m++) sums[m] = dot4_small(sums[m], low, values + m * width + k);
      for (int m = 0; m < Rows; m++) sums[m] = dot4_small(sums[m], high, values + m * width + k + 4);
      weights += 4 * kLanes;
    }
    prefetch(weights + kAhead);
    const auto* scales = reinterpret_cast<const uint16_t*>(weights);
    const Floats step = load_bf16(scales), least = load_bf16(scales + kLanes);
    for (int m = 0; m < Rows; m++) {
      const int place = (row + m) * groups + g;
      const Floats all = splat(static_cast<float>(x.sums[place]));
      const Floats product = fma(to_floats(sums[m]), step, mul(all, least));
      total[m] = fma(product, splat(x.scales[place]), total[m]);
    }
    weights += 4 * kLanes;
    values += kHalf;
  }
  const Floats bias = w.bias ? load(w.bias + block * kLanes) : splat(0.0f);
  for (int m = 0; m < Rows; m++) store(out + size_t(m) * stride, add(total[m], bias));
}

template <int Rows, int Blocks>
void bf16_blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  const uint8_t* weights = w.data + block * w.block_bytes;
  const uint16_t* values = x.bf16_row(row);
  const size_t width = size_t(x.groups) * kGroup;
  Floats total[Blocks][Rows];
  for (int b = 0; b < Blocks; b++)
    for (int m = 0; m < Rows; m++) total[b][m] = splat(0.0f);
  for (int g = 0; g < 2 * w.groups; g++) {
    const size_t ahead = prefetch_distance<Blocks>(w, g, 2 * w.groups);
#pragma GCC unroll 16
    for (int k = 0; k < kGroup / 2; k += 2) {
      for (int b = 0; b < Blocks; b++) {
        const uint8_t* place = weights + b * w.block_bytes + 2 * k * kLanes;
        prefetch(place + ahead);
        const Bytes two = load_bytes(place);
        for (int m = 0; m < Rows; m++) total[b][m] = dot2(total[b][m], two, values + m * width + k);
      }
    }
    weights += kGroup * kLanes;
    values += kGroup / 2;
  }
  for (int b = 0; b < Blocks; b++) {
    const Floats bias = w.bias ? load(w.bias + (block + b) * kLanes) : splat(0.0f);
    for (int m = 0; m < Rows; m++) store(out + size_t(m) * stride + b * kLanes, add(total[b][m], bias));
  }
}

template <int Rows, int Blocks>
void blocks(const PackedView& w, const Operand& x, int row, int block, float* out, int stride) {
  if (w.type == Type::int8)
    int8_blocks<Rows, Blocks>(w, x, row, block, out, stride);
  else if (w.type == Type::bf16)
    bf16_blocks<Rows, Blocks>(w, x, row, block, out, stride);
  else
    for (int b = 0; b < Blocks; b++) int4_block<Rows>(w, x, row, block + b, out + b * kLanes, stride);
}

// Some blocks for `rows` rows, Rows or fewer.
template <int Rows, int Blocks>
void tile(const PackedView& w, const Operand& x, int row, int rows, int block, float* out, int stride) {
  if (rows == Rows)
    blocks<Rows, Blocks>(w, x, row, block, out, stride);
  else if constexpr (Rows > 1)
    tile<Rows - 1, Blocks>(w, x, row, rows, block, out, stride);
}

void matmul(const PackedView& w, const Operand& x, int rows, int first_block, int last_block, float* out,
            int stride) {
  // With few rows several blocks go together: more streams from memory at once, and registers are free.
  constexpr int kTogether = 4, kFew = kTileRows / 4;
  int block = first_block;
  if (rows <= kFew)
    for (; block + kTogether <= last_block; block += kTogether)
      tile<kFew, kTogether>(w, x, 0, rows, block, out + block * kLanes, stride);
  for (; block < last_block; block++)
    for (int row = 0; row < rows; row += kTileRows) {
      const int count = rows - row < kTileRows ? rows - row : kTileRows;
      tile<kTileRows, 1>(w, x, row, count, block, out + size_t(row) * stride + block * kLanes, stride);
    }
}

// The orthonormal Walsh-Hadamard transform of a group, which makes its outliers small (see matrix.hpp).
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

// Rounds a group to steps of a 127th of its largest number.
template <int Count>
void quantize(Floats* lanes, int8_t* values, float& scale, int32_t& sum_of_values) {
  Floats most = abs(lanes[0]), total = splat(0.0f);
  for (int i = 1; i < Count; i++) most = max(most, abs(lanes[i]));
  const float top = largest(most), inverse = top > 1e-30f ? 127.0f / top : 0.0f;
  for (int i = 0; i < Count; i++) {
    const Floats rounded = nearest(mul(lanes[i], splat(inverse)));
    store_int8(values + i * kLanes, rounded);
    total = add(total, rounded);  // exactly: whole numbers this small
  }
  scale = top / 127.0f;
  sum_of_values = static_cast<int32_t>(sum(total));
}

void convert(Type type, const float* x, int size, const Operand& operand, int row) {
  for (int g = 0; g < operand.groups; g++) {
    Floats lanes[kGroup / kLanes];
    for (int i = 0; i < kGroup / kLanes; i++) {
      const int start = g * kGroup + i * kLanes, left = size - start;
      if (left >= kLanes) {
        lanes[i] = load(x + start);
      } else {
        float padded[kLanes] = {};
        for (int j = 0; j < left; j++) padded[j] = x[start + j];
        lanes[i] = load(padded);
      }
    }
    if (type == Type::bf16) {
      for (int i = 0; i < kGroup / kLanes; i++)
        store_bf16(operand.bf16_row(row) + g * kGroup + i * kLanes, lanes[i]);
      continue;
    }
    int8_t* values = operand.int8_row(row) + g * kGroup;
    const size_t place = size_t(row) * operand.groups + g;
    if (type == Type::int8) {
      spread(lanes);
      quantize<kGroup / kLanes>(lanes, values, operand.scales[place], operand.sums[place]);
      continue;
    }
    for (int half = 0; half < 2; half++)
      quantize<kHalf / kLanes>(lanes + half * kHalf / kLanes, values + half * kHalf, operand.scales[2 * place + half],
                               operand.sums[2 * place + half]);
  }
}

// ---- rows ----

void norm(const float* x, const float* gain, int size, float epsilon, float* out) {
  Floats squares = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float scale = 1.0f / sqrtf(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; i++) out[i] = x[i] * scale * gain[i];
}

void add_rows(float* x, const float* y, int size) {
  for (int i = 0; i < size; i++) x[i] += y[i];
}

void activate(const float* gate_up, int size, bool gelu, float* out) {
  for (int i = 0; i < size; i += kLanes) {
    const Floats gate = load(gate_up + 2 * i), up = load(gate_up + 2 * i + kLanes);
    Floats inner = gate;
    if (gelu) {
      // gelu(x) = x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the tanh form
      const Floats cubic = fma(mul(gate, gate), splat(0.044715f), splat(1.0f));
      inner = mul(mul(gate, cubic), splat(1.5957691216f));
    }
    // exp(-x) would overflow below -88, where the result is 0 anyway
    const Floats minus = min(sub(splat(0.0f), inner), splat(87.0f));
    store(out + i, mul(div(gate, add(splat(1.0f), exponential(minus))), up));
  }
}

// Rounds `size` numbers to bf16; out has room for whole lanes.
inline void round_row(const float* x, int size, uint16_t* out) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_bf16(out + i, load(x + i));
  if (i == size) return;
  float padded[kLanes] = {};
  uint16_t rounded[kLanes];
  for (int j = i; j < size; j++) padded[j - i] = x[j];
  store_bf16(rounded, load(padded));
  for (int j = i; j < size; j++) out[j] = rounded[j - i];
}

void rotate(const float* x, const float* cosine, const float* sine, int size, float scale, uint16_t* out) {
  const int half = size / 2;
  float turned[kLargestHead];
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    turned[i] = (a * cosine[i] - b * sine[i]) * scale;
    turned[i + half] = (b * cosine[i] + a * sine[i]) * scale;
  }
  round_row(turned, size, out);
}

// ---- attention ----

void store_token(const uint16_t* key, const float* value, int size, int place, uint16_t* keys, uint16_t* values) {
  const int width = round_up(size, kLanes);
  uint16_t* lane = keys + size_t(place / kLanes) * size * kLanes + place % kLanes * 2;
  for (int d = 0; d < size; d += 2) {
    lane[d * kLanes] = key[d];
    lane[d * kLanes + 1] = key[d + 1];
  }
  uint16_t rounded[kLargestHead];
  round_row(value, size, rounded);
  uint16_t* pair = values + size_t(place / 2) * width * 2 + place % 2;
  for (int d = 0; d < size; d++) pair[2 * d] = rounded[d];
}

inline Bytes load_pairs(const uint16_t* p) { return load_bytes(reinterpret_cast<const uint8_t*>(p)); }

// Lanes * 16 of the head's dimensions: the values of tokens begin..end - 1 (both even) by their weights.
template <int Count, int Lanes>
void weigh(const Query* queries, const uint16_t (*weights)[kPageTokens], const uint16_t* values, int width, int begin,
           int end, int start, const uint8_t* next) {
  Floats total[Count][Lanes];
  for (int i = 0; i < Count; i++)
    for (int j = 0; j < Lanes; j++) total[i][j] = splat(0.0f);
  for (int t = begin; t < end; t += 2) {
    const uint16_t* two = values + (size_t(t) * width + 2 * start);
    for (int j = 0; j < Lanes; j++) {
      prefetch(next + 2 * ((size_t(t) * width + 2 * start) + 2 * j * kLanes));
      const Bytes value = load_pairs(two + 2 * j * kLanes);
      for (int i = 0; i < Count; i++) total[i][j] = dot2(total[i][j], value, weights[i] + t);
    }
  }
  for (int i = 0; i < Count; i++)
    for (int j = 0; j < Lanes; j++)
      store(queries[i].partial + kPartialHeader + start + j * kLanes, total[i][j]);
}

template <int Count>
void attend_tile(const Query* queries, const uint16_t* keys, const uint16_t* values, int size, const uint8_t* next) {
  constexpr int kTogether = Count <= 4 ? 2 : 1;  // enough chains of additions to hide their latency
  float scores[Count][kPageTokens];
  uint16_t weights[Count][kPageTokens];
  int begin = kPageTokens, end = 0;
  for (int i = 0; i < Count; i++) {
    if (queries[i].begin >= queries[i].end) continue;
    if (queries[i].begin < begin) begin = queries[i].begin;
    if (queries[i].end > end) end = queries[i].end;
  }
  const int first = begin / (kLanes * kTogether) * kTogether;
  const int last = end > 0 ? round_up(end, kLanes * kTogether) / kLanes : first;
  // One row after another: the multiplications find the next query at a fixed distance.
  alignas(64) uint16_t together[kLargestHead / 2][Count][2];
  for (int d = 0; d < size; d += 2)
    for (int i = 0; i < Count; i++) {
      together[d / 2][i][0] = queries[i].q[d];
      together[d / 2][i][1] = queries[i].q[d + 1];
    }
  const int width = round_up(size, kLanes);
  for (int block = first; block < last; block += kTogether) {
    Floats score[kTogether][Count];
    for (int b = 0; b < kTogether; b++)
      for (int i = 0; i < Count; i++) score[b][i] = splat(0.0f);
    for (int d = 0; d < size; d += 2)
      for (int b = 0; b < kTogether; b++) {
        const size_t place = (size_t(block + b) * size + d) * kLanes;
        prefetch(next + 2 * place);
        const Bytes key = load_pairs(keys + place);
        for (int i = 0; i < Count; i++) score[b][i] = dot2(score[b][i], key, together[d / 2][i]);
      }
    for (int b = 0; b < kTogether; b++)
      for (int i = 0; i < Count; i++) store(scores[i] + (block + b) * kLanes, score[b][i]);
  }
  for (int i = 0; i < Count; i++) {
    const auto inside = [&](Floats x, int block, float other) {
      const int from = queries[i].begin - block * kLanes, to = queries[i].end - block * kLanes;
      if (from <= 0 && to >= kLanes) return x;
      const int low = from < 0 ? 0 : from > kLanes ? kLanes : from;
      const int high = to < low ? low : to > kLanes ? kLanes : to;
      return keep(x, low, high, other);
    };
    Floats most = splat(-3e38f), total = splat(0.0f);
    for (int block = first; block < last; block++)
      most = max(most, inside(load(scores[i] + block * kLanes), block, -3e38f));
    const float top = largest(most);
    for (int block = first; block < last; block++) {
      const Floats shifted = sub(load(scores[i] + block * kLanes), splat(top));
      const Floats weight = inside(exponential(shifted), block, 0.0f);
      store_bf16(weights[i] + block * kLanes, weight);
      // The sum is that of the rounded weights, so that they add up to one.
      total = add(total, load_bf16(weights[i] + block * kLanes));
    }
    queries[i].partial[0] = top;
    queries[i].partial[1] = sum(total);
  }
  begin = begin / 2 * 2;
  end = round_up(end, 2);
  int start = 0;
  if constexpr (Count <= 4)
    for (; start + 4 * kLanes <= width; start += 4 * kLanes)
      weigh<Count, 4>(queries, weights, values, width, begin, end, start, next + 2 * page_numbers(size));
  for (; start + 2 * kLanes <= width; start += 2 * kLanes)
    weigh<Count, 2>(queries, weights, values, width, begin, end, start, next + 2 * page_numbers(size));
  if (start < width) weigh<Count, 1>(queries, weights, values, width, begin, end, start, next + 2 * page_numbers(size));
}

template <int Count>
void attend_count(const Query* queries, int count, const uint16_t* keys, const uint16_t* values, int size,
                  const uint8_t* next) {
  if (count == Count)
    attend_tile<Count>(queries, keys, values, size, next);
  else if constexpr (Count > 1)
    attend_count<Count - 1>(queries, count, keys, values, size, next);
}

void attend(const Query* queries, int count, const uint16_t* keys, const uint16_t* values, int size,
            const void* next) {
  attend_count<kTileQueries>(queries, count, keys, values, size, static_cast<const uint8_t*>(next));
}

int argmax(const float* x, int size) {
  // The largest of each strip first; then only the strip that holds it is looked at number by number.
  constexpr int kStrip = 64 * kLanes;
  float most = -INFINITY;
  int strip = 0;
  for (int start = 0; start < size; start += kStrip) {
    const int end = size - start < kStrip ? size : start + kStrip;
    Floats lanes = splat(-INFINITY);
    int i = start;
    for (; i + kLanes <= end; i += kLanes) lanes = max(lanes, load(x + i));
    float top = largest(lanes);
    for (; i < end; i++) top = x[i] > top ? x[i] : top;
    if (top > most) {
      most = top;
      strip = start;
    }
  }
  while (strip + 1 < size && x[strip] != most) strip++;
  return strip;
}

// Four streams at once, as in the matrix products with few rows.
float read(const float* memory, size_t count) {
  constexpr int kStreams = 4;
  const size_t part = count / kStreams / (4 * kLanes) * (4 * kLanes);
  Floats total[kStreams];
  for (Floats& one : total) one = splat(0.0f);
  for (size_t i = 0; i < part; i += kLanes)
    for (int s = 0; s < kStreams; s++) {
      const float* place = memory + s * part + i;
      prefetch(reinterpret_cast<const uint8_t*>(place) + 1024);
      total[s] = add(total[s], load(place));
    }
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

void merge(float* total, const float* part, int size) {
  // A page of which the query sees nothing leaves no trace, so that tiles need not agree on which pages they visit.
  if (part[1] == 0.0f) return;
  const float top = total[0] > part[0] ? total[0] : part[0];
  const Floats left = exponential(splat(total[0] - top)), right = exponential(splat(part[0] - top));
  float factors[2][kLanes];
  store(factors[0], left);
  store(factors[1], right);
  total[0] = top;
  total[1] = total[1] * factors[0][0] + part[1] * factors[1][0];
  const int width = round_up(size, kLanes);
  for (int i = kPartialHeader; i < kPartialHeader + width; i += kLanes)
    store(total + i, fma(load(total + i), left, mul(load(part + i), right)));
}

}  // namespace

namespace fastmtp {

extern const Kernels FASTMTP_TABLE;
const Kernels FASTMTP_TABLE = {
    FASTMTP_NAME, matmul, convert, norm, add_rows, activate, rotate, store_token, attend, merge, argmax, read,
};

}  // namespace fastmtp
