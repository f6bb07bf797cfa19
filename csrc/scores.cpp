#include "scores.hpp"

namespace fastmtp {
namespace {

void product(Runtime& runtime, Team& team, const Matrix& matrix, const float* states, int rows, float* out,
             int stride) {
  team.each(rows, [&](int m) { runtime.convert(matrix, states + size_t(m) * matrix.inputs(), m); });
  runtime.matmul(team, matrix, rows, out, stride);
}

}  // namespace

void scores(Runtime& runtime, const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  runtime.reserve_operand(rows, matrix.inputs());
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    product(runtime, team, matrix, states, rows, out, stride);
  });
}

std::vector<int32_t> argmax(Runtime& runtime, const Matrix& matrix, const float* states, int rows) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  const int stride = stride_of(matrix);
  float* logits = runtime.logits.reserve(size_t(rows) * stride);
  runtime.reserve_operand(rows, matrix.inputs());
  std::vector<int32_t> best(rows);
  with_team(runtime.threads, runtime.barrier, [&](Team team) {
    product(runtime, team, matrix, states, rows, logits, stride);
    team.each(rows, [&](int m) { best[m] = runtime.kernels.argmax(logits + size_t(m) * stride, matrix.outputs()); });
  });
  return best;
}

}  // namespace fastmtp
