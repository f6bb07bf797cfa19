// Threads that go through a forward pass together, phase by phase, and never wait for one that is not there.
//
// A phase is a number of items. Each thread takes those of its share, then others' that are left, and the next phase
// begins when all items are done, whoever did them: another process may have the core of a thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "parts.hpp"
#include "threads.hpp"

namespace fastmtp {

struct Items {
  int begin, end;

  bool empty() const { return begin == end; }
};

// What is left of a thread's share of a phase, on a cache line of its own. Its thread takes from the front, others from
// the back.
class alignas(64) Left {
 public:
  void reset() { packed_.store(0, std::memory_order_relaxed); }

  // Takes some items of a phase: of so many that are left, count(left). share() is the thread's share of the phase.
  template <class Share, class Count>
  Items take(uint64_t phase, Share share, Count count, bool front) {
    uint64_t seen = packed_.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t its = seen >> 2 * kBits;
      if (its > phase) return {0, 0};  // the phase is over
      const Items all = its == phase ? Items{int(seen >> kBits & kMask), int(seen & kMask)} : share();
      if (all.empty()) return all;
      const int taken = std::min(count(all.end - all.begin), all.end - all.begin);
      const Items rest = front ? Items{all.begin + taken, all.end} : Items{all.begin, all.end - taken};
      const uint64_t packed = phase << 2 * kBits | uint64_t(rest.begin) << kBits | uint64_t(rest.end);
      if (packed_.compare_exchange_weak(seen, packed, std::memory_order_relaxed))
        return front ? Items{all.begin, rest.begin} : Items{rest.end, all.end};
    }
  }

 private:
  static constexpr int kBits = 24;  // of an item's number; the rest is the phase's
  static constexpr uint64_t kMask = (1 << kBits) - 1;

  std::atomic<uint64_t> packed_{0};
};

// What the threads of a run share; all zero when it begins.
struct Shared {
  explicit Shared(int count) : count(count), left(new Left[count]) {}

  void reset() {
    done.store(0, std::memory_order_relaxed);
    for (int id = 0; id < count; id++) left[id].reset();
  }

  const int count;
  const std::unique_ptr<Left[]> left;  // by thread
  alignas(64) std::atomic<int64_t> done{0};  // items of all phases
  Waiting waiting;                           // for them
  std::vector<std::atomic<int>> of_group;    // items by group, of groups that more than one thread works on
};

// One thread's way through a run. All threads go the same way, so each knows when a phase is over. What a thread does
// between phases must do no harm if they are long over.
class Team {
 public:
  Team(int id, Shared& shared, Laps* laps) : id(id), count(shared.count), shared_(shared), laps_(laps) {}

  const int id, count;

  // Since the last call this thread has worked on a part.
  void lap(Part part) const {
    if (laps_) laps_->worked(part);
  }

  // Calls work(item) for all items of a part.
  template <class Work>
  void each(Part part, int items, Work work) {
    split(part, items, [&](int begin, int end) {
      for (int item = begin; item < end; item++) work(item);
    });
  }

  // Calls work(m, group) for all groups of all rows: neighbouring groups, which come from one thread and go to one, so
  // that few numbers change cores.
  template <class Work>
  void each_group(Part part, int rows, int groups, Work work) {
    split(part, rows * groups, [&](int begin, int end) {
      for (int item = begin; item < end; item++) work(item % rows, item / rows);
    });
  }

  // Calls work(begin, end) for all items: once for each thread, if none is late.
  template <class Work>
  void split(Part part, int items, Work work) {
    split(part, items, 0, work);
  }

  // The same in steps of at most 2 * `step` items; who is done helps the others, without steps (0) only late ones.
  template <class Work>
  void split(Part part, int items, int step, Work work) {
    phase(part, items, step, [&](int thread) { return share(items, thread); }, work);
  }

  // The same, and then(group), which is of another part, for each `size` items: by the thread that does the last of
  // them, as soon as they are done.
  template <class Work, class Then>
  void split(Part part, int items, int step, Work work, int size, Part after, Then then) {
    split(part, items, step, [&](int begin, int end) {
      work(begin, end);
      lap(part);
      for (int group = begin / size; group * size < end; group++) {
        const int first = group * size, last = std::min(items, first + size);
        if (completes(group, std::min(end, last) - std::max(begin, first), last - first)) then(group);
      }
      lap(after);
    });
  }

  // Whether this thread does an item of a split phase, if none is late.
  bool has(int item, int items) const {
    const Items own = share(items, id);
    return own.begin <= item && item < own.end;
  }

  // What `split` does in steps, where share_of(thread) is a thread's share.
  template <class Share, class Work>
  void phase(Part part, int items, int step, Share share_of, Work work) {
    phase_++;
    end_ += items;
    count_done(take_from(0, step, share_of, work));
    for (int other = 1; step && other < count; other++) count_done(take_from(other, step, share_of, work));
    lap(part);
    for (int spin = 1; spin <= Waiting::kSpins; spin++) {
      if (is_over()) return waited(part);
      pause();
      for (int other = 1; spin % kPatience == 0 && other < count; other++)
        if (const int did = take_from(other, step, share_of, work)) {
          count_done(did);
          lap(part);
        }
    }
    // What is not done is under way.
    shared_.waiting.until([&] { return is_over(); }, 0);
    waited(part);
  }

 private:
  // Spins after which a thread looks for what another has not begun: about a microsecond, since most are not late.
  static constexpr int kPatience = 64;

  Items share(long long items, int thread) const {
    return {int((items * thread + count - 1) / count), int((items * (thread + 1) + count - 1) / count)};
  }

  // Does what is left to the thread `other` threads further, and returns how much that was. Without steps it takes all
  // of its own, and of another's half at a time.
  template <class Share, class Work>
  int take_from(int other, int step, Share share_of, Work work) {
    const int thread = (id + other) % count;
    const auto count_of = [&](int left) {
      if (other == 0) return step ? 2 * step : left;
      return step ? step : (left + 1) / 2;
    };
    int did = 0;
    while (true) {
      const Items some = shared_.left[thread].take(phase_, [&] { return share_of(thread); }, count_of, other == 0);
      if (some.empty()) return did;
      work(some.begin, some.end);
      did += some.end - some.begin;
    }
  }

  void count_done(int did) {
    if (did == 0) return;
    shared_.done += did;
    shared_.waiting.tell();
  }

  bool is_over() const { return shared_.done >= end_; }

  void waited(Part part) const {
    if (laps_) laps_->waited(part);
  }

  // Counts `did` items of a group of `size`; whether that was the last of them.
  bool completes(int group, int did, int size) const {
    if (did == size) return true;
    std::atomic<int>& done = shared_.of_group[group];
    if (done.fetch_add(did, std::memory_order_acq_rel) + did < size) return false;
    done.store(0, std::memory_order_relaxed);
    return true;
  }

  Shared& shared_;
  Laps* const laps_;  // null while nobody asks where the time goes
  uint64_t phase_ = 0;
  int64_t end_ = 0;  // items until the end of the phase
};

}  // namespace fastmtp
