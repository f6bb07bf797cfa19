// A decoder: embeddings, a stack of layers, and an LM head.
//
// Shapes: M rows (the tokens of all segments, in order), H hidden.
#pragma once

#include <list>
#include <memory>
#include <vector>

#include "layer.hpp"

namespace fastmtp {

struct Stack {
  Stack(int hidden, float epsilon) : hidden(hidden), epsilon(epsilon), final_norm(hidden, 1.0f) {}
  Stack(const Stack&) = delete;

  Cache new_cache() const;
  // Whether `new_cache` could have made a cache.
  bool fits(const Cache& cache) const;

  const int hidden;
  const float epsilon;  // of the norms
  std::vector<Rope> ropes;
  std::list<Layer> layers;  // a list, since Python holds references to its items
  Gains final_norm;

 private:
  mutable std::shared_ptr<Pages> pages_;  // of its caches, which may live longer
};

// One forward pass through a stack, for a team. What a phase does to a row (or a head, or a block of outputs) is done
// by one thread, so nothing depends on the number of threads.
class Pass {
 public:
  // Plans the pass and reserves working memory. Throws std::bad_alloc before anything is written.
  Pass(Runtime& runtime, const Stack& stack, const std::vector<Segment>& segments);

  int rows() const { return batch_.rows; }
  // What is added to the residual stream next, [M, stride]. Before `run` that is the input of the stack.
  int stride() const { return stride_of(stack_.hidden); }
  float* branch(int m) const { return runtime_.branch.get() + size_t(m) * stride(); }

  // Fills `states` [M, H], after all layers and the final norm, and optionally the last layer's inputs [M, H].
  void run(Team& team, float* states, float* last_inputs = nullptr) const;

 private:
  float* x(int m) const { return runtime_.x.get() + size_t(m) * stack_.hidden; }
  // Calls run(then), which fills the branch, and applies `out_norm` to it; then adds it to the residual stream and
  // converts the sum for a product with `matrix`, which applies what is left of the norm with these gains.
  template <class Run>
  void add_branch(Team& team, Run run, const Gains& out_norm, const Gains& gains, const Matrix& matrix) const;
  // A norm of what is added next.
  void norm_branch(Team& team, const Gains& gains) const;
  // What is left of a norm of the stream with these gains.
  Norm left_of(const Gains& gains) const { return gains.empty() ? Norm{} : Norm{stack_.hidden, stack_.epsilon}; }

  Runtime& runtime_;
  const Stack& stack_;
  const Batch batch_;
  std::vector<std::unique_ptr<Mixer::Pass>> mixers_;  // by layer
};

class Model {
 public:
  // Holds references. Throws std::invalid_argument if the parts do not fit together.
  Model(Runtime& runtime, const Stack& stack, const Matrix& embedding, const Matrix& lm_head, float embedding_scale);

  // Fills the states [M, H] after the final norm, and optionally the last layer's inputs [M, H]. Takes the runtime
  // until it returns, and throws std::bad_alloc before it writes anything.
  void forward(const std::vector<Segment>& segments, const int32_t* tokens, float* states,
               float* last_inputs = nullptr) const;
  // The embedding of one token.
  void embed(int token, float* out) const;

  Runtime& runtime;
  const Stack& stack;
  const Matrix &embedding, &lm_head;  // may be the same
  const float embedding_scale;
};

}  // namespace fastmtp
