// What the layers of a stack keep of one sequence.
//
// A cache does not know its length: a forward pass says at which position it writes, so taking tokens back costs
// nothing and cannot go wrong.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernels.hpp"
#include "memory.hpp"

namespace fastmtp {

// One layer's part of a cache; made by the layer's mixer.
class State {
 public:
  virtual ~State() = default;

  // How many bf16 numbers a page of kPageTokens tokens takes.
  virtual size_t page_numbers() const = 0;
  // Room for this many tokens, a multiple of kPageTokens; the last page's is at `page` and zeroed.
  virtual void reserve(int tokens, uint16_t* page) = 0;
  // The tokens in these slots, in ascending order, become those from `start` on; none is before its new slot.
  virtual void commit(int start, const std::vector<int32_t>& slots) = 0;
};

class Cache {
 public:
  explicit Cache(std::vector<std::unique_ptr<State>> layers) : layers_(std::move(layers)) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  // Room for this many tokens; what is held stays. Throws std::bad_alloc before anything changes.
  void reserve(int tokens);
  void commit(int start, const std::vector<int32_t>& slots);

  int capacity() const { return int(pages_.size()) * kPageTokens; }
  size_t page_bytes() const;
  const std::vector<std::unique_ptr<State>>& layers() const { return layers_; }

 private:
  std::vector<std::unique_ptr<State>> layers_;
  std::vector<Buffer<uint16_t>> pages_;  // each holds a page of every layer, in order
};

}  // namespace fastmtp
