// Attention of some queries over one page in AMX tiles, for heads whose size is a multiple of 32. Pages have the
// layout of tiles. A score is formed from the key and the query alone; values are weighted 32 tokens at a time, at
// fixed positions, with weight 0 for those that a query does not see. So a row's bits do not depend on the rows beside
// it, nor on whether its tokens are a chain or a path through a tree. Part of kernels_attention.hpp.
#pragma once

namespace {

// Tokens of one tile of values, and dimensions of one tile of queries.
constexpr int kChunk = 32;

// Queries or weights are in tile 0, keys or values in 2 and 3, sums in 4 and 5 (TileConfig in kernels_amx.hpp).

// Scores of the keys in blocks first..last - 1 (both even) for queries [.][size].
void amx_score(const uint16_t* queries, const uint16_t* keys, int size, int first, int last,
               float (*scores)[kPageTokens], const uint8_t* next) {
  const size_t block_numbers = size_t(size) * kLanes;
  for (int block = first; block < last; block += 2) {
    const uint16_t *left = keys + block * block_numbers, *right = left + block_numbers;
    for (size_t line = 0; line < 4 * block_numbers; line += 64) prefetch(next + 2 * block * block_numbers + line);
    _tile_zero(4);
    _tile_zero(5);
    for (int d = 0; d < size; d += kChunk) {
      _tile_loadd(0, queries + d, size * sizeof(uint16_t));
      _tile_loadd(2, left + d * kLanes, 64);
      _tile_dpbf16ps(4, 0, 2);
      _tile_loadd(3, right + d * kLanes, 64);
      _tile_dpbf16ps(5, 0, 3);
    }
    _tile_stored(4, scores[0] + block * kLanes, kPageTokens * sizeof(float));
    _tile_stored(5, scores[0] + (block + 1) * kLanes, kPageTokens * sizeof(float));
  }
}

// Adds the values of chunks first..last - 1 by their weights to `totals` [.][size]; chunk `first` is at `values`.
void amx_weigh(const Factor (*weights)[kPageTokens], const uint16_t* values, int size, int first, int last,
               float* totals, const uint8_t* next) {
  const size_t pair_bytes = size * 2 * sizeof(uint16_t), total_bytes = size * sizeof(float);
  for (int start = 0; start < size; start += kChunk) {
    _tile_loadd(4, totals + start, total_bytes);
    _tile_loadd(5, totals + start + kLanes, total_bytes);
    const uint16_t* chunk_values = values + 2 * start;
    for (int chunk = first; chunk < last; chunk++, chunk_values += kChunk * size) {
      for (int pair = 0; pair < kChunk / 2; pair++) {
        const uint8_t* line = next + (size_t(chunk) * kChunk / 2 + pair) * pair_bytes + 4 * start;
        prefetch(line);
        prefetch(line + 64);
      }
      _tile_loadd(0, weights[0] + chunk * kChunk, kPageTokens * sizeof(Factor));
      _tile_loadd(2, chunk_values, pair_bytes);
      _tile_dpbf16ps(4, 0, 2);
      _tile_loadd(3, chunk_values + 2 * kLanes, pair_bytes);
      _tile_dpbf16ps(5, 0, 3);
    }
    _tile_stored(4, totals + start, total_bytes);
    _tile_stored(5, totals + start + kLanes, total_bytes);
  }
}

// The values that a query sees at the positions of a chunk, in the layout of a page's chunk.
void gather_chunk(const Query& query, const PageView& page, int size, int chunk, uint16_t* out) {
  for (int position = chunk * kChunk; position < (chunk + 1) * kChunk; position += 2, out += 2 * size) {
    const uint16_t* pairs[2] = {};
    bool odd[2] = {};
    for (int one = 0; one < 2; one++) {
      if (position + one < query.begin || position + one >= query.end) continue;
      const int slot = slot_of(query, page, position + one);
      odd[one] = slot % 2;
      pairs[one] = values_of(page, slot, size) - odd[one];
    }
    for (int i = 0; i < 2 * size; i += 2 * kLanes) {
      // One dimension of a token, in the lower half.
      const auto taken = [&](int one) {
        if (!pairs[one]) return _mm512_setzero_si512();
        const __m512i both = _mm512_loadu_si512(pairs[one] + i);
        return odd[one] ? _mm512_srli_epi32(both, 16) : _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
      };
      _mm512_store_si512(out + i, _mm512_or_si512(taken(0), _mm512_slli_epi32(taken(1), 16)));
    }
  }
}

void amx_attend(const Query* queries, int count, const PageView& page, int size, const uint8_t* next) {
  alignas(64) float scores[kTileQueries][kPageTokens];
  alignas(64) Factor weights[kTileQueries][kPageTokens] = {};
  alignas(64) uint16_t rows[kTileQueries * kLargestHead];
  alignas(64) float totals[kTileQueries * kLargestHead];
  const Range seen = seen_by(queries, count, page);
  const auto blocks = [](int slots) { return round_up(slots, kChunk) / kLanes; };
  const int first = seen.begin / kChunk * 2, last = blocks(seen.slots < kPageTokens ? seen.slots : kPageTokens);
  for (int i = 0; i < count; i++) __builtin_memcpy(rows + i * size, queries[i].q, size * sizeof(uint16_t));
  __builtin_memset(totals, 0, count * size * sizeof(float));
  const TileConfig tiles(count);
  finish_writes(&tiles);
  finish_writes(rows);
  _tile_loadconfig(&tiles);
  amx_score(rows, page.keys, size, first, last, scores, next);
  if (page.tree < seen.end) {
    float beyond[kTileQueries][kPageTokens];
    if (seen.slots > kPageTokens)
      amx_score(rows, page.next_keys, size, 0, blocks(seen.slots - kPageTokens), beyond, next);
    order_by_position(queries, count, page, scores, beyond);
  }
  softmax(queries, count, first, last, scores, weights);
  // Chunks in the order of positions are weighted for all queries together, those of a tree for each query by itself.
  const int begin = seen.begin / kChunk, end = round_up(seen.end, kChunk) / kChunk;
  const int ordered = page.tree >= seen.end ? end : page.tree > 0 ? page.tree / kChunk : 0;
  const int shared = ordered > begin ? ordered : begin;
  const uint8_t* next_values = next + 2 * head_numbers(size);
  finish_writes(weights);
  finish_writes(totals);
  amx_weigh(weights, page.values + size_t(begin) * kChunk * size, size, begin, shared, totals, next_values);
  for (int i = 0; i < count; i++) {
    const float* total = totals + i * size;
    alignas(64) float on_path[kTileQueries * kLargestHead];
    if (shared < end) {
      __builtin_memcpy(on_path, totals, count * size * sizeof(float));
      for (int chunk = shared; chunk < end; chunk++) {
        alignas(64) uint16_t gathered[kChunk * kLargestHead];
        gather_chunk(queries[i], page, size, chunk, gathered);
        finish_writes(gathered);
        finish_writes(on_path);
        amx_weigh(weights, gathered, size, chunk, chunk + 1, on_path, next_values);
      }
      total = on_path + i * size;
    }
    for (int d = 0; d < size; d += kLanes) store(queries[i].partial + kPartialHeader + d, load(total + d));
  }
  _tile_release();
}

}  // namespace
