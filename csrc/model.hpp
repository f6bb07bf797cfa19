// A decoder: embeddings, a stack of layers, and an LM head.
//
// A layer is a mixer and a network, each with a norm before it and perhaps one behind it, on a residual stream.
// Shapes: M rows (the tokens of all segments, in order), H hidden.
#pragma once

#include <list>
#include <memory>
#include <vector>

#include "batch.hpp"
#include "mixers/mixer.hpp"
#include "networks/network.hpp"

namespace fastmtp {

struct Layer {
  std::unique_ptr<Mixer> mixer;
  std::unique_ptr<Network> network;
  Gains mixer_norm, mixer_out_norm, network_norm, network_out_norm;
};

struct Stack {
  Stack(int hidden, float epsilon) : hidden(hidden), epsilon(epsilon), final_norm(hidden, 1.0f) {}
  Stack(const Stack&) = delete;

  Cache new_cache() const;
  // Whether a cache is one that `new_cache` could have made.
  bool fits(const Cache& cache) const;

  const int hidden;
  const float epsilon;  // of the norms
  std::vector<Rope> ropes;
  std::list<Layer> layers;  // a list, since Python holds references to its items
  Gains final_norm;
};

// One forward pass through a stack, for a team. What a phase of it does to a row (or a head, or a block of outputs)
// is done by one thread, so nothing depends on their number.
class Pass {
 public:
  // Plans the pass and reserves working memory. Throws std::bad_alloc before anything is written.
  Pass(Runtime& runtime, const Stack& stack, const std::vector<Segment>& segments);

  int rows() const { return batch_.rows; }
  // What is added to the residual stream next, [M, stride]. Before `run` that is the input [M, H].
  int stride() const { return stride_of(stack_.hidden); }
  float* branch(int m) const { return runtime_.branch.get() + size_t(m) * stride(); }

  // From the input through all layers and the final norm, [M, H]; if wanted, also what the last layer is given.
  void run(Team& team, float* states, float* last_inputs = nullptr) const;

 private:
  float* x(int m) const { return runtime_.x.get() + size_t(m) * stack_.hidden; }
  void add_branch(const Team& team, int m, const Gains& out_norm) const;
  void convert_norm(const Team& team, int m, const Gains& gains, const Matrix& matrix) const;

  Runtime& runtime_;
  const Stack& stack_;
  const Batch batch_;
  std::vector<std::unique_ptr<Mixer::Pass>> mixers_;  // by layer
};

class Model {
 public:
  // Keeps references. Throws std::invalid_argument if the parts do not fit together.
  Model(Runtime& runtime, const Stack& stack, const Matrix& embedding, const Matrix& lm_head, float embedding_scale);

  // The states [M, H] after the final norm, and if wanted what the last layer is given, [M, H]. Takes the runtime for
  // itself until it returns, and throws std::bad_alloc before it writes anything.
  void forward(const std::vector<Segment>& segments, const int32_t* tokens, float* states,
               float* last_inputs = nullptr) const;
  // The embedding of one token.
  void embed(int token, float* out) const;

  Runtime& runtime;
  const Stack& stack;
  const Matrix &embedding, &lm_head;  // which may be one
  const float embedding_scale;
};

}  // namespace fastmtp
