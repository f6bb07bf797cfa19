// Large aligned memory. Failing to get it throws std::bad_alloc, which Python sees as MemoryError.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmtp {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Zeroed memory for `count` items, on large pages where that helps: fewer page faults and table walks.
template <class T>
Buffer<T> allocate(size_t count) {
  constexpr size_t large = size_t(2) << 20, line = 64;
  const size_t alignment = count * sizeof(T) >= large ? large : line;
  const size_t bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
  if (bytes == 0) return nullptr;
#if defined(_WIN32)
  void* memory = std::calloc(bytes, 1);
  if (!memory) throw std::bad_alloc();
#else
  void* memory = std::aligned_alloc(alignment, bytes);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == large) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, bytes);
#endif
  return Buffer<T>(static_cast<T*>(memory));
}

}  // namespace fastmtp
