// Where the time of a pass goes: each moment of a thread belongs to one part, as work or as waiting for other threads.
#pragma once

#include <chrono>

namespace fastmtp {

// plan: outside the parallel regions; team: threads that start and end a region.
enum class Part {
  plan, team, embed, norm, convert, query_key_value, rope, attention, out, gate_up, activate, down, project, lm_head,
  argmax, read
};
constexpr const char* kPartNames[] = {"plan",      "team", "embed",   "norm",     "convert", "query_key_value",
                                      "rope",      "attention", "out", "gate_up", "activate", "down",
                                      "project",   "lm_head", "argmax", "read"};
constexpr int kParts = sizeof kPartNames / sizeof *kPartNames;

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
