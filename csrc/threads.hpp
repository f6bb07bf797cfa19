// A team of threads that goes through a forward pass together, phase by phase.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastmtp {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// All threads of a team wait for the last one. Some hundred waits make one forward pass, so a wait spins first; but
// a thread whose fellow has lost its core to another process must not burn its own, so it sleeps soon after.
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

  // Calls work(item) for this thread's share of the items, and waits for the others.
  template <class Work>
  void each(int items, Work work) {
    for (int item = id; item < items; item += count) work(item);
    barrier.wait(count);
  }

  // Calls work(begin, end) for this thread's contiguous share.
  template <class Work>
  void split(int items, Work work) {
    const long long total = items;
    const int begin = int(total * id / count), end = int(total * (id + 1) / count);
    if (begin < end) work(begin, end);
    barrier.wait(count);
  }
};

// Runs work(team) on `threads` threads.
template <class Work>
void with_team(int threads, Barrier& barrier, Work work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    Team team{omp_get_thread_num(), omp_get_num_threads(), barrier};
    work(team);
  }
#else
  (void)threads;
  Team team{0, 1, barrier};
  work(team);
#endif
}

}  // namespace fastmtp
