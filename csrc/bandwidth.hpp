#pragma once

#include <cstddef>

namespace fastmtp {

// Seconds to read `bytes` of memory, much more than the caches hold, once: the best of some repeats.
double read_seconds(size_t bytes, int threads, int repeats);

}  // namespace fastmtp
