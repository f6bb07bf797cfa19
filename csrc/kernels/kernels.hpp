// What one thread computes, in one table of functions for each kind of processor.
//
// Shapes: M rows (tokens), N outputs, K inputs, D head size. Every function treats its rows one by one: what comes
// out for a row is the same to the bit whichever rows stand beside it. That is the engine's batch invariance.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmtp {

constexpr int kLanes = 16;       // outputs in one block of a packed matrix; tokens in one block of keys
constexpr int kGroup = 64;       // inputs that share a scale in int8; inputs are padded to a multiple of it
constexpr int kHalf = 32;        // inputs that share a scale in int4 (matrix.hpp says more)
constexpr int kPageTokens = 256; // tokens in one page of a cache
constexpr int kLargestHead = 512;
constexpr int kTileQueries = 8;  // queries that share one pass over keys and values

enum class Type { bf16, int8, int4 };

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Weights in blocks of sixteen outputs, each block contiguous (see matrix.hpp).
struct PackedView {
  Type type;
  int outputs;
  int groups;
  size_t block_bytes;
  const uint8_t* data;
  const float* bias;  // null where there is none
};

// Rows of inputs in the arithmetic of the weights: bf16, or int8 with a scale and a sum for each group that the
// weights have.
struct Operand {
  uint8_t* values;
  float* scales;   // [M, groups], or [M, 2 groups] for int4
  int32_t* sums;   // the same
  int groups;      // of kGroup inputs

  int8_t* int8_row(int row) const { return reinterpret_cast<int8_t*>(values) + size_t(row) * groups * kGroup; }
  uint16_t* bf16_row(int row) const { return reinterpret_cast<uint16_t*>(values) + size_t(row) * groups * kGroup; }
};

// Softmax attention over part of the keys: largest score, sum of exp(score - largest), values weighted by that.
// In memory: largest, sum, then D weighted values.
constexpr int kPartialHeader = 2;

// One head's keys and values in a page. From place `tree` on, which may lie before or behind the page, tokens lie in
// the order of a tree's nodes, and that goes on in the page after it.
struct PageView {
  const uint16_t *keys, *values, *next_keys, *next_values;
  int tree;
};

// One query of a tile: its D numbers, which places of the page it sees, where its partial result goes.
struct Query {
  const uint16_t* q;  // bf16
  int begin, end;
  float* partial;
  const int32_t* path;  // what it sees at place tree + i is in place tree + path[i], which is no earlier
};

struct Kernels {
  const char* name;

  // out[m * stride + n] = sum_k x[m, k] w[n, k] + bias[n] for the outputs n of some blocks.
  void (*matmul)(const PackedView&, const Operand&, int rows, int first_block, int last_block, float* out,
                 int stride);
  // Fills one row of an operand from K floats.
  void (*convert)(Type, const float* x, int size, const Operand&, int row);
  // out = x / rms(x) * gain
  void (*norm)(const float* x, const float* gain, int size, float epsilon, float* out);
  // x += y
  void (*add)(float* x, const float* y, int size);
  // out = act(gate) * up, from blocks of sixteen of each in turn
  void (*activate)(const float* gate_up, int size, bool gelu, float* out);
  // Rotates the halves of one head against each other, scales, and rounds to bf16.
  void (*rotate)(const float* x, const float* cosine, const float* sine, int size, float scale, uint16_t* out);
  // One token's key (bf16) and value of one head into a page.
  void (*store_token)(const uint16_t* key, const float* value, int size, int place, uint16_t* keys, uint16_t* values);
  // Partial attention of up to kTileQueries queries over one page of one head; meanwhile the memory that is wanted
  // `next`, as much as the page's, is fetched.
  void (*attend)(const Query* queries, int count, const PageView&, int size, const void* next);
  // Adds the second partial result to the first.
  void (*merge)(float* total, const float* part, int size);
  // Where the largest number is; of equal ones the first.
  int (*argmax)(const float* x, int size);
  // The sum of exp(x - top).
  float (*sum_exponentials)(const float* x, int size, float top);
  // Reads memory as fast as it goes, and returns the sum of what is there.
  float (*read)(const float* memory, size_t count);
};

// How many bf16 numbers one head's keys, or values, take in a page: keys as [block][D / 2][16 tokens][2], values as
// [token / 2][D rounded up to lanes][2]; the pairs are what one instruction multiplies and adds.
constexpr size_t page_numbers(int size) { return size_t(kPageTokens) * round_up(size, kLanes); }

// The fastest table that this processor can run, or the one that FASTMTP_KERNELS names.
// Throws std::invalid_argument for a name that is unknown or that the processor cannot run.
const Kernels& kernels();

// Every table that this processor can run, fastest first; null-terminated.
const Kernels* const* available_kernels();

}  // namespace fastmtp
