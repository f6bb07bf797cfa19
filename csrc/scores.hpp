// States times the rows of a matrix, such as an LM head. Each call takes the runtime for itself until it returns.
#pragma once

#include <vector>

#include "runtime.hpp"

namespace fastmtp {

// out[m * stride + v] = states[m] times output v of the matrix; stride_of(matrix) suits.
void scores(Runtime& runtime, const Matrix& matrix, const float* states, int rows, float* out, int stride);

// The output of the matrix that scores highest for each row; of equal ones the first.
std::vector<int32_t> argmax(Runtime& runtime, const Matrix& matrix, const float* states, int rows);

}  // namespace fastmtp
