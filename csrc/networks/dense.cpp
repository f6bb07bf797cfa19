#include "networks/dense.hpp"

namespace fastmtp {

void Dense::reserve(Runtime& runtime, int rows) const {
  for (const Matrix* matrix : {&gate_up, &down}) {
    runtime.reserve_operand(rows, matrix->inputs());
    runtime.reserve_rows(matrix->inputs());
  }
  runtime.wide.reserve(size_t(rows) * stride_of(gate_up));
}

void Dense::run(Runtime& runtime, Team& team, int rows, float* out, int stride) const {
  const int wide_stride = stride_of(gate_up);
  float* wide = runtime.wide.get();
  runtime.matmul(team, gate_up, rows, wide, wide_stride);
  team.each(rows, [&](int m) {
    runtime.kernels.activate(wide + size_t(m) * wide_stride, down.inputs(), gelu_, runtime.own_row(team));
    runtime.convert(down, runtime.own_row(team), m);
  });
  runtime.matmul(team, down, rows, out, stride);
}

}  // namespace fastmtp
