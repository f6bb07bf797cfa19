#include "bandwidth.hpp"

#include <chrono>
#include <vector>

#include "memory.hpp"

namespace fastmtp {

double read_seconds(Runtime& runtime, size_t bytes, int repeats) {
  std::lock_guard<std::recursive_mutex> lock(runtime.busy);
  const size_t count = bytes / sizeof(float);
  Buffer<float> memory = allocate<float>(count);
  // Pages that hold only zeros may be one page to the system.
  for (size_t i = 0; i < count; i++) memory[i] = float(i % 1021);
  std::vector<float> sums(runtime.threads);
  using clock = std::chrono::steady_clock;
  double best = 1e9;
  for (int repeat = 0; repeat < repeats; repeat++) {
    const auto started = clock::now();
    with_team(runtime.threads, runtime.barrier, [&](Team team) {
      team.split(int(count / 4096), [&](int begin, int end) {
        sums[team.id] = runtime.kernels.read(memory.get() + size_t(begin) * 4096, size_t(end - begin) * 4096);
      });
    });
    const double seconds = std::chrono::duration<double>(clock::now() - started).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

}  // namespace fastmtp
