// What the layers of a stack store for one sequence.
//
// A cache does not know its length: a forward pass says at which slot it writes, so taking tokens back costs nothing.
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
  // Room for this many tokens, a multiple of kPageTokens; the last page is at `page` and zeroed.
  virtual void reserve(int tokens, uint16_t* page) = 0;
  // The tokens in these slots, in ascending order, move to the slots from `start` on, none to a later slot.
  virtual void commit(int start, const std::vector<int32_t>& slots) = 0;
};

class Cache {
 public:
  explicit Cache(std::vector<std::unique_ptr<State>> layers) : layers_(std::move(layers)) {}
  Cache(const Cache&) = delete;
  Cache(Cache&&) = default;

  int capacity() const { return int(pages_.size()) * kPageTokens; }
  const std::vector<std::unique_ptr<State>>& layers() const { return layers_; }

  size_t page_numbers() const {
    size_t numbers = 0;
    for (const auto& layer : layers_) numbers += layer->page_numbers();
    return numbers;
  }

  // Room for this many tokens; the contents stay. Throws std::bad_alloc before the capacity changes.
  void reserve(int tokens) {
    while (capacity() < tokens) {
      Buffer<uint16_t> page = allocate<uint16_t>(page_numbers());
      uint16_t* part = page.get();
      for (const auto& layer : layers_) {
        layer->reserve(capacity() + kPageTokens, part);
        part += layer->page_numbers();
      }
      pages_.push_back(std::move(page));
    }
  }

  void commit(int start, const std::vector<int32_t>& slots) {
    for (const auto& layer : layers_) layer->commit(start, slots);
  }

 private:
  std::vector<std::unique_ptr<State>> layers_;
  std::vector<Buffer<uint16_t>> pages_;  // each holds a page of every layer, in order
};

}  // namespace fastmtp
