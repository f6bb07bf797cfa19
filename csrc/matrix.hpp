// Weights in the order in which the kernels read them.
//
// Sixteen outputs make a block; a block contains all inputs of its outputs, so that it is one stream from memory:
//   bf16  [inputs / 2][16 outputs][2]
//   int8  [groups][64 / 4][16 outputs][4] of w + 128, then [groups][16 outputs] of bf16 scales; groups of 64
//   int4  [groups]([32 / 8][16 outputs][4] of two four-bit numbers, of inputs k and k + 4, then [16 outputs] of bf16
//         steps and [16 outputs] of bf16 least weights); groups of 32; w = least + step * number
// The inputs of a group share a scale. Padding of inputs and outputs adds nothing to a product.
//
// Before int8 rounding each group of weights, and of inputs (the kernels' convert), is multiplied by the orthonormal
// Walsh-Hadamard matrix: products stay the same, and an outlier among the inputs, which would set the scale for its
// whole group, is spread over 64 numbers (after QuaRot, arXiv 2404.00456). int4 is not transformed, so it represents
// the tensors of a GGUF file's Q4_0 and Q4_1 up to the rounding of scales.
#pragma once

#include <string>

#include "kernels/kernels.hpp"
#include "memory.hpp"

namespace fastmtp {

class Matrix {
 public:
  // A matrix of zeros. Throws std::bad_alloc.
  Matrix(Type type, int outputs, int inputs, bool with_bias);

  Type type() const { return type_; }
  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  int groups() const { return groups_; }
  int blocks() const { return round_up(outputs_, kLanes) / kLanes; }
  size_t bytes() const { return blocks() * block_bytes_; }
  PackedView view() const { return {type_, outputs_, groups_, block_bytes_, data_, bias_}; }

  // All that is stored: the blocks, then the bias.
  const uint8_t* memory() const { return data_; }
  size_t memory_bytes() const { return bytes() + (bias_ ? blocks() * kLanes * sizeof(float) : 0); }
  // Has its weights in `memory` in place of its own: what another matrix stored there, or zeros.
  void use(uint8_t* memory, std::shared_ptr<void> owner);

  // Rounds `count` rows of inputs and stores them as these outputs. Several threads may pack rows of one matrix.
  // Throws std::invalid_argument.
  void pack(const int32_t* outputs, const float* rows, int count);
  // Stores weights that are on a grid already, least + step * number, in an int4 matrix whose width is a multiple of
  // 32: numbers [count, inputs] below 16, steps and least weights [count, inputs / 32].
  void pack_grid(const int32_t* outputs, const uint8_t* numbers, const float* steps, const float* least, int count);
  void set_bias(const int32_t* outputs, const float* values, int count);
  // The weights of one output after rounding.
  void unpack(int output, float* row) const;
  // Copies outputs of a matrix of the same type and width bit for bit.
  void copy(const int32_t* outputs, const Matrix& source, const int32_t* source_outputs, int count);

 private:
  void check_outputs(const int32_t* outputs, int count) const;
  void pack_row(int output, const float* row);
  void pack_int4(int output, int start, const uint8_t* numbers, uint16_t step, uint16_t least);
  uint8_t* block(int output) const;

  Type type_;
  int outputs_, inputs_, groups_;
  size_t block_bytes_;
  Buffer<uint8_t> own_;
  std::shared_ptr<void> owner_;  // of memory that is not its own
  uint8_t* data_;
  float* bias_;  // null where there is none
};

}  // namespace fastmtp
