// A team of threads that goes through a forward pass together, phase by phase.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
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

// What is left of a thread's consecutive items, on a cache line of its own. Its thread takes them from the front; one
// that has nothing left takes some from the back, since cores are not equally fast, nor always there.
class alignas(64) Left {
 public:
  struct Items {
    int begin, end;
  };

  void set(Items items) { packed_.store(pack(items), std::memory_order_relaxed); }

  // Takes up to `count` items; none where begin and end are the same.
  Items take(int count, bool front) {
    uint64_t seen = packed_.load(std::memory_order_relaxed);
    while (true) {
      const Items all{int(seen >> 32), int(seen & 0xffffffff)};
      const int taken = std::min(count, all.end - all.begin);
      const Items rest = front ? Items{all.begin + taken, all.end} : Items{all.begin, all.end - taken};
      if (taken == 0 || packed_.compare_exchange_weak(seen, pack(rest), std::memory_order_relaxed))
        return front ? Items{all.begin, all.begin + taken} : Items{all.end - taken, all.end};
    }
  }

 private:
  static uint64_t pack(Items items) { return uint64_t(items.begin) << 32 | uint32_t(items.end); }

  std::atomic<uint64_t> packed_{0};
};

// One thread's view of its team.
struct Team {
  int id, count;
  Barrier& barrier;
  Left* left;               // by thread
  std::atomic<int>* done;   // items by group, of groups that more than one thread works on; zero between parts
  Laps* laps;  // null while nobody asks where the time goes

  // Since the last call this thread has worked on a part.
  void lap(Part part) const {
    if (laps) laps->worked(part);
  }

  // Waits for the others after a part.
  void wait(Part part) const {
    lap(part);
    barrier.wait(count);
    if (laps) laps->waited(part);
  }

  // Calls work(item) for this thread's share of the items of a part, and waits for the others.
  template <class Work>
  void each(Part part, int items, Work work) const {
    for (int item = id; item < items; item += count) work(item);
    wait(part);
  }

  // Calls work(m, group) for this thread's share of the groups of all rows: neighbouring groups, which come from one
  // thread and go to one, so that few numbers change cores.
  template <class Work>
  void each_group(Part part, int rows, int groups, Work work) const {
    split(part, rows * groups, [&](int begin, int end) {
      for (int item = begin; item < end; item++) work(item % rows, item / rows);
    });
  }

  // Calls work(begin, end) for this thread's contiguous share.
  template <class Work>
  void split(Part part, int items, Work work) const {
    const Left::Items own = share(items);
    if (own.begin < own.end) work(own.begin, own.end);
    wait(part);
  }

  // The same in steps of at most 2 * `step` items; who is done helps the others.
  template <class Work>
  void split(Part part, int items, int step, Work work) const {
    steps(items, step, work);
    wait(part);
  }

  // The same, and then(group), which is of another part, for each `size` items: by the thread that does the last of
  // them, as soon as they are done.
  template <class Work, class Then>
  void split(Part part, int items, int step, Work work, int size, Part after, Then then) const {
    steps(items, step, [&](int begin, int end) {
      work(begin, end);
      lap(part);
      for (int group = begin / size; group * size < end; group++) {
        const int first = group * size, last = std::min(items, first + size);
        if (completes(group, std::min(end, last) - std::max(begin, first), last - first)) then(group);
      }
      lap(after);
    });
    wait(part);
  }

  Left::Items share(long long items) const { return {int(items * id / count), int(items * (id + 1) / count)}; }

 private:
  template <class Work>
  void steps(int items, int step, Work work) const {
    left[id].set(share(items));
    for (int other = 0; other < count; other++)
      while (true) {
        const auto [begin, end] = left[(id + other) % count].take(other ? step : 2 * step, other == 0);
        if (begin == end) break;
        work(begin, end);
      }
  }

  // Counts `did` items of a group of `size`; whether that was the last of them.
  bool completes(int group, int did, int size) const {
    if (did == size) return true;
    if (done[group].fetch_add(did, std::memory_order_acq_rel) + did < size) return false;
    done[group].store(0, std::memory_order_relaxed);
    return true;
  }
};

}  // namespace fastmtp
