// The MTP head: a projection of [norm(state), norm(embedding of the next token)], then a stack of its own.
#pragma once

#include "model.hpp"

namespace fastmtp {

struct Projection {
  Projection(Type type, int hidden)
      : matrix(type, hidden, 2 * hidden, false), hidden_norm(hidden, 1.0f), token_norm(hidden, 1.0f) {}
  Matrix matrix;
  Gains hidden_norm, token_norm;
};

class Head {
 public:
  // Holds references. Throws std::invalid_argument if the parts do not fit together.
  Head(const Model& model, const Stack& stack, const Projection& projection);

  // Fills `after`, the states [M, H] after the head's final norm, from the state [H] before each of M tokens. Takes the
  // runtime until it returns, and throws std::bad_alloc before it writes anything.
  void forward(const std::vector<Segment>& segments, const std::vector<int32_t>& tokens,
               const std::vector<const float*>& before, float* after) const;

  const Model& model;
  const Stack& stack;
  const Projection& projection;
};

}  // namespace fastmtp
