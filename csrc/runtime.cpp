#include "runtime.hpp"

#include <cmath>
#include <numeric>

namespace fastmtp {
namespace {

template <class Work>
double seconds_of(Work work) {
  const auto started = Laps::Clock::now();
  work();
  return std::chrono::duration<double>(Laps::Clock::now() - started).count();
}

template <class Work>
double least_seconds(int repeats, Work work) {
  double best = 1e9;
  for (int repeat = 0; repeat < repeats; repeat++) best = std::min(best, seconds_of(work));
  return best;
}

}  // namespace

void Runtime::matmul(Team& team, Part part, Inputs& operand, const Matrix& matrix, int rows, float* out, int stride,
                     Norm norm, const Then* then) {
  Operand from = operand.of(matrix);
  const auto multiply = [&](int begin, int end) {
    // With items to do, so before the squares change.
    if (!from.factors) from.factors = set_factors(team, matrix, rows, norm);
    kernels.matmul(matrix.view(), from, rows, begin, end, out, stride);
  };
  if (then && then->outputs % kLanes == 0)
    return team.split(part, matrix.blocks(), kBlocksTogether, multiply, then->outputs / kLanes, then->part,
                      [&](int group) {
                        for (int m = 0; m < rows; m++) (*then)(team, m, group);
                      });
  team.split(part, matrix.blocks(), kBlocksTogether, multiply);
  if (then) team.each_group(then->part, rows, (matrix.outputs() - 1) / then->outputs + 1, [&](int m, int group) {
      (*then)(team, m, group);
    });
}

void Runtime::matmul(Team& team, Part part, const Matrix& matrix, int outputs, int first, int rows, float* out,
                     int stride) {
  Operand from = stream.of(matrix).from(matrix.type(), first);
  team.split(part, round_up(outputs, kLanes) / kLanes, kBlocksTogether, [&](int begin, int end) {
    if (!from.factors) from.factors = set_factors(team, matrix, rows, {});
    kernels.matmul(matrix.view(), from, rows, begin, end, out, stride);
  });
}

// Every thread has its own, since to wait for somebody else's would take longer.
const float* Runtime::set_factors(const Team& team, const Matrix& matrix, int rows, Norm norm) {
  float* factors = factors_.get() + size_t(team.id) * rows_stride_;
  for (int m = 0; m < rows; m++) {
    float total = 0;
    for (int group = 0; norm.size && group < matrix.groups(); group++) total += squares(m, group);
    factors[m] = norm.size ? 1.0f / std::sqrt(total / float(norm.size) + norm.epsilon) : 1.0f;
  }
  return factors;
}

void Runtime::product(Team& team, const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  convert_all(team, matrix, rows, [&](int m) { return states + size_t(m) * matrix.inputs(); });
  matmul(team, Part::lm_head, matrix, matrix.outputs(), 0, rows, out, stride);
}

void Runtime::scores(const Matrix& matrix, const float* states, int rows, float* out, int stride) {
  const Call call(*this);
  reserve(stream, rows, matrix.inputs());
  run([&](Team& team) { product(team, matrix, states, rows, out, stride); });
}

std::vector<int32_t> Runtime::argmax(const Matrix& matrix, const float* states, int rows, int kept, float* out) {
  const Call call(*this);
  const int stride = stride_of(matrix);
  const float* scores = logits.reserve(size_t(rows) * stride);
  reserve(stream, rows, matrix.inputs());
  std::vector<int32_t> best(rows - kept);
  run([&](Team& team) {
    product(team, matrix, states, rows, logits.get(), stride);
    team.each(Part::argmax, rows, [&](int m) {
      const float* row = scores + size_t(m) * stride;
      if (m < kept)
        std::copy_n(row, matrix.outputs(), out + size_t(m) * stride);
      else
        best[m - kept] = kernels.argmax(row, matrix.outputs());
    });
  });
  return best;
}

double Runtime::read_seconds(size_t bytes, int repeats) {
  constexpr size_t kPart = 4096;
  const Call call(*this);
  const size_t count = bytes / sizeof(float);
  const Buffer<float> memory = allocate<float>(count);
  // The system may map all pages of zeros to one, so they are filled.
  for (size_t i = 0; i < count; i++) memory[i] = float(i % 1021);
  std::vector<float> sums(threads);
  return least_seconds(repeats, [&] {
    run([&](Team& team) {
      team.split(Part::read, int(count / kPart), [&](int begin, int end) {
        sums[team.id] = kernels.read(memory.get() + begin * kPart, (end - begin) * kPart);
      });
    });
  });
}

// How often a second work(thread), on all threads at once, does what it returns the number of; the best of some repeats.
template <class Work>
double Runtime::rate(Work work) {
  constexpr int kRepeats = 10;
  const Call call(*this);
  std::vector<double> done(threads);
  double seconds = 0;
  run([&](Team& team) {
    const double least = least_seconds(kRepeats, [&] {
      team.each(Part::read, threads, [&](int thread) { done[thread] = work(thread); });
    });
    if (team.id == 0) seconds = least;
  });
  return std::accumulate(done.begin(), done.end(), 0.0) / seconds;
}

double Runtime::product_peak(Type type) {
  const Buffer<uint8_t> memory = allocate<uint8_t>(size_t(threads) * kPeakBytes);
  return rate([&](int thread) { return kernels.product_peak(type, memory.get() + thread * kPeakBytes); });
}

double Runtime::attention_peak() {
  const Buffer<uint8_t> memory = allocate<uint8_t>(size_t(threads) * kPeakBytes);
  return rate([&](int thread) { return kernels.attention_peak(memory.get() + thread * kPeakBytes); });
}

double Runtime::phase_seconds() {
  constexpr int kPhases = 50, kRepeats = 20;
  const Call call(*this);
  double seconds = 0;
  std::atomic<int> there{0};
  run([&](Team& team) {
    int expected = 0;
    const double least = least_seconds(kRepeats, [&] {
      for (int phase = 0; phase < kPhases; phase++) {
        expected += threads;
        team.each(Part::read, threads, [&](int) {
          for (there++; there < expected;) pause();
        });
      }
    });
    if (team.id == 0) seconds = least;
  });
  return seconds / kPhases;
}

double Runtime::product_seconds(const Matrix& matrix, int rows) {
  constexpr int kTimes = 200;
  const Call call(*this);
  const int stride = stride_of(matrix);
  const size_t size = size_t(rows) * stride;
  float* out = logits.reserve(threads * size);
  reserve(stream, rows, matrix.inputs());
  const std::vector<float> zeros(matrix.inputs());
  for (int m = 0; m < rows; m++) convert(matrix, zeros.data(), m);
  std::fill_n(factors_.get(), rows, 1.0f);
  Operand operand = stream.of(matrix);
  operand.factors = factors_.get();
  return threads / rate([&](int thread) {
           for (int time = 0; time < kTimes; time++)
             kernels.matmul(matrix.view(), operand, rows, 0, matrix.blocks(), out + thread * size, stride);
           return double(kTimes);
         });
}

void Runtime::time_parts(bool on) {
  const std::lock_guard lock(busy_);
  laps_.assign(on ? threads : 0, {});
}

std::vector<Laps> Runtime::laps() {
  const std::lock_guard lock(busy_);
  return laps_;
}

}  // namespace fastmtp
