// Attention with grouped key/value heads and rope, over all earlier tokens or a window of the last ones.
#pragma once

#include "mixers/mixer.hpp"
#include "mixers/paged_attention.hpp"

namespace fastmtp {

class Attention : public Mixer {
 public:
  Attention(int hidden, const AttentionShape& shape, Type type, bool bias, bool out_bias, int window, int rope)
      : query_key_value(type, (shape.heads + 2 * shape.key_heads) * shape.head_size, hidden, bias),
        out(type, hidden, shape.heads * shape.head_size, out_bias),
        shape(shape), window(window), rope(rope) {}

  const Matrix& input() const override { return query_key_value; }
  std::unique_ptr<State> new_state() const override;
  bool fits(const State& state) const override;
  std::unique_ptr<Pass> plan(const Batch& batch, int layer) const override;

  Matrix query_key_value;  // outputs: the query heads, the key heads, the value heads
  Matrix out;
  Gains query_norm, key_norm;
  const AttentionShape shape;
  const int window;  // 0: every earlier token is seen
  const int rope;    // which of the stack's ropes
};

}  // namespace fastmtp
