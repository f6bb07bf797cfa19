// The weights of a decoder of the Llama family. What differs between its members is data: a matrix may have a bias,
// a norm may be absent, a layer may see only a window of the last tokens.
#pragma once

#include <list>
#include <vector>

#include "matrix.hpp"

namespace fastmtp {

using Gains = std::vector<float>;  // of a norm; empty where there is no norm

struct Shape {
  int hidden, heads, key_heads, head_size, feed_forward;
  float epsilon;
  float attention_scale;  // of the scores
  bool gelu;              // in the feed-forward network; silu otherwise
};

struct Rope {
  std::vector<float> inverse_frequencies;  // [head_size / 2]
  float scale;                             // of cosine and sine
};

struct Layer {
  Layer(const Shape& s, Type type, bool bias, bool out_bias, bool feed_forward_bias)
      : query_key_value(type, (s.heads + 2 * s.key_heads) * s.head_size, s.hidden, bias),
        out(type, s.hidden, s.heads * s.head_size, out_bias),
        gate_up(type, 2 * round_up(s.feed_forward, kLanes), s.hidden, feed_forward_bias),
        down(type, s.hidden, round_up(s.feed_forward, kLanes), feed_forward_bias) {}

  Matrix query_key_value;  // outputs: the query heads, the key heads, the value heads
  Matrix out;
  Matrix gate_up;  // outputs: sixteen of the gate, sixteen of up, and so on
  Matrix down;
  Gains input_norm, attention_out_norm, feed_forward_norm, feed_forward_out_norm, query_norm, key_norm;
  int window = 0;  // 0: every earlier token is seen
  int rope = 0;    // which of the stack's ropes
};

struct Stack {
  explicit Stack(const Shape& shape) : shape(shape) {}
  Stack(const Stack&) = delete;

  Shape shape;
  std::vector<Rope> ropes;
  std::list<Layer> layers;  // a list, since Python holds references to its items
  Gains final_norm;
};

// What stands before the stack: a target's embeddings (which may be the LM head) ...
struct Embedding {
  const Matrix& matrix;
  float scale;
};

// ... or an MTP head's projection of [norm(state), norm(embedding of the next token)].
struct Projection {
  Projection(Type type, int hidden) : matrix(type, hidden, 2 * hidden, false) {}
  Matrix matrix;
  Gains hidden_norm, token_norm;
};

}  // namespace fastmtp
