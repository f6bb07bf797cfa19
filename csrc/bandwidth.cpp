#include "bandwidth.hpp"

#include <chrono>

#include "memory.hpp"
#include "threads.hpp"

namespace fastmtp {

double read_seconds(size_t bytes, int threads, int repeats) {
  const size_t words = bytes / sizeof(uint64_t);
  Buffer<uint64_t> memory = allocate<uint64_t>(words);
  // Pages that hold only zeros may be one page to the system.
  for (size_t i = 0; i < words; i++) memory[i] = i * 0x9e3779b97f4a7c15u;
  using clock = std::chrono::steady_clock;
  Barrier barrier;
  double best = 1e9;
  for (int repeat = 0; repeat < repeats; repeat++) {
    const auto started = clock::now();
    with_team(threads, barrier, [&](Team team) {
      team.split(int(words / 512), [&](int begin, int end) {
        // Eight sums: additions are never what it waits for.
        uint64_t sums[8] = {};
        const uint64_t* p = memory.get() + size_t(begin) * 512;
        const uint64_t* last = memory.get() + size_t(end) * 512;
        for (; p < last; p += 8) {
          for (int i = 0; i < 8; i++) sums[i] += p[i];
        }
        volatile uint64_t keep = sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
        (void)keep;
      });
    });
    const double seconds = std::chrono::duration<double>(clock::now() - started).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

}  // namespace fastmtp
