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

// One thread's seconds by part, on a cache line of its own.
struct alignas(64) Laps {
  using Clock = std::chrono::steady_clock;

  double work[kParts] = {}, waiting[kParts] = {};
  Clock::time_point last;

  // Adds the time since the last lap to one of them.
  void lap(double& seconds) {
    const Clock::time_point now = Clock::now();
    seconds += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

}  // namespace fastmtp
