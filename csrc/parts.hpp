// Where the time of a pass goes: each moment of a thread belongs to one part, as work or as waiting for other threads.
#pragma once

#include <chrono>

namespace fastmtp {

// plan is what is done before and after parallel regions, team their beginning and end, read a measurement of speed.
enum class Part {
  query_key_value, out, gate_up, down, lm_head, project, attention, rope, norm, convert, activate, embed, argmax, plan,
  team, read
};
constexpr const char* kPartNames[] = {
    "query_key_value", "out",  "gate_up", "down",     "lm_head", "project", "attention", "rope",
    "norm",            "convert", "activate", "embed", "argmax",  "plan",    "team",      "read",
};
constexpr int kParts = sizeof kPartNames / sizeof *kPartNames;
static_assert(kParts == int(Part::read) + 1);

// Whose parts they are.
enum class Owner { target, head };

// One thread's seconds by owner and part, on a cache line of its own.
struct alignas(64) Laps {
  using Clock = std::chrono::steady_clock;

  double work[2][kParts] = {}, waiting[2][kParts] = {};
  Owner owner = Owner::target;
  Clock::time_point last;

  // Adds the time since the last lap to a part.
  void worked(Part part) { lap(work[int(owner)][int(part)]); }
  void waited(Part part) { lap(waiting[int(owner)][int(part)]); }

 private:
  void lap(double& seconds) {
    const Clock::time_point now = Clock::now();
    seconds += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace fastmtp
