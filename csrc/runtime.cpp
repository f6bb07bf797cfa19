#include "runtime.hpp"

#include <chrono>

namespace fastmtp {
namespace {

template <class Work>
double seconds_of(Work work) {
  const auto started = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

}  // namespace

void Runtime::matmul(Team& team, const Matrix& matrix, int outputs, int first, int rows, float* out, int stride) {
  const Operand from = operand(matrix).from(matrix.type(), first);
  const double seconds = seconds_of([&] {
    team.split(round_up(outputs, kLanes) / kLanes, [&](int begin, int end) {
      kernels.matmul(matrix.view(), from, rows, begin, end, out, stride);
    });
  });
  if (team.id == 0) matmul_seconds += seconds;
}

void Runtime::product(Team& team, const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  team.each(rows, [&](int m) { convert(matrix, states + size_t(m) * matrix.inputs(), m); });
  matmul(team, matrix, rows, out, stride);
}

void Runtime::scores(const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  const std::lock_guard lock(busy);
  reserve_operand(rows, matrix.inputs());
  run([&](Team team) { product(team, matrix, states, rows, out, stride); });
}

std::vector<int32_t> Runtime::argmax(const Matrix& matrix, const float* states, int rows) {
  const std::lock_guard lock(busy);
  const int stride = stride_of(matrix);
  float* out = logits.reserve(size_t(rows) * stride);
  reserve_operand(rows, matrix.inputs());
  std::vector<int32_t> best(rows);
  run([&](Team team) {
    product(team, matrix, states, rows, out, stride);
    team.each(rows, [&](int m) { best[m] = kernels.argmax(out + size_t(m) * stride, matrix.outputs()); });
  });
  return best;
}

double Runtime::read_seconds(size_t bytes, int repeats) {
  constexpr size_t kPart = 4096;
  const std::lock_guard lock(busy);
  const size_t count = bytes / sizeof(float);
  const Buffer<float> memory = allocate<float>(count);
  // The system may map all pages of zeros to one, so they are filled.
  for (size_t i = 0; i < count; i++) memory[i] = float(i % 1021);
  std::vector<float> sums(threads);
  double best = 1e9;
  for (int repeat = 0; repeat < repeats; repeat++)
    best = std::min(best, seconds_of([&] {
      run([&](Team team) {
        team.split(int(count / kPart), [&](int begin, int end) {
          sums[team.id] = kernels.read(memory.get() + begin * kPart, (end - begin) * kPart);
        });
      });
    }));
  return best;
}

}  // namespace fastmtp
