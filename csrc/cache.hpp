// Keys and values of one sequence, in bf16, in pages of 256 tokens.
//
// A page holds all layers: for each layer and key/value head the keys, then the values (page_numbers in kernels.hpp
// says in which order). The cache does not know its length: a forward pass says at which position it writes, so taking tokens
// back costs nothing and cannot go wrong.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "memory.hpp"

namespace fastmtp {

class Cache {
 public:
  Cache(int layers, int heads, int head_size) : layers_(layers), heads_(heads), head_size_(head_size) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  // Room for this many tokens; what is held stays. Throws std::bad_alloc before anything changes.
  void reserve(int tokens) {
    while (capacity() < tokens) pages_.push_back(allocate<uint16_t>(page_bytes() / sizeof(uint16_t)));
  }

  // The tokens in these slots, in ascending order, become those from `start` on; none is before its new slot.
  void move(const int32_t* slots, int count, int start);

  int capacity() const { return int(pages_.size()) * kPageTokens; }
  size_t page_bytes() const { return size_t(layers_) * heads_ * 2 * page_numbers(head_size_) * sizeof(uint16_t); }

  uint16_t* keys(int page, int layer, int head) const {
    return pages_[page].get() + (size_t(layer) * heads_ + head) * 2 * page_numbers(head_size_);
  }
  uint16_t* values(int page, int layer, int head) const {
    return keys(page, layer, head) + page_numbers(head_size_);
  }

 private:
  int layers_, heads_, head_size_;
  std::vector<Buffer<uint16_t>> pages_;
};

}  // namespace fastmtp
