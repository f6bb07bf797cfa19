// Large aligned memory. Failing to get it throws std::bad_alloc, which Python sees as MemoryError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmtp {

struct Free {
  void* base = nullptr;  // where the block begins, before the aligned part
  void operator()(void*) const { std::free(base); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned zeros for `count` items, on large pages where that helps: fewer page faults and table walks. Large blocks
// take no memory before they are written.
template <class T>
Buffer<T> allocate(size_t count) {
  constexpr size_t large = size_t(2) << 20, line = 64;
  const size_t alignment = count * sizeof(T) >= large ? large : line;
  const size_t bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
  if (bytes == 0) return nullptr;
  void* base = std::calloc(bytes + alignment, 1);
  if (!base) throw std::bad_alloc();
  const uintptr_t start = (reinterpret_cast<uintptr_t>(base) + alignment - 1) / alignment * alignment;
#if defined(__linux__)
  if (alignment == large) madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);
#endif
  return Buffer<T>(reinterpret_cast<T*>(start), Free{base});
}

}  // namespace fastmtp
