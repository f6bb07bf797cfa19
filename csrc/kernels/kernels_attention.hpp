// Attention of some queries over one page of keys and values, and the merging of such results.
// Part of kernels.cpp, which states the rules for all of it.
#pragma once

namespace {

void store_key(const uint16_t* key, int size, int slot, uint16_t* keys) {
  keys += key_offset(slot, size);
  for (int d = 0; d < size; d += 2) __builtin_memcpy(keys + d * kLanes, key + d, 2 * sizeof(uint16_t));
}

void store_value(const float* value, int size, int slot, uint16_t* values) {
  uint16_t rounded[kLargestHead];
  round_row(value, size, rounded);
  values += value_offset(slot, size);
  for (int d = 0; d < size; d++) values[2 * d] = rounded[d];
}

inline Bytes load_pairs(const uint16_t* p) { return load_bytes(reinterpret_cast<const uint8_t*>(p)); }

// The weighted sum of the values of tokens begin..end - 1 (both even), in Lanes * 16 of the head's dimensions.
template <int Count, int Lanes>
void weigh(const Query* queries, const Factor (*weights)[kPageTokens], const uint16_t* values, int width, int begin,
           int end, int start, const uint8_t* next) {
  Floats total[Count][Lanes] = {};
  for (int t = begin; t < end; t += 2) {
    for (int j = 0; j < Lanes; j++) {
      const size_t offset = size_t(t) * width + 2 * (start + j * kLanes);
      prefetch(next + 2 * offset);
      const Bytes value = load_pairs(values + offset);
      for (int i = 0; i < Count; i++) total[i][j] = dot2(total[i][j], value, weights[i] + t);
    }
  }
  for (int i = 0; i < Count; i++)
    for (int j = 0; j < Lanes; j++)
      store(queries[i].partial + kPartialHeader + start + j * kLanes, total[i][j]);
}

// The slot of the token that a query sees at a position; counted, as positions are, from the page's first.
inline int slot_of(const Query& query, const PageView& page, int position) {
  return position < page.tree ? position : page.tree + query.path[position - page.tree];
}

// A slot's values, in the page or the one after it; dimension d is at [2 * d].
inline const uint16_t* values_of(const PageView& page, int slot, int size) {
  return (slot < kPageTokens ? page.values : page.next_values) + value_offset(slot % kPageTokens, size);
}

// Adds to the sums of `weigh` the values from position `shared` (even) on, whose slots are in the order of a tree: the
// same pairs in the same order as if they were in the order of positions.
inline void weigh_path(const Query& query, const Factor* weights, const PageView& page, int width, int shared) {
  const auto value = [&](int position) { return values_of(page, slot_of(query, page, position), width); };
  const int first = query.begin / 2 * 2;
  for (int t = first > shared ? first : shared; t < query.end; t += 2) {
    const uint16_t *left = value(t), *right = t + 1 < query.end ? value(t + 1) : left;
    for (int start = 0; start < width; start += kLanes) {
      alignas(64) uint16_t pairs[kLanes][2];
      for (int d = 0; d < kLanes; d++) {
        pairs[d][0] = left[2 * (start + d)];
        pairs[d][1] = right[2 * (start + d)];
      }
      float* total = query.partial + kPartialHeader + start;
      store(total, dot2(load(total), load_pairs(pairs[0]), weights + t));
    }
  }
}

// Scores of the keys in blocks first..last - 1, `Together` blocks at a time.
template <int Count, int Together>
inline void score(const Factor (*queries)[Count][2], const uint16_t* keys, int size, int first, int last,
                  float (*scores)[kPageTokens], const uint8_t* next) {
  for (int block = first; block < last; block += Together) {
    Floats total[Together][Count] = {};
    for (int d = 0; d < size; d += 2)
      for (int b = 0; b < Together; b++) {
        const size_t offset = (size_t(block + b) * size + d) * kLanes;
        prefetch(next + 2 * offset);
        const Bytes key = load_pairs(keys + offset);
        for (int i = 0; i < Count; i++) total[b][i] = dot2(total[b][i], key, queries[d / 2][i]);
      }
    for (int b = 0; b < Together; b++)
      for (int i = 0; i < Count; i++) store(scores[i] + (block + b) * kLanes, total[b][i]);
  }
}

// The positions of a page that some queries see. Their slots end before `slots`, which may be in the next page.
struct Range {
  int begin, end, slots;
};

inline Range seen_by(const Query* queries, int count, const PageView& page) {
  Range seen{kPageTokens, 0, 0};
  for (int i = 0; i < count; i++) {
    if (queries[i].begin >= queries[i].end) continue;
    if (queries[i].begin < seen.begin) seen.begin = queries[i].begin;
    if (queries[i].end > seen.end) seen.end = queries[i].end;
    const int last = slot_of(queries[i], page, queries[i].end - 1);
    if (last >= seen.slots) seen.slots = last + 1;
  }
  return seen;
}

// Moves the scores of a page and the next one from the order of a tree's nodes to the order of positions: a score does
// not depend on the slot of its key. A score moves to a position that is not after its slot, so none is overwritten
// before it has moved.
inline void order_by_position(const Query* queries, int count, const PageView& page, float (*scores)[kPageTokens],
                              const float (*beyond)[kPageTokens]) {
  const int moved = page.tree > 0 ? page.tree : 0;
  for (int i = 0; i < count; i++)
    for (int t = moved > queries[i].begin ? moved : queries[i].begin; t < queries[i].end; t++) {
      const int slot = slot_of(queries[i], page, t);
      scores[i][t] = slot < kPageTokens ? scores[i][slot] : beyond[i][slot - kPageTokens];
    }
}

constexpr float kLog2 = 0.69314718f;  // of two, natural

// 2^x for x <= 0, to within 0.0001, a twentieth of what rounding to bf16 changes; exact at 0, and tiny below -126.
inline Floats rough_power(Floats x) {
  const Floats clamped = max(x, splat(-126.0f)), n = nearest(clamped), r = sub(clamped, n);
  Floats y = fma(r, splat(0.0550086f), splat(0.2422101f));
  y = fma(y, r, splat(0.6932828f));
  return scale_by_power(fma(y, r, splat(1.0f)), n);
}

// For each query the weights 2^(score - largest) of blocks first..last - 1, the largest score, and the weights' sum.
inline void softmax(const Query* queries, int count, int first, int last, const float (*scores)[kPageTokens],
                    Factor (*weights)[kPageTokens]) {
  for (int i = 0; i < count; i++) {
    const int begin = queries[i].begin, end = queries[i].end;
    const auto clamp = [](int x, int least, int most) { return x < least ? least : x > most ? most : x; };
    // Blocks of which the query sees everything.
    const int from = clamp((begin + kLanes - 1) / kLanes, first, last), until = clamp(end / kLanes, from, last);
    const auto masked = [&](Floats x, int block, float other) {
      const int low = clamp(begin - block * kLanes, 0, kLanes);
      return keep(x, low, clamp(end - block * kLanes, low, kLanes), other);
    };
    const auto whole = [](Floats x, int, float) { return x; };
    const auto over_blocks = [&](auto work) {
      for (int block = first; block < from; block++) work(block, masked);
      for (int block = from; block < until; block++) work(block, whole);
      for (int block = until; block < last; block++) work(block, masked);
    };
    Floats most = splat(-3e38f), total = splat(0.0f);
    over_blocks([&](int block, auto inside) {
      most = max(most, inside(load(scores[i] + block * kLanes), block, -3e38f));
    });
    const float top = largest(most);
    over_blocks([&](int block, auto inside) {
      // A score that the query does not see may be anything.
      const Floats below = inside(sub(load(scores[i] + block * kLanes), splat(top)), block, 0.0f);
      const Floats weight = inside(rough_power(below), block, 0.0f);
      // The sum is that of the rounded weights, so that they add up to one.
      total = add(total, store_factors(weights[i] + block * kLanes, weight));
    });
    queries[i].partial[0] = top;
    queries[i].partial[1] = sum(total);
  }
}

template <int Count>
void attend_tile(const Query* queries, const PageView& page, int size, const uint8_t* next) {
  // Enough chains of additions to hide their latency.
  constexpr int kTogether = kSums >= 2 * Count ? 2 : 1;
  float scores[Count][kPageTokens];
  Factor weights[Count][kPageTokens];
  const Range seen = seen_by(queries, Count, page);
  int begin = seen.begin, end = seen.end;
  const int slots = seen.slots, first = begin / (kLanes * kTogether) * kTogether;
  const auto blocks = [](int count) { return round_up(count, kLanes * kTogether) / kLanes; };
  const int last = slots > 0 ? blocks(slots < kPageTokens ? slots : kPageTokens) : first;
  // The queries interleaved, so that the next one is at a fixed distance.
  alignas(64) Factor together[kLargestHead / 2][Count][2];
  for (int d = 0; d < size; d += 2)
    for (int i = 0; i < Count; i++) {
      together[d / 2][i][0] = factor(queries[i].q[d]);
      together[d / 2][i][1] = factor(queries[i].q[d + 1]);
    }
  const int width = round_up(size, kLanes);
  score<Count, kTogether>(together, page.keys, size, first, last, scores, next);
  if (page.tree < end) {
    float beyond[Count][kPageTokens];
    if (slots > kPageTokens)
      score<Count, kTogether>(together, page.next_keys, size, 0, blocks(slots - kPageTokens), beyond, next);
    order_by_position(queries, Count, page, scores, beyond);
  }
  softmax(queries, Count, first, last, scores, weights);
  begin = begin / 2 * 2;
  const int shared = page.tree > 0 ? page.tree / 2 * 2 : 0;
  end = round_up(end < shared ? end : shared, 2);
  const uint8_t* next_values = next + 2 * head_numbers(size);
  int start = 0;
  if constexpr (kSums >= 4 * Count)
    for (; start + 4 * kLanes <= width; start += 4 * kLanes)
      weigh<Count, 4>(queries, weights, page.values, width, begin, end, start, next_values);
  if constexpr (kSums >= 2 * Count)
    for (; start + 2 * kLanes <= width; start += 2 * kLanes)
      weigh<Count, 2>(queries, weights, page.values, width, begin, end, start, next_values);
  for (; start < width; start += kLanes)
    weigh<Count, 1>(queries, weights, page.values, width, begin, end, start, next_values);
  for (int i = 0; i < Count; i++) weigh_path(queries[i], weights[i], page, width, shared);
}

}  // namespace

