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
    runtime.reserve(runtime.stream, rows, gate_up.inputs());
    runtime.reserve(runtime.inner, rows, down.inputs());
    runtime.reserve_groups(down.groups());
    runtime.wide.reserve(size_t(rows) * stride_of(gate_up));
  }

  void run(Runtime& runtime, Team& team, Norm norm, int rows, float* out, int stride,
           const Then* then) const override {
    const int wide_stride = stride_of(gate_up);
    const float* wide = runtime.wide.get();
    const auto activate = [&](const Team&, int m, int group) {
      const int start = group * kGroup, size = std::min(kGroup, down.inputs() - start);
      float active[kGroup];
      runtime.kernels.activate(wide + size_t(m) * wide_stride + 2 * start, size, gelu_, active);
      runtime.convert(runtime.inner, down, active, m, group);
    };
    const Then activated(Part::activate, 2 * kGroup, activate);
    runtime.matmul(team, Part::gate_up, runtime.stream, gate_up, rows, runtime.wide.get(), wide_stride, norm, &activated);
    runtime.matmul(team, Part::down, runtime.inner, down, rows, out, stride, {}, then);
  }

  Matrix gate_up;  // outputs: sixteen of the gate, sixteen of up, and so on
  Matrix down;

 private:
  const bool gelu_;  // silu otherwise
};

}  // namespace fastmtp
