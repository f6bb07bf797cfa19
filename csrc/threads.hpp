// A team of threads that goes through a forward pass together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#include "parts.hpp"

namespace fastmtp {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// All threads of a team wait for the last one. A forward pass has some hundred waits, so a wait spins first. If another
// process has taken the core of a thread, the others should not use theirs for spinning, so a wait then sleeps.
class Barrier {
 public:
  void wait(int count) {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_seq_cst);
      if (sleeping_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
      }
      return;
    }
    for (int spin = 0; spin < kSpins; spin++) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != round; });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpins = 4000;  // about 50 microseconds

  std::atomic<int> arrived_{0}, sleeping_{0};
  std::atomic<unsigned> round_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// One thread's view of its team.
struct Team {
  int id, count;
  Barrier& barrier;
  Laps* laps;  // null while nobody asks where the time goes

  // Since the last call this thread has worked on a part.
  void lap(Part part) const {
    if (laps) laps->lap(laps->work[int(part)]);
  }

  // Waits for the others after a part.
  void wait(Part part) const {
    lap(part);
    barrier.wait(count);
    if (laps) laps->lap(laps->waiting[int(part)]);
  }

  // Calls work(item) for this thread's share of the items of a part, and waits for the others.
  template <class Work>
  void each(Part part, int items, Work work) const {
    for (int item = id; item < items; item += count) work(item);
    wait(part);
  }

  // Calls work(begin, end) for this thread's contiguous share.
  template <class Work>
  void split(Part part, int items, Work work) const {
    const long long total = items;
    const int begin = int(total * id / count), end = int(total * (id + 1) / count);
    if (begin < end) work(begin, end);
    wait(part);
  }
};

}  // namespace fastmtp