#ifdef __AMX_BF16__
#include "kernels_attention_amx.hpp"
#endif

namespace {

void attend(const Query* queries, int count, const PageView& page, int size, const void* next) {
#ifdef __AMX_BF16__
  if (size % kChunk == 0) return amx_attend(queries, count, page, size, static_cast<const uint8_t*>(next));
#endif
  // As even as can be: a pass over the page takes some time for any number of queries.
  const int passes = (count - 1) / kQueries + 1;
  for (int pass = 0; pass < passes; pass++) {
    const int first = count * pass / passes, last = count * (pass + 1) / passes;
    with_constant<kQueries>(last - first, [&](auto tile) {
      attend_tile<tile.value>(queries + first, page, size, static_cast<const uint8_t*>(next));
    });
  }
}

void merge(float* total, const float* part, int size) {
  // A page of which the query sees nothing changes no bits, so the tiles may visit different pages.
  if (part[1] == 0.0f) return;
  const float top = total[0] > part[0] ? total[0] : part[0];
  const Floats left = exponential(splat((total[0] - top) * kLog2));
  const Floats right = exponential(splat((part[0] - top) * kLog2));
  float factors[2][kLanes];
  store(factors[0], left);
  store(factors[1], right);
  total[0] = top;
  total[1] = total[1] * factors[0][0] + part[1] * factors[1][0];
  const int width = round_up(size, kLanes);
  for (int i = kPartialHeader; i < kPartialHeader + width; i += kLanes)
    store(total + i, fma(load(total + i), left, mul(load(part + i), right)));
}

void divide(const float* total, int size, float* out) {
  const float sum = total[1];
  total += kPartialHeader;
  int d = 0;
  for (; d + kLanes <= size; d += kLanes) store(out + d, div(load(total + d), splat(sum)));
  for (; d < size; d++) out[d] = total[d] / sum;
}

}  // namespace
