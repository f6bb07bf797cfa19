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
void weigh(const Query* queries, const Factor (*weights)[kPageTokens], const uint16_t* values, int width, int begin,
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

// The place that holds what a query sees at `place`.
inline int held_at(const Query& query, const PageView& page, int place) {
  return place < page.tree ? place : page.tree + query.path[place - page.tree];
}

// Goes on from what `weigh` left with the values from place `shared` (even) on, which lie in the order of a tree: the
// same pairs in the same order as if they lay in that of positions.
inline void weigh_path(const Query& query, const Factor* weights, const PageView& page, int width, int shared) {
  const auto value = [&](int place) {
    const int held = held_at(query, page, place), in_page = held % kPageTokens;
    return (held < kPageTokens ? page.values : page.next_values) + size_t(in_page / 2) * width * 2 + in_page % 2;
  };
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
    Floats total[Together][Count];
    for (int b = 0; b < Together; b++)
      for (int i = 0; i < Count; i++) total[b][i] = splat(0.0f);
    for (int d = 0; d < size; d += 2)
      for (int b = 0; b < Together; b++) {
        const size_t place = (size_t(block + b) * size + d) * kLanes;
        prefetch(next + 2 * place);
        const Bytes key = load_pairs(keys + place);
        for (int i = 0; i < Count; i++) total[b][i] = dot2(total[b][i], key, queries[d / 2][i]);
      }
    for (int b = 0; b < Together; b++)
      for (int i = 0; i < Count; i++) store(scores[i] + (block + b) * kLanes, total[b][i]);
  }
}

// The places of a page that some queries see; what holds them ends at `held`, which may be in the page after it.
struct Range {
  int begin, end, held;
};

inline Range seen_by(const Query* queries, int count, const PageView& page) {
  Range seen{kPageTokens, 0, 0};
  for (int i = 0; i < count; i++) {
    if (queries[i].begin >= queries[i].end) continue;
    if (queries[i].begin < seen.begin) seen.begin = queries[i].begin;
    if (queries[i].end > seen.end) seen.end = queries[i].end;
    const int last = held_at(queries[i], page, queries[i].end - 1);
    if (last >= seen.held) seen.held = last + 1;
  }
  return seen;
}

// Puts scores, of a page and the one after it, which lie in the order of a tree's nodes, in that of positions: a score
// does not depend on where the key lies. What has not been moved yet lies behind what has been.
inline void by_position(const Query* queries, int count, const PageView& page, float (*scores)[kPageTokens],
                        const float (*beyond)[kPageTokens]) {
  const int moved = page.tree > 0 ? page.tree : 0;
  for (int i = 0; i < count; i++)
    for (int t = moved > queries[i].begin ? moved : queries[i].begin; t < queries[i].end; t++) {
      const int place = held_at(queries[i], page, t);
      scores[i][t] = place < kPageTokens ? scores[i][place] : beyond[i][place - kPageTokens];
    }
}

// The weights of blocks first..last - 1, exp(score - largest), and of each query the largest score and their sum.
inline void soften(const Query* queries, int count, int first, int last, const float (*scores)[kPageTokens],
                   Factor (*weights)[kPageTokens]) {
  for (int i = 0; i < count; i++) {
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
      // The sum is that of the rounded weights, so that they add up to one.
      total = add(total, store_factors(weights[i] + block * kLanes, weight));
    }
    queries[i].partial[0] = top;
    queries[i].partial[1] = sum(total);
  }
}

template <int Count>
void attend_tile(const Query* queries, const PageView& page, int size, const uint8_t* next) {
  // Enough chains of additions to hide their latency.
  constexpr int kTogether = kSums >= 4 * Count ? 2 : 1;
  float scores[Count][kPageTokens];
  Factor weights[Count][kPageTokens];
  const Range seen = seen_by(queries, Count, page);
  int begin = seen.begin, end = seen.end;
  const int held = seen.held, first = begin / (kLanes * kTogether) * kTogether;
  const auto blocks = [](int places) { return round_up(places, kLanes * kTogether) / kLanes; };
  const int last = held > 0 ? blocks(held < kPageTokens ? held : kPageTokens) : first;
  // One row after another: the multiplications find the next query at a fixed distance.
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
    if (held > kPageTokens)
      score<Count, kTogether>(together, page.next_keys, size, 0, blocks(held - kPageTokens), beyond, next);
    by_position(queries, Count, page, scores, beyond);
  }
  soften(queries, Count, first, last, scores, weights);
  begin = begin / 2 * 2;
  const int shared = page.tree > 0 ? page.tree / 2 * 2 : 0;
  end = round_up(end < shared ? end : shared, 2);
  int start = 0;
  if constexpr (kSums >= 4 * Count)
    for (; start + 4 * kLanes <= width; start += 4 * kLanes)
      weigh<Count, 4>(queries, weights, page.values, width, begin, end, start, next + 2 * page_numbers(size));
  if constexpr (kSums >= 2 * Count)
    for (; start + 2 * kLanes <= width; start += 2 * kLanes)
      weigh<Count, 2>(queries, weights, page.values, width, begin, end, start, next + 2 * page_numbers(size));
  for (; start < width; start += kLanes)
    weigh<Count, 1>(queries, weights, page.values, width, begin, end, start, next + 2 * page_numbers(size));
  for (int i = 0; i < Count; i++) weigh_path(queries[i], weights[i], page, width, shared);
}

template <int Count>
void attend_count(const Query* queries, int count, const PageView& page, int size, const uint8_t* next) {
  if (count == Count)
    attend_tile<Count>(queries, page, size, next);
  else if constexpr (Count > 1)
    attend_count<Count - 1>(queries, count, page, size, next);
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
  for (int first = 0; first < count; first += kQueries)
    attend_count<kQueries>(queries + first, count - first < kQueries ? count - first : kQueries, page, size,
                           static_cast<const uint8_t*>(next));
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
