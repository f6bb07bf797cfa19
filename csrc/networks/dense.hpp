// The gated feed-forward network: down(act(gate(x)) * up(x)).
#pragma once

#include "networks/network.hpp"

namespace fastmtp {

class Dense : public Network {
 public:
  Dense(int hidden, int feed_forward, Type type, bool bias, bool gelu)
      : gate_up(type, 2 * round_up(feed_forward, kLanes), hidden, bias),
        down(type, hidden, round_up(feed_forward, kLanes), bias),
        gelu_(gelu) {}

  const Matrix& input() const override { return gate_up; }
  void reserve(Runtime& runtime, int rows) const override;
  void run(Runtime& runtime, Team& team, int rows, float* out, int stride) const override;

  Matrix gate_up;  // outputs: sixteen of the gate, sixteen of up, and so on
  Matrix down;

 private:
  const bool gelu_;  // silu otherwise
};

}  // namespace fastmtp
