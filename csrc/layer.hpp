// A layer: a mixer and a network, each with a norm before it and optionally one after it, on a residual stream.
//
// Both read the runtime's stream, whose rows have the norm that they are told, and write out[m * stride + h] for M rows,
// by a product that something may follow. Both are run by the whole team.
#pragma once

#include <memory>

#include "batch.hpp"

namespace fastmtp {

// The part of a layer in which a token sees other tokens, such as attention.
class Mixer {
 public:
  // One layer's work in one forward pass. Working memory was reserved when it was planned.
  class Pass {
   public:
    virtual ~Pass() = default;
    virtual void run(Team& team, Norm norm, float* out, int stride, const Then* then) const = 0;
  };

  virtual ~Mixer() = default;

  // The first matrix: the layer converts the rows of the stream for it.
  virtual const Matrix& input() const = 0;
  virtual std::unique_ptr<State> new_state() const = 0;
  // Whether `new_state` could have made a state.
  virtual bool fits(const State& state) const = 0;
  // Plans a pass of the layer with this index in the caches, all of which fit. `before` is that of the layer before, if
  // there is one: much of a plan may be the same. Throws std::bad_alloc.
  virtual std::unique_ptr<Pass> plan(const Batch& batch, int layer, const Pass* before) const = 0;
};

// The part of a layer that processes each token alone.
class Network {
 public:
  virtual ~Network() = default;

  // As for a mixer.
  virtual const Matrix& input() const = 0;
  // Reserves working memory. Throws std::bad_alloc.
  virtual void reserve(Runtime& runtime, int rows) const = 0;
  virtual void run(Runtime& runtime, Team& team, Norm norm, int rows, float* out, int stride,
                   const Then* then) const = 0;
};

struct Layer {
  std::unique_ptr<Mixer> mixer;
  std::unique_ptr<Network> network;
  Gains mixer_norm, mixer_out_norm, network_norm, network_out_norm;
};

}  // namespace fastmtp
