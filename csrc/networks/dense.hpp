// The gated feed-forward network: down(act(gate(x)) * up(x)).
#pragma once

#include "layer.hpp"

namespace fastmtp {

class Dense : public Network {
 public:
  Dense(int hidden, int feed_forward, Type type, bool bias, bool gelu)
      : gate_up(type, 2 * round_up(feed_forward, kLanes), hidden, bias),
        down(type, hidden, round_up(feed_forward, kLanes), bias), gelu_(gelu) {}

  const Matrix& input() const override { return gate_up; }

  void reserve(Runtime& runtime, int rows) const override {
    for (const Matrix* matrix : {&gate_up, &down}) runtime.reserve_operand(rows, matrix->inputs());
    runtime.wide.reserve(size_t(rows) * stride_of(gate_up));
  }

  void run(Runtime& runtime, Team& team, Norm norm, int rows, float* out, int stride) const override {
    const int wide_stride = stride_of(gate_up);
    float* wide = runtime.wide.get();
    runtime.matmul(team, Part::gate_up, gate_up, rows, wide, wide_stride, norm);
    team.each_group(Part::activate, rows, down.groups(), [&](int m, int group) {
      const int start = group * kGroup, size = std::min(kGroup, down.inputs() - start);
      float active[kGroup];
      runtime.kernels.activate(wide + size_t(m) * wide_stride + 2 * start, size, gelu_, active);
      runtime.convert(down, active, m, group);
    });
    runtime.matmul(team, Part::down, down, rows, out, stride);
  }

  Matrix gate_up;  // outputs: sixteen of the gate, sixteen of up, and so on
  Matrix down;

 private:
  const bool gelu_;  // silu otherwise
};

}  // namespace fastmtp
