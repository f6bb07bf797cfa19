// Threads that work together and that nobody waits for before they come: the start of a run, its end, and how to wait.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace fastmtp {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A wait for something that other threads do: it spins first, then it sleeps, since a thread that is late may need the
// core. Others do it, and it is read, sequentially consistently: so either `tell` sees who is about to sleep, or that
// one sees what was done.
class Waiting {
 public:
  static constexpr int kSpins = 4000;  // about 50 microseconds

  template <class Holds>
  void until(Holds holds, int spins = kSpins) {
    for (int spin = 0; spin < spins; spin++) {
      if (holds()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_++;
    wake_.wait(lock, holds);
    sleeping_--;
  }

  // To be called after what may end a wait.
  void tell() {
    if (sleeping_ == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

 private:
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The threads of a run: the caller's, and others that are started at the first one.
class Threads {
 public:
  explicit Threads(int count) : crew_(new Crew(count)) {}
  Threads(const Threads&) = delete;

  ~Threads() {
    // A forked process has none of the other threads, and must not touch what they wait for.
    if (crew_->is_here()) crew_->end();
    else crew_.release();
  }

  // Calls work(id) on the caller's thread and on each other one that comes before that returns; waits for those that
  // came. Throws std::system_error if the system has no more threads.
  template <class Work>
  void run(const Work& work) {
    if (crew_->count == 1) return work(0);
    if (!crew_->is_here()) {
      // A process that was forked before the first run starts threads of its own. After it, it has the caller's alone,
      // and to wake the others could take for ever.
      if (!crew_->others.empty()) return work(0);
      crew_.reset(new Crew(crew_->count));
    }
    crew_->run(&work, [](const void* own, int id) { (*static_cast<const Work*>(own))(id); });
  }

 private:
  struct Crew {
    explicit Crew(int count) : count(count) {}

    const int count;
    std::vector<std::thread> others;
    // Of the last run: its number, whether threads may still come, and how many are there.
    std::atomic<uint64_t> state{0};
    uint64_t number = 0;
    const void* work = nullptr;
    void (*call)(const void*, int) = nullptr;
    Waiting begun, ended;
#ifndef _WIN32
    const pid_t process = getpid();
    bool is_here() const { return process == getpid(); }
#else
    bool is_here() const { return true; }
#endif

    void run(const void* its_work, void (*its_call)(const void*, int)) {
      while (int(others.size()) < count - 1) {
        const int id = int(others.size()) + 1;
        others.emplace_back([this, id] { serve(id); });
      }
      work = its_work;
      call = its_call;
      number += kNumber;
      state = number | kOpen;
      begun.tell();
      call(work, 0);
      state &= ~kOpen;
      ended.until([&] { return state == number; });
    }

    void serve(int id) {
      uint64_t last = 0, seen = 0;
      const auto is_new = [&] {
        seen = state;
        return seen == kEnd || ((seen & kOpen) && seen / kNumber != last);
      };
      while (true) {
        begun.until(is_new, kIdleSpins);
        if (seen == kEnd) return;
        if (!state.compare_exchange_strong(seen, seen + 1)) continue;
        last = seen / kNumber;
        call(work, id);
        state--;
        ended.tell();
      }
    }

    void end() {
      state = kEnd;
      begun.tell();
      for (std::thread& other : others) other.join();
    }
  };

  // While the caller is likely to come back with another run.
  static constexpr int kIdleSpins = 3 * Waiting::kSpins;
  static constexpr uint64_t kNumber = uint64_t(1) << 32, kOpen = kNumber >> 1, kEnd = ~uint64_t(0);

  std::unique_ptr<Crew> crew_;
};

}  // namespace fastmtp
