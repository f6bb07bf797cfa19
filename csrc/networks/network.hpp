// The part of a layer that looks at each token alone.
#pragma once

#include "runtime.hpp"

namespace fastmtp {

class Network {
 public:
  virtual ~Network() = default;

  // The first matrix: the one for which the layer converts the normed rows.
  virtual const Matrix& input() const = 0;
  // Working memory for `rows` rows. Throws std::bad_alloc.
  virtual void reserve(Runtime& runtime, int rows) const = 0;
  // From the operand, which holds the normed rows, to out[m * stride + h]; by the whole team.
  virtual void run(Runtime& runtime, Team& team, int rows, float* out, int stride) const = 0;
};

}  // namespace fastmtp
