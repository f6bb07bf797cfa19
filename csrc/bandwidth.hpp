#pragma once

#include "runtime.hpp"

namespace fastmtp {

// Seconds to read `bytes` of memory, much more than the caches hold, once: the best of some repeats.
double read_seconds(Runtime& runtime, size_t bytes, int repeats);

}  // namespace fastmtp
