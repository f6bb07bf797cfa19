// Forward passes. Each takes a runtime for itself until it returns, and throws before it writes anything.
//
// Shapes: M rows (the tokens of all segments, in order), H hidden, V outputs of a matrix.
#pragma once

#include <vector>

#include "attention.hpp"
#include "model.hpp"
#include "runtime.hpp"

namespace fastmtp {

// The target's states [M, H] after its final norm, and if wanted what its last layer was given, [M, H].
void target_forward(Runtime& runtime, const Stack& stack, const Embedding& embedding,
                    const std::vector<Segment>& segments, const int32_t* tokens, float* states,
                    float* last_inputs = nullptr);

// The MTP head's states [M, H] after its final norm, from the states before and the tokens that follow them.
void head_forward(Runtime& runtime, const Stack& stack, const Projection& projection, const Embedding& embedding,
                  const std::vector<Segment>& segments, const int32_t* tokens, const float* before, float* states);

// out[m * stride + v] = states[m] times output v of the matrix; stride_of(matrix) suits.
void scores(Runtime& runtime, const Matrix& matrix, const float* states, int rows, float* out, int stride);

// The output of the matrix that scores highest for each row; of equal ones the first.
std::vector<int32_t> choices(Runtime& runtime, const Matrix& matrix, const float* states, int rows);

}  // namespace fastmtp
