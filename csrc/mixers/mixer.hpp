// The part of a layer that looks at other tokens, such as attention.
#pragma once

#include <memory>

#include "batch.hpp"

namespace fastmtp {

class Mixer {
 public:
  // One layer's work in one forward pass. Working memory was reserved when it was planned.
  class Pass {
   public:
    virtual ~Pass() = default;
    // From the operand, which holds the normed rows, to out[m * stride + h]; by the whole team.
    virtual void run(Team& team, float* out, int stride) const = 0;
  };

  virtual ~Mixer() = default;

  // The first matrix: the one for which the layer converts the normed rows.
  virtual const Matrix& input() const = 0;
  virtual std::unique_ptr<State> new_state() const = 0;
  // Whether a state is one that `new_state` could have made.
  virtual bool fits(const State& state) const = 0;
  // Plans a pass of the layer with this index in the caches, all of which fit. Throws std::bad_alloc.
  virtual std::unique_ptr<Pass> plan(const Batch& batch, int layer) const = 0;
};

}  // namespace fastmtp
