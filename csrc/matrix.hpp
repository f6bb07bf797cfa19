// Weights in the order in which the kernels read them.
//
// Sixteen outputs make a block; a block holds all inputs of its outputs, so that it is one stream from memory:
//   bf16  [inputs / 2][16 outputs][2]
//   int8  [groups][64 / 4][16 outputs][4] of w + 128, then [groups][16 outputs] of bf16 scales; groups of 64
//   int4  [groups]([32 / 8][16 outputs][4] of two four-bit numbers, of inputs k and k + 4, then [16 outputs] of bf16
//         steps and [16 outputs] of bf16 least weights); groups of 32; w = least + step * number
// A group is inputs that share a scale. What pads inputs and outputs multiplies to zero.
//
// Before int8 rounding each group of weights, and of inputs (the kernels' convert), is multiplied by the orthonormal
// Walsh-Hadamard matrix: products stay what they were, and an outlier among the inputs, which would set the scale
// for its whole group, is spread over 64 places (after QuaRot, arXiv 2404.00456). int4 is not transformed: so it holds
// what a GGUF file's Q4_0 and Q4_1 tensors hold, but for the scales' rounding.
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
  int blocks() const { return round_up(outputs_, kLanes) / kLanes; }
  size_t bytes() const { return blocks() * block_bytes_; }
  PackedView view() const { return {type_, outputs_, groups_, block_bytes_, data_.get(), bias_.get()}; }

  // Rounds `count` rows of inputs and puts them at the outputs in `places`. Throws std::invalid_argument.
  void pack(const int32_t* places, const float* rows, int count);
  void set_bias(const int32_t* places, const float* values, int count);
  // The weights of one output, as they are multiplied.
  void unpack(int output, float* row) const;
  // Copies outputs of a matrix of the same kind, bits and all.
  void copy(const int32_t* places, const Matrix& source, const int32_t* outputs, int count);

 private:
  void check_places(const int32_t* places, int count) const;
  void pack_row(int output, const float* row);
  uint8_t* half_group(int output, int group) const;  // of int4

  Type type_;
  int outputs_, inputs_, groups_;
  size_t block_bytes_;
  Buffer<uint8_t> data_;
  Buffer<float> bias_;
};

}  // namespace fastmtp
