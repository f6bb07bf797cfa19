// What one thread computes, in one table of functions for each kind of processor.
//
// Shapes: M rows (tokens), N outputs, K inputs, D head size. Every function computes each row independently: a row's
// result has the same bits whichever rows are beside it. That is the engine's batch invariance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastmtp {

constexpr int kLanes = 16;       // outputs in one block of a packed matrix; tokens in one block of keys
constexpr int kGroup = 64;       // inputs that share a scale in int8; inputs are padded to a multiple of it
constexpr int kHalf = 32;        // inputs that share a scale in int4 (matrix.hpp says more)
// Of an int4 group of sixteen outputs: the bytes of its numbers, and with its steps and least weights.
constexpr size_t kHalfWords = size_t(kHalf) / 8 * kLanes * 4, kHalfBytes = kHalfWords + 2 * kLanes * sizeof(uint16_t);
constexpr int kPageTokens = 256; // tokens in one page of a cache
constexpr int kLargestHead = 512;
constexpr int kTileQueries = 16; // queries that share one pass over keys and values, as many as a tile has rows
constexpr int kBlocksTogether = 4;   // of a matrix, that one row is multiplied by at once
constexpr size_t kPeakBytes = 4096; // that the measurements of the arithmetic's speed use

enum class Type { bf16, int8, int4 };

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// In a page, one head's keys are [block][D / 2][16 tokens][2] and its values [token / 2][D rounded up to lanes][2];
// the pairs are what one instruction multiplies and adds. How many bf16 numbers the keys, or the values, take:
constexpr size_t head_numbers(int size) { return size_t(kPageTokens) * round_up(size, kLanes); }
// Where the first number of a token is, by its slot in the page.
constexpr size_t key_offset(int slot, int size) { return size_t(slot / kLanes) * size * kLanes + slot % kLanes * 2; }
constexpr size_t value_offset(int slot, int size) { return size_t(slot / 2) * round_up(size, kLanes) * 2 + slot % 2; }

// Weights in blocks of sixteen outputs, each block contiguous (see matrix.hpp).
struct PackedView {
  Type type;
  int outputs;
  int groups;
  size_t block_bytes;
  const uint8_t* data;
  const float* bias;  // null where there is none
};

// Rows of inputs in the arithmetic of the weights: bf16, or int8 with a scale and a sum for each group of the weights.
// They are stored by group, so that threads with neighbouring groups seldom write to one cache line.
struct Operand {
  uint8_t* values;       // [M, groups, kGroup]
  float* scales;         // [groups, stride], or [2 groups, stride] for int4
  int32_t* sums;         // the same; in int8 it is what the sum of products with unsigned weights begins with
  const float* factors;  // [M], of the products with each row
  int groups;            // of kGroup inputs
  int stride;            // at least M

  int8_t* int8_row(int row) const { return reinterpret_cast<int8_t*>(values) + size_t(row) * groups * kGroup; }
  uint16_t* bf16_row(int row) const { return reinterpret_cast<uint16_t*>(values) + size_t(row) * groups * kGroup; }

  size_t index(int row, int group) const { return size_t(group) * stride + row; }

  // Without the rows before one.
  Operand from(Type type, int row) const {
    uint8_t* first = type == Type::bf16 ? reinterpret_cast<uint8_t*>(bf16_row(row)) : values + size_t(row) * groups * kGroup;
    return {first, scales + row, sums + row, factors ? factors + row : nullptr, groups, stride};
  }
};

// A partial result of softmax attention over some keys, in memory: the largest score, the sum of
// 2^(score - largest), then the sum of the values weighted by that, D numbers. Queries are scaled by log2(e) for it.
constexpr int kPartialHeader = 2;

// One head's keys and values in a page. From slot `tree` on, which may be before or after the page, tokens are in the
// order of a tree's nodes, which continue in the next page.
struct PageView {
  const uint16_t *keys, *values, *next_keys, *next_values;
  int tree;
};

// One query of a tile: its D numbers, which positions it sees (0 is the page's first), where its partial result goes.
struct Query {
  const uint16_t* q;  // bf16
  int begin, end;
  float* partial;
  const int32_t* path;  // what it sees at position tree + i is in slot tree + path[i], which is no earlier
};

struct Kernels {
  const char* name;

  // out[m * stride + n] = factor[m] sum_k x[m, k] w[n, k] + bias[n] for the outputs n of some blocks.
  void (*matmul)(const PackedView&, const Operand&, int rows, int first_block, int last_block, float* out,
                 int stride);
  // Fills one group of a row of an operand from up to kGroup floats, each multiplied by its gain if there are any.
  void (*convert)(Type, const float* x, const float* gain, int size, const Operand&, int row, int group);
  // out = x / rms(x) * gain
  void (*norm)(const float* x, const float* gain, int size, float epsilon, float* out);
  // x += y; returns the sum of the squares of x.
  float (*add)(float* x, const float* y, int size);
  // out = act(gate) * up, from blocks of sixteen of each in turn
  void (*activate)(const float* gate_up, int size, bool gelu, float* out);
  // Rotates the halves of one head against each other, scales, and rounds to bf16.
  void (*rotate)(const float* x, const float* cosine, const float* sine, int size, float scale, uint16_t* out);
  // One token's key (bf16), or its value, of one head into a page.
  void (*store_key)(const uint16_t* key, int size, int slot, uint16_t* keys);
  void (*store_value)(const float* value, int size, int slot, uint16_t* values);
  // Partial attention of up to kTileQueries queries over one page of one head; meanwhile the memory at `next`, as much
  // as a page's, is prefetched.
  void (*attend)(const Query* queries, int count, const PageView&, int size, const void* next);
  // Adds the second partial result to the first.
  void (*merge)(float* total, const float* part, int size);
  // What a result says of the values: their weighted mean.
  void (*divide)(const float* total, int size, float* out);
  // The index of the largest number; of equal ones the first.
  int (*argmax)(const float* x, int size);
  // The sum of exp(x - top).
  float (*sum_exponentials)(const float* x, int size, float top);
  // The tokens of the first `size` whose random number is at most `limit`, in 64 bits, or has the same high 31 bits;
  // returns how many. `found` has room for all.
  int (*small_numbers)(uint64_t key, int size, uint64_t limit, int32_t* found);
  // Reads memory as fast as possible, and returns the sum of its numbers.
  float (*read)(const float* memory, size_t count);
  // Does as many multiply-adds a second as it can, with weights of a type or as attention does them, in kPeakBytes of
  // zeros; returns how many.
  double (*product_peak)(Type, uint8_t* memory);
  double (*attention_peak)(uint8_t* memory);
};

// The fastest table that this processor can run, or the one that FASTMTP_KERNELS names.
// Throws std::invalid_argument for a name that is unknown or that the processor cannot run.
const Kernels& kernels();

// Every table that this processor can run, fastest first.
const std::vector<const Kernels*>& available_kernels();

}  // namespace fastmtp
