// Attention with grouped key/value heads and rope, over all earlier tokens or a window of the last ones.
#pragma once

#include "layer.hpp"
#include "mixers/key_values.hpp"

namespace fastmtp {

struct AttentionShape {
  int heads, key_heads, head_size;
  float epsilon;  // of the norms of queries and keys
  float scale;    // of the scores

  int group() const { return heads / key_heads; }  // query heads that share a key head
};

class Attention : public Mixer {
 public:
  Attention(int hidden, const AttentionShape& shape, Type type, bool bias, bool out_bias, int window, int rope)
      : query_key_value(type, (shape.heads + 2 * shape.key_heads) * shape.head_size, hidden, bias),
        out(type, hidden, shape.heads * shape.head_size, out_bias), shape(shape), window(window), rope(rope) {}

  const Matrix& input() const override { return query_key_value; }
  std::unique_ptr<State> new_state() const override;
  bool fits(const State& state) const override;
  std::unique_ptr<Pass> plan(const Batch& batch, int layer, const Pass* before) const override;

  Matrix query_key_value;  // outputs: the query heads, the key heads, the value heads
  Matrix out;
  Gains query_norm, key_norm;
  const AttentionShape shape;
  const int window;  // a token sees this many tokens up to itself; 0: all of them
  const int rope;    // index into the stack's ropes
};

}  // namespace fastmtp
