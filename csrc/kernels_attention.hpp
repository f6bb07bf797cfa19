// Attention of some queries over one page of keys and values, and the merging of such results.
// Part of kernels.cpp, which says what holds for all of it.
#pragma once

namespace {

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
