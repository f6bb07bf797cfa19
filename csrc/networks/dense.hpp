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

  void run(Runtime& runtime, Team& team, int rows, float* out, int stride) const override {
    const int wide_stride = stride_of(gate_up);
    float* wide = runtime.wide.get();
    runtime.matmul(team, Part::gate_up, gate_up, rows, wide, wide_stride);
    team.each(Part::convert, rows, [&](int m) {
      runtime.kernels.activate(wide + size_t(m) * wide_stride, down.inputs(), gelu_, runtime.own_row(team));
      team.lap(Part::activate);
      runtime.convert(down, runtime.own_row(team), m);
    });
    runtime.matmul(team, Part::down, down, rows, out, stride);
  }

  Matrix gate_up;  // outputs: sixteen of the gate, sixteen of up, and so on
  Matrix down;

 private:
  const bool gelu_;  // silu otherwise
};

}  // namespace fastmtp
